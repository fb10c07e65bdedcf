"""Whether a kernel that runs a whole model can be trusted with it."""

import logging

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsvd.cache import empty_cache
from jaxsvd.errors import JaxsvdError
from jaxsvd.models.llama import Llama

logger = logging.getLogger("jaxsvd")

CAPACITY = 128  # of the cache
# As a relative error: kernel and XLA both round to bfloat16 in every layer, which comes to some 1e-2 over a deep model.
TOLERANCE = 0.1


def check(model: Llama) -> None:
    """Compare the backend's kernel for a step, where it has one, with XLA on two tokens, one after the other.

    Kernels that silently return zeros have shipped in this field. Raises JaxsvdError where the two disagree.
    """
    if model.fused is None:
        return
    if obstacle := model.obstacle(CAPACITY):
        logger.warning("XLA decodes, not the kernel for all layers: %s", obstacle)
        return
    graph, state = nnx.split(model)

    @jax.jit
    def both(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        cache = empty_cache(model.config, 1, CAPACITY, model.embed_tokens.weight.dtype)
        expected, _ = model(tokens, cache, jnp.zeros((1,), jnp.int32))
        _, cache = model(tokens[:, :1], cache, jnp.zeros((1,), jnp.int32))
        actual, _ = model(tokens[:, 1:], cache, jnp.ones((1,), jnp.int32))
        return actual[0, 0].astype(jnp.float32), expected[0, 1].astype(jnp.float32)

    actual, expected = both(state, jnp.arange(2)[None])
    error = float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))
    if not error < TOLERANCE:
        name = model.layers[0].self_attn.o.backend.name
        raise JaxsvdError(
            f"the kernel of backend {name} and XLA differ by {error:.2g} of this model's last hidden state, "
            f"expected less than {TOLERANCE}: use backend xla"
        )
