"""The small layers that every model shares: norm, embedding, rotary embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxsvd.config import Rope
from jaxsvd.kernels import Backend
from jaxsvd.lowrank import parameter
from jaxsvd.weights import Weights


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, weights: Weights, name: str, width: int, eps: float) -> None:
        self.weight = parameter(weights.array(f"{name}.weight", width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…, width) to the same shape and dtype."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        # Without the guard an overflow would become zeros, and damaged weights plausible nonsense.
        wide = wide * jnp.where(mean < jnp.inf, lax.rsqrt(mean + self.eps), jnp.nan)
        return wide.astype(x.dtype) * self.weight[...]


class Embedding(nnx.Module):
    """The table of token vectors, also the output head: of the same table where tied, of `lm_head` where not."""

    def __init__(self, weights: Weights, backend: Backend, name: str, vocab: int, width: int) -> None:
        self.backend = backend
        self.weight = parameter(weights.array(f"{name}.weight", vocab, width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids (…) to vectors (…, width)."""
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """x (…, width) to float32 logits (…, vocab)."""
        return self.backend.attend(x, self.weight[...])


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """The angle per token of each pair of a head, float32 (head_dim/2,).

    Su et al. 2021; the llama3 kind stretches low frequencies by `factor`, keeps high ones, and blends between
    (Llama 3.1 model card; the wavelengths that bound the blend are `original_max_position / {low,high}_freq_factor`).
    """
    inverse = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_position * inverse / (2 * math.pi)
        keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        inverse = keep * inverse + (1 - keep) * inverse / rope.factor
    return inverse.astype(np.float32)


def rope_angles(positions: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Positions (batch, tokens) to cosines and sines, float32 (batch, 1, tokens, head_dim/2)."""
    angles = positions[:, None, :, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotate heads (batch, heads, tokens, head_dim) by position. Pair i is (x[i], x[i + head_dim/2]), as in HF."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=-1).astype(x.dtype)
