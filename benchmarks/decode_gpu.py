"""Decode on a GPU alone: models of random weights, through the engine's own steps, beside the floor.

    python benchmarks/decode_gpu.py [--cases 0 4 ...] [--bandwidth 4.3e12] [--out FILE]

A step is run from a cache that is said to hold so many tokens, so nothing else is compiled: `scripts/bench.py --random`
measures prefill and whole texts too. Times are ms per token over 128 tokens in dispatches of 8, which follow each other
as in the engine: the median of five, after one. Prefill is that of one prompt. A JSON line per case.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd.bench import launches
from jaxsvd.bench.contenders import random
from jaxsvd.bench.machine import bandwidth, description
from jaxsvd.cache import KVCache
from jaxsvd.engine import Engine
from jaxsvd.sampling import SamplingParams, mode_of, sampler_of

# (model, keep, backend): (rows, tokens in the cache, its capacity) of each decode, and prompts to prefill.
CASES = [
    (("qwen3-4b", 0.8, "gpu"), [(1, 512, 1024), (1, 8192, 8704), (8, 512, 1024)], [2048, 8192]),
    (("qwen3-4b", 0.8, "xla"), [(1, 512, 1024), (8, 512, 1024)], []),
    (("qwen3-4b", None, "gpu"), [(1, 512, 1024), (8, 512, 1024)], [2048]),
    (("qwen3-4b", None, "xla"), [(1, 512, 1024), (8, 512, 1024)], []),
    (("qwen3-4b", 0.5, "gpu"), [(1, 512, 1024)], []),
    (("llama-3.2-1b", 0.8, "gpu"), [(1, 512, 1024)], []),
    (("llama-2-7b", 0.5, "gpu"), [(1, 512, 1024), (8, 512, 1024)], []),
]
DISPATCHES, RUNS = 16, 6


def decode(engine: Engine, batch: int, cached: int, capacity: int) -> Callable[[], dict]:
    """Compile such a step, to be timed by what this returns."""
    rows = [SamplingParams()] * batch
    sampler, mode = sampler_of(rows), mode_of(rows)

    def start() -> tuple[KVCache, jax.Array]:
        cache = engine.empty_cache(batch, capacity)
        lengths = jnp.full((batch,), cached, jnp.int32)
        return jax.block_until_ready((KVCache(cache.keys, cache.values, lengths), jnp.zeros((batch,), jnp.int32)))

    step = engine.compile(engine._decode_call(*start(), None, sampler, mode))

    def measure() -> dict:
        times = []
        for _ in range(RUNS):
            cache, token = start()
            begin = time.perf_counter()
            for _ in range(DISPATCHES):
                _, cache, token, _ = step(engine.leaves, cache, token, None, sampler)
            jax.block_until_ready(token)
            times.append(1e3 * (time.perf_counter() - begin) / DISPATCHES / engine.steps_per_dispatch)
        started = launches.count(step.as_text())
        return {
            "batch": batch,
            "cached": cached,
            "ms": times[1:],
            "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
            "launches": started and started / engine.steps_per_dispatch,
        }

    return measure


def prefill(engine: Engine, tokens: int) -> Callable[[], dict]:
    """The same of a prompt."""
    call = engine._prefill_call(np.ones((1, tokens), np.int32), np.array([tokens], np.int32), "last")
    step = engine.compile(call)

    def measure() -> dict:
        times = []
        for _ in range(RUNS):
            begin = time.perf_counter()
            jax.block_until_ready(step(*call.args))
            times.append(1e3 * (time.perf_counter() - begin))
        return {"prompt": tokens, "ms": times[1:], "temporary_bytes": step.memory_analysis().temp_size_in_bytes}

    return measure


def run(case: tuple, rate: float) -> Iterator[dict]:
    """Measure a case; its memory is free when all are taken."""
    (model, keep, backend), decodes, prompts = case
    made = random("model", model, keep, 128, backend)
    engine = made.engine
    kind = {"model": model, "keep": keep, "backend": backend, "load_seconds": made.load_seconds}
    floors = [{"floor_ms": 1e3 * engine.step_bytes(cached * batch) / rate} for batch, cached, _ in decodes]
    jobs = [*(partial(decode, engine, *one) for one in decodes), *(partial(prefill, engine, one) for one in prompts)]
    with ThreadPoolExecutor() as pool:  # they compile side by side
        measures = list(pool.map(lambda job: job(), jobs))
    for measure, floor in zip(measures, [*floors, *({} for _ in prompts)], strict=True):
        yield kind | measure() | floor


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode random models on a GPU.")
    parser.add_argument("--bandwidth", type=float, help="bytes per second, for the floor (default: the device's)")
    parser.add_argument("--out", type=Path)
    numbers = range(len(CASES))
    parser.add_argument("--cases", type=int, nargs="+", choices=numbers, default=numbers, help="some of CASES only")
    args = parser.parse_args()
    rate = args.bandwidth or 1e9 * bandwidth().rate
    found = {
        "what": "ms, random bfloat16 weights; floor: bytes of weights and cache that a step must read / bandwidth",
        **description(),
        "bandwidth": rate,
        "results": [],
    }
    for number in args.cases:
        for row in run(CASES[number], rate):
            found["results"].append(row)
            print(json.dumps(row | {"ms": round(statistics.median(row["ms"]), 3)}), flush=True)
            if args.out:  # what there is, should the machine be taken away
                args.out.write_text(json.dumps(found, indent=1) + "\n")
        gc.collect()  # the next one needs the memory


if __name__ == "__main__":
    main()
