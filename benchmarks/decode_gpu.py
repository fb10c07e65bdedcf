"""Decode on an accelerator: a Qwen3-4B of random weights, dense and low-rank, through the engine, beside the floor.

    python benchmarks/decode_gpu.py [--keep 0.8 0.5] [--batch 1 8] [--bandwidth 4.3e12] [--out FILE]

Times are ms per token over 128 tokens behind a prompt of 448: three runs, after one that compiles. JSON comes last.
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd import kernels
from jaxsvd.engine import Engine
from jaxsvd.models import build
from jaxsvd.named import CONFIGS
from jaxsvd.sampling import per_row
from jaxsvd.weights import RandomWeights, uniform_ranks

PROMPT, NEW = list(range(1, 449)), 128


class RepeatedWeights(RandomWeights):
    """Random values from one pool: drawing 4 billion would take longer than the measurement."""

    pool = np.random.default_rng(0).standard_normal(40_000_000, np.float32)

    def make(self, name, *shape):
        values = np.resize(self.pool, shape)
        scale = 1.0 if len(shape) == 1 else shape["embed" in name] ** -0.5
        return (values * scale).astype(self.dtype)


def milliseconds(engine: Engine, batch: int) -> float:
    blocks = engine.generate([PROMPT] * batch, per_row(batch), NEW + 1)
    next(blocks)
    start = time.perf_counter()
    for _ in blocks:
        pass
    return (time.perf_counter() - start) / NEW * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode a random Qwen3-4B on an accelerator.")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.5])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes per second, for the floor")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for keep in [None, *args.keep]:
        ranks = uniform_ranks(keep, 128) if keep else None
        model = build(CONFIGS["qwen3-4b"], RepeatedWeights(jnp.bfloat16, ranks), kernels.choose())
        engine = Engine(model, steps_per_dispatch=16)
        for batch in args.batch:
            times = [milliseconds(engine, batch) for _ in range(4)][1:]
            floor = engine.step_bytes(512 * batch) / args.bandwidth * 1e3
            rows.append({"keep": keep, "batch": batch, "ms": times, "floor_ms": floor})
            print(rows[-1], file=sys.stderr, flush=True)
        del model, engine  # the next one needs the memory
    result = {
        "what": "ms per token, Qwen3-4B shape, random bfloat16 weights, XLA backend",
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax")},
        "results": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
