"""Flash attention, with XLA's implementation of it in the place of cuDNN's, which only a GPU has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsvd import attention
from jaxsvd.attention import attend, flash, has_flash
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.engine import Engine
from jaxsvd.kernels.xla import XLA
from jaxsvd.sampling import SamplingParams

BATCH, HEADS, KV_HEADS, WIDTH = 2, 6, 2, 16
ON_GPU = jax.default_backend() == "gpu"


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cudnn", marks=pytest.mark.skipif(not ON_GPU, reason="needs a GPU"))]
)
@pytest.mark.parametrize(("tokens", "capacity", "starts"), [(24, 24, [0, 0]), (8, 24, [16, 16]), (8, 32, [0, 11])])
def test_flash_is_the_same(tokens, capacity, starts, implementation, rng):
    """A prompt that fills the cache, one that goes on to its end, and rows that begin at different places."""
    dtype = jnp.float32 if implementation == "xla" else jnp.bfloat16
    queries = jnp.asarray(rng.standard_normal((BATCH, HEADS, tokens, WIDTH)), dtype)
    keys, values = (jnp.asarray(rng.standard_normal((BATCH * KV_HEADS, capacity, WIDTH)), dtype) for _ in range(2))
    positions = jnp.array(starts)[:, None] + jnp.arange(tokens)
    exact = attend(*(x.astype(jnp.float32) for x in (queries, keys, values)), positions)
    found = flash(queries, keys, values, positions, implementation)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, atol=1e-5 if dtype == jnp.float32 else 3e-2)


@jax.default_matmul_precision("highest")  # a GPU would round float32 to TF32
def test_prompts_go_through_it(tiny_llama, monkeypatch):
    """Prompts of two lengths, in one piece and in several, and single tokens, which do not."""
    prompts = [list(range(3, 40)), list(range(5, 16))]
    engine = Engine(Checkpoint(tiny_llama[0]).load(XLA("cpu"), jnp.float32), "16/auto")
    exact = engine.logits(prompts)
    calls = []

    def counted(*given):
        calls.append(given)
        return flash(*given, implementation="xla")

    monkeypatch.setattr(attention, "has_flash", lambda *_: True)
    monkeypatch.setattr(attention, "flash", counted)
    for lengths in ("16/auto", "64/auto"):
        calls.clear()
        found = Engine(engine.model, lengths)
        np.testing.assert_allclose(found.logits(prompts), exact, atol=1e-4)
        assert calls
        calls.clear()
        list(found.generate(prompts, [SamplingParams()] * 2, 3))
        assert all(queries.shape[2] > 1 for queries, *_ in calls)


def test_who_has_flash():
    assert not has_flash(jnp.dtype(jnp.float32), 128)
    assert has_flash(jnp.dtype(jnp.bfloat16), 128) == ON_GPU
