"""The engine's graphs, lowered for Neuron without its plugin, hold nothing that neuronx-cc or its runtime refuses."""

import dataclasses
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

from jaxsvd import kernels, models
from jaxsvd.cache import empty_cache
from jaxsvd.config import ModelConfig, Rope
from jaxsvd.engine import Engine
from jaxsvd.sampling import Mode, SamplingParams, sampler_of
from jaxsvd.weights import AbstractWeights, uniform_ranks

# The linter: what is known not to run on Neuron, found in the jaxpr and in the StableHLO.

PLATFORM = "neuron"
# jax.random's rbg carries its state as u64[2] between two bitcasts. Neuron takes the operation in that very form
# (aws-neuron-sdk issue 712), so this is the one 64-bit tensor that is allowed, and only there.
RNG_STATE = "tensor<2xui64>"
RNG_OPERATIONS = ("stablehlo.rng_bit_generator", "stablehlo.bitcast_convert")


class Finding(NamedTuple):
    rule: str
    where: str


def lint(traced):
    """Everything in a `jax.jit(f).trace(...)` that must not reach Neuron."""
    found = list(_lint_jaxpr(traced.jaxpr.jaxpr))
    try:
        text = traced.lower(lowering_platforms=(PLATFORM,)).as_text()
    except (NotImplementedError, ValueError) as error:
        return [*found, Finding("does not lower", str(error)[:200])]
    return found + lint_text(text)


def _lint_jaxpr(jaxpr):
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        # StableHLO clamps a gather's indices, so there `fill` is many operations and `promise_in_bounds` none.
        if name == "gather" and eqn.params["mode"] is not lax.GatherScatterMode.CLIP:
            yield Finding("gather mode", str(eqn.params["mode"]))
        if "callback" in name or name == "debug_print":
            yield Finding("callback", name)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _lint_jaxpr(getattr(value, "jaxpr", value))


