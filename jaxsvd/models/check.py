"""Whether a kernel that runs a whole model can be trusted with it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsvd.cache import KVCache, empty_cache
from jaxsvd.errors import JaxsvdError
from jaxsvd.models.llama import Llama

CAPACITY = 128  # of the cache
LAST = 40  # the token that is compared: one that attends to more than a block of the kernel does at once
# As a relative error: kernel and XLA both round to bfloat16 in every layer, which comes to some 1e-2 over a deep model.
TOLERANCE = 0.1


def check(model: Llama) -> None:
    """Compare the backend's kernels for a step of one row and of several, where it has them, with XLA.

    What is compared is the last of some tokens. Kernels that silently return zeros have shipped in this field. Raises
    JaxsvdError where the two disagree.
    """
    fused = model.fused
    if fused is None or model.decoder(1, CAPACITY) is None:
        return
    batches = [1] if fused.rows == 1 or model.obstacle(2, CAPACITY) else [1, 2]
    graph, state = nnx.split(model)

    # Nothing is timed here, and where layers differ in their ranks XLA would try hundreds of products in many ways.
    @partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
    def both(state: nnx.State, tokens: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        model, found, wanted = nnx.merge(graph, state), [], []
        most = tokens.shape[0]
        cache = empty_cache(model.config, most, CAPACITY, model.embed_tokens.weight.dtype)
        expected, known = model(tokens, cache, jnp.zeros((most,), jnp.int32))
        for batch in batches:
            heads = batch * model.config.num_kv_heads
            keys, values = ([one[:heads] for one in kind] for kind in (known.keys, known.values))
            wanted += _seen(expected[:batch, LAST], KVCache(keys, values, known.lengths))
            # What the last token has put there is taken away, so that the kernel has to write it.
            keys, values = ([one.at[:, LAST:].set(0) for one in kind] for kind in (keys, values))
            start = jnp.full((batch,), LAST, jnp.int32)
            actual, cache = model(tokens[:batch, LAST:], KVCache(keys, values, known.lengths), start)
            found += _seen(actual[:, 0], cache)
        return found, wanted

    tokens = (jnp.arange(LAST + 1) + 7 * jnp.arange(batches[-1])[:, None]) % model.config.vocab_size
    pairs = zip(*both(state, tokens), strict=True)
    errors = [jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected) for actual, expected in pairs]
    error = float(jnp.max(jnp.array(errors)))  # unlike Python's, it is not a number where one of them is not
    if not error < TOLERANCE:
        name = model.layers[0].self_attn.o.backend.name
        raise JaxsvdError(
            f"the kernel of backend {name} and XLA differ by {error:.2g} of this model's last hidden state, or of what "
            f"is in the cache, expected less than {TOLERANCE}: use backend xla"
        )


def _seen(hidden: jax.Array, cache: KVCache) -> list[jax.Array]:
    """What is compared: the hidden states of the last tokens, and their keys and values in all layers; float32."""
    kinds = (jnp.stack([cached[:, LAST] for cached in kind]) for kind in (cache.keys, cache.values))
    return [array.astype(jnp.float32) for array in (hidden, *kinds)]
