"""Decode on CPU, batch 1, float32: SmolLM2-135M dense and low-rank, transformers on torch, and the floor, in turns.

    python benchmarks/decode_cpu.py [--rounds 7] [--out benchmarks/results/decode_cpu.json]

The floor is the time of reading the dense model's bytes once with all cores. Low-rank models have the dense one's
shape with every matrix at that keep (the speed does not depend on the values). Times are medians over the rounds; each
round runs every contender once, so that a slow minute of the machine hits all of them. JSON is the last line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxsvd import api, kernels
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.demo import get_demo_model
from jaxsvd.engine import Engine
from jaxsvd.models import build
from jaxsvd.sampling import per_row
from jaxsvd.weights import RandomWeights, uniform_ranks

TOKENS = 48
PROMPT = list(range(100, 116))
CORES = len(os.sched_getaffinity(0))


def floor(nbytes: int) -> Callable[[], float]:
    array = np.ones(nbytes // 4, np.float32)
    parts, pool = np.array_split(array, CORES), ThreadPoolExecutor(CORES)

    def run() -> float:
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return time.perf_counter() - start

    return run


def decode(engine: Engine) -> Callable[[], float]:
    def run() -> float:
        blocks = engine.generate([PROMPT], per_row(1), TOKENS + 1)
        next(blocks)
        start = time.perf_counter()
        for _ in blocks:
            pass
        return (time.perf_counter() - start) / TOKENS

    return run


def torch_generate(folder: Path) -> Callable[[], float]:
    torch.set_num_threads(CORES)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
        return time.perf_counter() - start

    def run() -> float:
        tokens = TOKENS // 4  # it is slow; a token costs the same
        return (seconds(tokens + 1) - seconds(1)) / tokens

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode on CPU against torch and the floor.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = get_demo_model()
    checkpoint = Checkpoint(folder)
    backend = kernels.choose()
    dense = Engine(checkpoint.load(backend, jnp.float32), steps_per_dispatch=8)
    nbytes = dense.step_bytes(0)
    contenders = {"floor": floor(nbytes), "torch": torch_generate(folder), "dense": decode(dense)}
    for keep in (0.9, 0.8, 0.5):
        weights = RandomWeights(ranks=uniform_ranks(keep, 16))
        contenders[f"keep {keep}"] = decode(Engine(build(checkpoint.config, weights, backend), steps_per_dispatch=8))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, run in contenders.items():
            seconds = run()
            if turn:  # the first round compiles and warms up
                samples[name].append(seconds * 1e3)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    for name, times in samples.items():
        print(f"{name:9s} {medians[name]:7.1f} ms  ({min(times):.1f} to {max(times):.1f})", file=sys.stderr)
    ratios = {
        "torch / dense": medians["torch"] / medians["dense"],
        "dense / floor": medians["dense"] / medians["floor"],
        **{f"dense / {name}": medians["dense"] / medians[name] for name in medians if name.startswith("keep")},
    }
    for name, ratio in ratios.items():
        print(f"{name:16s} {ratio:.2f}", file=sys.stderr)
    result = {
        "what": "ms per token, batch 1, float32, SmolLM2-135M shape",
        "median_ms": medians,
        "samples_ms": samples,
        "ratios": ratios,
        "weight_bytes": nbytes,
        "machine": {"cpu": _cpu(), "cores": CORES, "python": platform.python_version()},
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers")},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "platform": jax.default_backend(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    api.use_compilation_cache()
    main()
