"""The engine's graphs, lowered for Neuron without its plugin, hold nothing that neuronx-cc or its runtime refuses."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import (
    BATCH,
    BUCKET,
    CAPACITY,
    GREEDY,
    MODES,
    PLATFORM,
    SHAPES,
    abstract_engine,
    cache_of,
    lint,
    lint_text,
    sampler_and_seen,
    shaped,
    trace_decode,
    trace_prefill,
)
from jax import lax

# The linter finds what it should.


def _print(x):
    jax.debug.print("{}", x)
    return x


def _callback(x):
    return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
HALF = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
INDEX = jax.ShapeDtypeStruct((3,), jnp.int32)
COUNT = jax.ShapeDtypeStruct((), jnp.int32)
BAD = {
    "cond": ("branch", lambda x: lax.cond(x[0, 0] > 0, lambda y: y, lambda y: -y, x), X),
    "switch": ("branch", lambda x, n: lax.switch(n, [jnp.sin, jnp.cos, jnp.tan], x), X, COUNT),
    "argmax": ("variadic reduce", lambda x: jnp.argmax(x, -1), X),
    "while on data": ("dynamic loop", lambda x: lax.while_loop(lambda y: y[0, 0] < 3, lambda y: y + 1, x), X),
    "while on a scalar": ("dynamic loop", lambda n: lax.while_loop(lambda y: y < 30, lambda y: y * 2, n), COUNT),
    "counter from outside": ("dynamic loop", lambda n: lax.while_loop(lambda y: y < 30, lambda y: y + 1, n), COUNT),
    "dynamic fori": ("dynamic loop", lambda x, n: lax.fori_loop(0, n, lambda i, y: y + i, x), X, COUNT),
    "pure_callback": ("callback", _callback, X),
    "debug.print": ("callback", _print, X),
    "dropping scatter": ("scatter", lambda x, i: x.at[i].set(1.0, mode="drop"), X, INDEX),
    "scatter": ("scatter", lambda x, i: x.at[i].add(1.0, mode="clip"), X, INDEX),
    "filling gather": ("gather mode", lambda x, i: x.at[i].get(mode="fill", fill_value=0), X, INDEX),
    "default gather": ("gather mode", lambda x, i: jnp.take(x, i, axis=0), X, INDEX),
    "unsafe gather": ("gather mode", lambda x, i: x.at[i].get(mode="promise_in_bounds"), X, INDEX),
    "gather in a scan": (
        "gather mode",
        lambda x, i: lax.scan(lambda c, j: (c, jnp.take(x, j, axis=0)), 0, i),
        X,
        INDEX,
    ),
    "top_k": ("top-k", lambda x: lax.top_k(x, 2), X),
    "argsort": ("variadic sort", lambda x: jnp.argsort(x), X),
    "fft": ("complex", jnp.fft.fft, X),
    "bf16 sum": ("accumulation", lambda x: x @ x, HALF),
    "bf16 batched sum": ("accumulation", lambda x: jnp.einsum("bi,bi->b", x, x), HALF),
    "svd": ("does not lower", jnp.linalg.svd, X),
    "eigh": ("does not lower", jnp.linalg.eigh, jax.ShapeDtypeStruct((8, 8), jnp.float32)),
    "philox": (
        "rng algorithm",
        lambda key: lax.rng_bit_generator(key, (8,), algorithm=lax.RandomAlgorithm.RNG_PHILOX),
        jax.ShapeDtypeStruct((4,), jnp.uint32),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_linter_flags(name):
    rule, function, *args = BAD[name]
    assert rule in [finding.rule for finding in lint(jax.jit(function).trace(*args))]


@pytest.mark.parametrize(("rule", "dtype"), [("64-bit tensor", np.int64), ("64-bit tensor", np.uint64), ("f64", float)])
def test_the_linter_flags_64_bits(rule, dtype):
    with jax.enable_x64(True):
        found = lint(jax.jit(lambda x: x + x).trace(jax.ShapeDtypeStruct((4, 8), dtype)))
    assert {finding.rule for finding in found} == {rule}


def test_the_linter_flags_custom_calls_but_not_shardings():
    def line(target):
        return f"%0 = stablehlo.custom_call @{target}(%arg0) : (tensor<4xf32>) -> tensor<4xf32>"

    assert lint_text(line("Sharding")) == []
    assert [finding.rule for finding in lint_text(line("TopK"))] == ["custom call"]
    assert lint_text(line("TopK"), allowed=["TopK"]) == []
    assert [finding.rule for finding in lint_text(line("TopKV2"), allowed=["TopK"])] == ["custom call"]


GOOD = {
    "scan": (lambda x: lax.scan(lambda c, row: (c + row, c), x[0], x), X),
    "fori": (lambda x: lax.fori_loop(0, 7, lambda i, y: y + i, x), X),
    "nested loops": (lambda x: lax.fori_loop(0, 3, lambda i, y: lax.fori_loop(0, 4, lambda j, z: z + j, y), x), X),
    "max": (lambda x: jnp.max(x, -1), X),
    "sort": (lambda x: jnp.sort(x), X),
    "clipped gather": (lambda x, i: x.at[i].get(mode="clip"), X, INDEX),
    "slices": (lambda x, n: lax.dynamic_update_slice(x, lax.dynamic_slice(x, (n, 0), (1, 8)), (0, 0)), X, COUNT),
    "float32 dot": (lambda x: x @ x.T, X),
    "float32 sums of bf16": (lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32), HALF),
    "rbg": (lambda key: jax.random.normal(jax.random.wrap_key_data(key, impl="rbg"), (5,)), jnp.zeros(4, np.uint32)),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_linter_lets_pass(name):
    function, *args = GOOD[name]
    assert lint(jax.jit(function).trace(*args)) == []


# The engine's steps.


@pytest.fixture(scope="module", params=SHAPES)
def engine(request):
    """The widths of a real model, two of its layers."""
    return abstract_engine(dataclasses.replace(SHAPES[request.param], num_layers=2))


@pytest.mark.parametrize("output", ["last", "every", "hidden"])
def test_prefill(engine, output):
    assert lint(trace_prefill(engine, output)) == []


@pytest.mark.parametrize("output", ["last", "every", "hidden"])
def test_extend(engine, output):
    step = jax.jit(partial(engine.extend, output=output), donate_argnums=(3,))
    args = shaped((BATCH, BUCKET)), shaped((BATCH,)), cache_of(engine, CAPACITY), shaped(())
    assert lint(step.trace(engine.leaves, *args)) == []


@pytest.mark.parametrize("batch", [1, BATCH])
def test_score_tokens(engine, batch):
    hidden = shaped((batch, BUCKET, engine.config.hidden_size), engine.dtype)
    traced = jax.jit(engine.score_tokens).trace(engine.leaves, hidden, shaped((batch, BUCKET)))
    assert lint(traced) == []
    # One row's logits live at a time.
    vocab = engine.config.vocab_size
    assert not re.search(rf"tensor<{BATCH}x{BUCKET}x{vocab}x", traced.lower(lowering_platforms=(PLATFORM,)).as_text())


def test_grow(engine):
    assert lint(jax.jit(partial(engine.grow, capacity=CAPACITY)).trace(cache_of(engine, BUCKET).keys[0])) == []


@pytest.mark.parametrize("mode", MODES)
def test_first(engine, mode):
    sampler, seen = sampler_and_seen(engine, MODES[mode])
    logits = shaped((BATCH, engine.config.vocab_size), np.float32)
    step = jax.jit(partial(engine.first, mode=MODES[mode]), donate_argnums=(3,))
    assert lint(step.trace(logits, sampler, shaped((BATCH,)), seen)) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (4, 2)])
def test_decode(engine, mode, steps, batch):
    assert lint(trace_decode(engine, MODES[mode], steps, batch)) == []


@pytest.mark.parametrize("keep", [0.8, None])
@pytest.mark.parametrize("name", SHAPES)
def test_decode_at_full_depth(name, keep):
    engine = abstract_engine(SHAPES[name], keep)
    assert lint(trace_decode(engine, MODES["all"])) == []


def test_random_numbers_are_drawn_by_the_bit_generator_alone(engine):
    text = trace_decode(engine, MODES["all"]).lower(lowering_platforms=(PLATFORM,)).as_text()
    assert "stablehlo.rng_bit_generator" in text
    assert "rng_bit_generator" not in trace_decode(engine, GREEDY).lower(lowering_platforms=(PLATFORM,)).as_text()


def test_the_cache_is_donated(engine):
    text = trace_decode(engine, MODES["all"]).lower(lowering_platforms=(PLATFORM,)).as_text()
    main = next(line for line in text.splitlines() if "func.func public @main" in line)
    shape = "x".join(map(str, cache_of(engine, CAPACITY).keys[0].shape))
    donated = re.findall(rf"tensor<{shape}xbf16> {{[^}}]*(?:tf.aliasing_output|jax.buffer_donor)", main)
    assert len(donated) == 2 * engine.config.num_layers
