"""Causal grouped-query attention over the cache: in plain XLA, and for prompts on a GPU by cuDNN's flash attention."""

import logging
from functools import cache

import jax
import jax.numpy as jnp

AMPERE = 8.0  # the first GPUs' compute capability for which cuDNN has it

logger = logging.getLogger("jaxsvd")


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Softmax attention; every query sees the keys at its own position and before.

    Args:
        queries: (batch, heads, tokens, head_dim).
        keys, values: (batch·kv_heads, capacity, head_dim), heads a multiple of kv_heads (GQA, Ainslie et al. 2023).
        positions: int32 (batch, tokens), the position of each query; key j has position j. They ascend by one, and end
            within the capacity.

    Returns:
        (batch, heads, tokens, head_dim) in the queries' dtype; scores and softmax are float32.
    """
    batch, heads, tokens, width = queries.shape
    rows, capacity, _ = keys.shape
    if tokens > 1 and has_flash(queries.dtype, width):
        return flash(queries, keys, values, positions)
    # Heads of one group become rows of one matrix, so that each key is read once for all of them.
    grouped = queries.reshape(rows, -1, width)
    scores = jnp.einsum("nqd,nsd->nqs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, -1, tokens, capacity) * width**-0.5
    seen = jnp.arange(capacity) <= positions[:, None, :, None]
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype).reshape(rows, -1, capacity)
    mixed = jnp.einsum("nqs,nsd->nqd", weights, values, preferred_element_type=jnp.float32)
    return mixed.astype(queries.dtype).reshape(batch, heads, tokens, width)


def flash(
    queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """As `attend`, for many tokens: the scores of all heads, which can take more memory than the model, are never made.

    `implementation` is that of `jax.nn.dot_product_attention`.
    """
    batch, _, tokens, width = queries.shape
    capacity = keys.shape[1]
    keys, values = (cached.reshape(batch, -1, capacity, width).swapaxes(1, 2) for cached in (keys, values))
    # A prompt that fills the cache begins it. Only then does "causal" mean the same here and there.
    whole = tokens == capacity
    mask = None if whole else jnp.arange(capacity) <= positions[:, None, :, None]
    mixed = jax.nn.dot_product_attention(
        queries.swapaxes(1, 2),
        keys,
        values,
        mask=mask,
        is_causal=whole,
        implementation=implementation,  # type: ignore[arg-type]
    )
    return mixed.swapaxes(1, 2)


@cache
def has_flash(dtype: jnp.dtype, width: int) -> bool:
    """Whether cuDNN takes heads of that dtype and width here: JAX asks it all but the GPU's generation."""
    if jax.default_backend() != "gpu" or dtype == jnp.float32:
        return False
    generation = getattr(jax.local_devices()[0], "compute_capability", "0")
    if float(generation) < AMPERE:
        return False
    heads, cached, positions = ((1, 1, 64, width), dtype), ((1, 64, width), dtype), ((1, 64), jnp.int32)
    try:
        jax.eval_shape(flash, *(jax.ShapeDtypeStruct(*kind) for kind in (heads, cached, cached, positions)))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        logger.warning("XLA attends, not cuDNN: %s", error)
        return False
    return True
