"""Causal grouped-query attention over the cache, in plain XLA."""

import jax
import jax.numpy as jnp


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Softmax attention; every query sees the keys at its own position and before.

    Args:
        queries: (batch, heads, tokens, head_dim).
        keys, values: (batch·kv_heads, capacity, head_dim), heads a multiple of kv_heads (GQA, Ainslie et al. 2023).
        positions: int32 (batch, tokens), the position of each query; key j has position j.

    Returns:
        (batch, heads, tokens, head_dim) in the queries' dtype; scores and softmax are float32.
    """
    batch, heads, tokens, width = queries.shape
    rows, capacity, _ = keys.shape
    # Heads of one group become rows of one matrix, so that each key is read once for all of them.
    grouped = queries.reshape(rows, -1, width)
    scores = jnp.einsum("nqd,nsd->nqs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, -1, tokens, capacity) * width**-0.5
    seen = jnp.arange(capacity) <= positions[:, None, :, None]
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype).reshape(rows, -1, capacity)
    mixed = jnp.einsum("nqs,nsd->nqd", weights, values, preferred_element_type=jnp.float32)
    return mixed.astype(queries.dtype).reshape(batch, heads, tokens, width)
