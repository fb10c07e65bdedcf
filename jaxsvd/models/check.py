"""Whether a kernel that runs a whole model can be trusted with it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsvd.cache import KVCache, empty_cache
from jaxsvd.errors import JaxsvdError
from jaxsvd.models.llama import Llama

CAPACITY = 128  # of the cache
LAST = 100  # the token that is compared, of the first row: of several rows a block attends to more than a tile
# As a relative error: kernel and XLA both round to bfloat16 in every layer, which comes to some 1e-2 over a deep model.
TOLERANCE = 0.1

_Known = tuple[jax.Array, list[jax.Array], list[jax.Array]]  # final hidden states of prompts, and what the cache has


def check(model: Llama) -> None:
    """Compare the backend's kernels for a step of one row and of several, where it has them, with XLA.

    What is compared is the last of some tokens, of which rows have different numbers. Kernels that silently return
    zeros have shipped in this field. Raises JaxsvdError where the two disagree.
    """
    fused = model.fused
    if fused is None or model.decoder(1, CAPACITY) is None:
        return
    # All but one of the rows that a kernel takes: what belongs to no row is there too.
    batches = [batch for batch in (max(1, size - 1) for size in fused.sizes) if not model.obstacle(batch, CAPACITY)]
    most, heads = batches[-1], model.config.num_kv_heads
    last = LAST - jnp.arange(most)  # of each row
    graph, state = nnx.split(model)
    tokens = (jnp.arange(LAST + 1) + 7 * jnp.arange(most)[:, None]) % model.config.vocab_size

    def prompts(state: nnx.State, tokens: jax.Array) -> _Known:
        cache = empty_cache(model.config, most, CAPACITY, model.embed_tokens.weight.dtype)
        hidden, cache = nnx.merge(graph, state)(tokens, cache, jnp.int32(0))  # of every row: one write for all
        return hidden, cache.keys, cache.values

    def step(batch: int, state: nnx.State, tokens: jax.Array, *known: Any) -> list[tuple[jax.Array, jax.Array]]:
        hidden, *caches = known
        start = last[:batch]
        keys, values = ([one[: batch * heads] for one in kind] for kind in caches)
        expected = jnp.take_along_axis(hidden[:batch], start[:, None, None], axis=1)[:, 0]
        wanted = _seen(expected, keys, values, jnp.repeat(start, heads))
        # What the last token and those behind it have put there is taken away: the kernel has to write it.
        before = (jnp.arange(CAPACITY) < jnp.repeat(start, heads)[:, None])[..., None]
        keys, values = ([one * before for one in kind] for kind in (keys, values))
        token = jnp.take_along_axis(tokens[:batch], start[:, None], axis=1)
        actual, cache = nnx.merge(graph, state)(token, KVCache(keys, values, start), start)
        return list(zip(_seen(actual[:, 0], cache.keys, cache.values, jnp.repeat(start, heads)), wanted, strict=True))

    def lowered(function: Callable, *given: Any) -> jax.stages.Lowered:
        # Nothing is timed here, and where layers differ in their ranks XLA would try hundreds of products in many ways.
        return jax.jit(function, compiler_options={"xla_gpu_autotune_level": 0}).lower(*given)

    # A kernel takes some seconds to compile. They are lowered one after the other, in a fixed order, as Mosaic puts a
    # counter into each: the cache on disk would not know them again.
    with ThreadPoolExecutor() as pool:
        first = lowered(prompts, state, tokens)
        compiling = [pool.submit(first.compile)]
        for batch in batches:
            compiling.append(pool.submit(lowered(partial(step, batch), state, tokens, *first.out_info).compile))
    bring, *steps = [one.result() for one in compiling]
    known = bring(state, tokens)
    pairs = [pair for run in steps for pair in run(state, tokens, *known)]
    norm = partial(jnp.linalg.norm, axis=1)
    errors = [norm(actual - expected) / norm(expected) for actual, expected in pairs]
    error = float(jnp.max(jnp.concatenate(errors)))  # unlike Python's, it is not a number where one of them is not
    if not error < TOLERANCE:
        name = model.layers[0].self_attn.o.backend.name
        raise JaxsvdError(
            f"the kernel of backend {name} and XLA differ by {error:.2g} of this model's last hidden state, or of what "
            f"is in the cache, expected less than {TOLERANCE}: use backend xla"
        )


def _seen(
    hidden: jax.Array, keys: Sequence[jax.Array], values: Sequence[jax.Array], last: jax.Array
) -> list[jax.Array]:
    """What is compared, of each row: its last token's hidden state, and its keys and values in all layers; float32.

    `last` are their places in the cache, of each head of keys of all rows.
    """
    kinds = (jnp.stack([cached[jnp.arange(last.size), last] for cached in kind], axis=1) for kind in (keys, values))
    return [array.astype(jnp.float32).reshape(len(hidden), -1) for array in (hidden, *kinds)]
