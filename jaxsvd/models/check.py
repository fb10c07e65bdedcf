"""Whether a kernel that runs a whole model can be trusted with it."""

import logging

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsvd.cache import KVCache, empty_cache
from jaxsvd.errors import JaxsvdError
from jaxsvd.models.llama import Llama

logger = logging.getLogger("jaxsvd")

CAPACITY = 128  # of the cache
# As a relative error: kernel and XLA both round to bfloat16 in every layer, which comes to some 1e-2 over a deep model.
TOLERANCE = 0.1


def check(model: Llama) -> None:
    """Compare the backend's kernel for a step, where it has one, with XLA on the second of two tokens.

    Kernels that silently return zeros have shipped in this field. Raises JaxsvdError where the two disagree.
    """
    if model.fused is None:
        return
    if obstacle := model.obstacle(CAPACITY):
        logger.warning("XLA decodes, not the kernel for all layers: %s", obstacle)
        return
    graph, state = nnx.split(model)

    @jax.jit
    def both(state: nnx.State, tokens: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        model = nnx.merge(graph, state)
        cache = empty_cache(model.config, 1, CAPACITY, model.embed_tokens.weight.dtype)
        expected, known = model(tokens, cache, jnp.zeros((1,), jnp.int32))
        # What is behind the first token is taken away, so that the kernel has to write it.
        keys, values = ([cached.at[:, 1:].set(0) for cached in kind] for kind in (known.keys, known.values))
        actual, cache = model(tokens[:, 1:], KVCache(keys, values, known.lengths), jnp.ones((1,), jnp.int32))
        return _seen(actual[:, 0], cache), _seen(expected[:, 1], known)

    pairs = zip(*both(state, jnp.arange(2)[None]), strict=True)
    errors = [jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected) for actual, expected in pairs]
    error = float(jnp.max(jnp.array(errors)))  # unlike Python's, it is not a number where one of them is not
    if not error < TOLERANCE:
        name = model.layers[0].self_attn.o.backend.name
        raise JaxsvdError(
            f"the kernel of backend {name} and XLA differ by {error:.2g} of this model's last hidden state, or of what "
            f"is in the cache, expected less than {TOLERANCE}: use backend xla"
        )


def _seen(hidden: jax.Array, cache: KVCache) -> list[jax.Array]:
    """What is compared: the hidden state of the second token, and its keys and values in all layers; float32."""
    kinds = (jnp.stack([cached[:, 1] for cached in kind]) for kind in (cache.keys, cache.values))
    return [array.astype(jnp.float32) for array in (hidden, *kinds)]
