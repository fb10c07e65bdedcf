"""The engine's steps from shapes alone, and a linter of what JAX lowers them to for Neuron, without its plugin."""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxsvd import kernels, models
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
    """A broken rule, and the line."""

    rule: str
    where: str


def lint(traced, allowed=()):
    """Everything in a `jax.jit(f).trace(...)` that must not reach Neuron; custom calls of `allowed` targets may."""
    found = list(_lint_jaxpr(traced.jaxpr.jaxpr))
    try:
        text = traced.lower(lowering_platforms=(PLATFORM,)).as_text()
    except (NotImplementedError, ValueError) as error:
        return [*found, Finding("does not lower", str(error)[:200])]
    return found + lint_text(text, allowed)


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


def lint_text(text, allowed=()):
    """What `lint` finds in StableHLO."""
    lines = text.splitlines()
    return [finding for i, line in enumerate(lines) for finding in _lint_line(line.strip(), lines, i, allowed)]


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


def _lint_line(line, lines, i, allowed):
    for rule, pattern in _FORBIDDEN.items():
        if re.search(pattern, line) and not (rule == "64-bit tensor" and _is_rng_state(line)):
            yield Finding(rule, line)
    targets = "|".join(["Sharding", r"SPMD\w+", *allowed])
    if "custom_call" in line and not re.search(rf"custom_call @({targets})\(", line):
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


# The engine's steps, traced from shapes alone.

LLAMA3 = Rope(500000.0, "llama3", factor=32.0)
SHAPES = {
    "qwen3-4b": ModelConfig("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 40960, 1e-6, Rope(1e6), tied=True),
    "llama-3.2-1b": ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, LLAMA3, tied=True),
}
GREEDY = Mode(random=False, penalties=False)
MODES = {"greedy": GREEDY, "random": Mode(random=True, penalties=False), "all": Mode(random=True, penalties=True)}
BATCH, BUCKET, CAPACITY = 2, 32, 256


def abstract_engine(config, keep=0.8, backend=None):
    """An engine without weights, for Neuron; `keep` None is dense, and a function gives the ranks themselves."""
    ranks = uniform_ranks(keep, 128) if isinstance(keep, float) else keep
    chosen = backend or kernels.choose("xla", platform=PLATFORM)
    return Engine(models.build(config, AbstractWeights(jnp.bfloat16, ranks=ranks), chosen))


def shaped(shape, dtype=np.int32):
    """An array without values."""
    return jax.ShapeDtypeStruct(shape, dtype)


def cache_of(engine, capacity, batch=BATCH):
    """Its cache, without values."""
    return jax.eval_shape(lambda: engine.empty_cache(batch, capacity))


def sampler_and_seen(engine, mode, batch=BATCH):
    """What decoding in this mode is given, without values."""
    sampler = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), sampler_of([SamplingParams()] * batch))
    return sampler, shaped((batch, engine.config.vocab_size), np.uint8) if mode.penalties else None


def trace_decode(engine, mode, steps=4, batch=BATCH):
    """The decode step."""
    sampler, seen = sampler_and_seen(engine, mode, batch)
    step = jax.jit(partial(engine.decode, steps=steps, mode=mode), donate_argnums=(1, 3))
    return step.trace(engine.leaves, cache_of(engine, CAPACITY, batch), shaped((batch,)), seen, sampler)


def trace_prefill(engine, output="last", batch=BATCH, bucket=BUCKET):
    """The prefill step."""
    return jax.jit(partial(engine.prefill, output=output)).trace(
        engine.leaves, shaped((batch, bucket)), shaped((batch,))
    )