def _is_jaxpr(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def lint_text(text):
    lines = text.splitlines()
    return [finding for i, line in enumerate(lines) for finding in _lint_line(line.strip(), lines, i)]


_FORBIDDEN = {
    "branch": r"stablehlo\.(case|if)\b",
    "scatter": r"stablehlo\.(select_and_)?scatter\b",
    "dynamic shape": r"stablehlo\.(?!dynamic_slice\b|dynamic_update_slice\b)(dynamic_\w+|real_dynamic_\w+)"
    r"|stablehlo\.(get|set)_dimension_size|tensor<\?|x\?x",
    "top-k": r"chlo\.top_k",
    "complex": r"complex<",
    "f64": r"[x<]f64>",
    "64-bit tensor": r"tensor<[\dx]*x(s|u)?i64>",
    "old rng": r"stablehlo\.rng\b(?!_)",
}
_DOT = re.compile(
    r"stablehlo\.dot(?:_general)?\b.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> tensor<(?:\d+x)*(\w+)>"
)


def _lint_line(line, lines, i):
    for rule, pattern in _FORBIDDEN.items():
        if re.search(pattern, line) and not (rule == "64-bit tensor" and _is_rng_state(line)):
            yield Finding(rule, line)
    if "custom_call" in line and not re.search(r"custom_call @(Sharding|SPMD\w+)\b", line):
        yield Finding("custom call", line)
    if "stablehlo.while" in line and (reason := _dynamic_trip_count(lines, i)):
        yield Finding("dynamic loop", f"{reason}: {line}")
    if "stablehlo.reduce(" in line and line.count("init:") != 1:
        yield Finding("variadic reduce", line)
    if (match := re.search(r'"?stablehlo\.(reduce|reduce_window|sort)"?\(([^)]*)\)', line)) and "init:" not in line:
        operands = match[2].count("%")
        if operands > (1 if match[1] == "sort" else 2):
            yield Finding(f"variadic {match[1]}", line)
    if (match := _DOT.search(line)) and match[3] != "f32" and {"bf16", "f16"} & set(match.groups()):
        yield Finding("accumulation", line)
    if "rng_bit_generator" in line and "algorithm = DEFAULT" not in line:
        yield Finding("rng algorithm", line)


def _is_rng_state(line):
    types = re.findall(r"tensor<[\dx]*x(?:s|u)?i64>", line)
    return set(types) == {RNG_STATE} and any(operation in line for operation in RNG_OPERATIONS)


def _dynamic_trip_count(lines, i):
    """Why the loop at line i is not `for counter = constant; counter < constant; counter += constant`, or None."""
    indent = re.match(r" *", lines[i])[0]
    condition = lines.index(f"{indent}cond {{", i)
    body = lines.index(f"{indent}}} do {{", condition)
    end = lines.index(f"{indent}}}", body)
    compare = [line.strip() for line in lines[condition + 1 : body]]
    match = len(compare) == 3 and re.fullmatch(
        r"%\w+ = stablehlo\.compare LT, (%\w+), (%\w+), SIGNED : \(tensor<i32>.*", compare[1]
    )
    if not match or not compare[0].startswith(f"{match[2]} = stablehlo.constant"):
        return "its condition compares no int32 counter with a constant"
    if not compare[2].startswith(f"stablehlo.return {compare[1].split()[0]} "):
        return "its condition returns something else than the comparison"
    carried = dict(re.findall(r"(%\w+) = (%\w+)", re.search(r"while\((.*)\) :", lines[i])[1]))
    if match[1] not in carried:
        return "its counter is not carried"
    before = "\n".join(lines[:i])
    if not re.search(rf"^ *{carried[match[1]]} = stablehlo\.constant", before, re.M):
        return "its counter starts at no constant"
    inside = "\n".join(lines[body:end])
    step = re.search(rf"(%\w+) = stablehlo\.add {match[1]}, (%\w+) : tensor<i32>", inside)
    if not step or not re.search(rf"^ *{step[2]} = stablehlo\.constant", inside, re.M):
        return "its counter grows by no constant"
    returned = re.findall(r"%[\w#]+", lines[end - 1])
    if returned[list(carried).index(match[1])] != step[1]:
        return "its counter is not the one returned"
    return None


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

LLAMA3 = Rope(500000.0, "llama3", factor=32.0)
SHAPES = {
    "qwen3-4b": ModelConfig("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 40960, 1e-6, Rope(1e6), tied=True),
    "llama-3.2-1b": ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, LLAMA3, tied=True),
}
GREEDY = Mode(random=False, penalties=False)
MODES = {"greedy": GREEDY, "random": Mode(random=True, penalties=False), "all": Mode(random=True, penalties=True)}
BATCH, BUCKET, CAPACITY = 2, 32, 256


def abstract_engine(config, keep=0.8):
    ranks = None if keep is None else uniform_ranks(keep, 128)
    backend = kernels.choose("xla", platform=PLATFORM)
    return Engine(models.build(config, AbstractWeights(jnp.bfloat16, ranks=ranks), backend))


@pytest.fixture(scope="module", params=SHAPES)
def engine(request):
    """The widths of a real model, two of its layers."""
    return abstract_engine(dataclasses.replace(SHAPES[request.param], num_layers=2))


def shaped(shape, dtype=np.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def cache_of(engine, capacity, batch=BATCH):
    return jax.eval_shape(lambda: empty_cache(engine.config, batch, capacity, engine.dtype))


def sampler_and_seen(engine, mode, batch=BATCH):
    sampler = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), sampler_of([SamplingParams()] * batch))
    return sampler, shaped((batch, engine.config.vocab_size), np.uint8) if mode.penalties else None


def trace_decode(engine, mode, steps=4, batch=BATCH):
    sampler, seen = sampler_and_seen(engine, mode, batch)
    step = jax.jit(partial(engine.decode, steps=steps, mode=mode), donate_argnums=(1, 3))
    return step.trace(engine.leaves, cache_of(engine, CAPACITY, batch), shaped((batch,)), seen, sampler)


@pytest.mark.parametrize("output", ["last", "every", "hidden"])
def test_prefill(engine, output):
    step = jax.jit(partial(engine.prefill, output=output))
    assert lint(step.trace(engine.leaves, shaped((BATCH, BUCKET)), shaped((BATCH,)))) == []


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
    assert lint(jax.jit(partial(engine.grow, capacity=CAPACITY)).trace(cache_of(engine, BUCKET))) == []


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
