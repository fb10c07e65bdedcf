"""The key-value cache: per-layer lists, functional, donated in every step."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxsvd.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass
class KVCache:
    """Keys (after RoPE) and values, per layer (batch·kv_heads, capacity, head_dim); rows are left-aligned.

    `lengths` int32 (batch,) is the number of real tokens in each row. What lies behind it is never attended to.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """The tokens that a row can hold."""
        return self.keys[0].shape[1]


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros."""
    shape = (batch * config.num_kv_heads, capacity, config.head_dim)
    zeros = [jnp.zeros(shape, dtype) for _ in range(2 * config.num_layers)]
    return KVCache(zeros[: config.num_layers], zeros[config.num_layers :], jnp.zeros((batch,), jnp.int32))


def write(buffer: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Put `new` (batch, kv_heads, tokens, head_dim) into `buffer` from token `start`, one () for all rows or (batch,).

    Slices are clamped into the buffer, never dropped: an out-of-bounds scatter is a run-time error on Neuron.
    """
    new = new.astype(buffer.dtype)
    if start.ndim == 0:
        return lax.dynamic_update_slice(buffer, new.reshape(-1, *new.shape[2:]), (0, start, 0))
    if len(new) > 1 and jax.default_backend() == "gpu":
        # There each slice would be a kernel; of all rows together XLA makes one scatter, in place.
        rows = buffer.reshape(*new.shape[:2], *buffer.shape[1:])
        put = jax.vmap(lambda row, piece, at: lax.dynamic_update_slice(row, piece, (0, at, 0)))
        return put(rows, new, start).reshape(buffer.shape)
    for row, piece in enumerate(new):
        buffer = lax.dynamic_update_slice(buffer, piece, (row * piece.shape[0], start[row], 0))
    return buffer
