"""A fused group alone on a GPU: gate and up, or down, of every layer of a model, one after the other in one launch.

    python benchmarks/group_gpu.py [--model qwen3-4b] [--keep 0.8] [--rows 1 2 4 8 16] [--out FILE]

This is the decode kernel with nothing but that group in it: the same meetings, stores and shares of the blocks. Weights
are random and each layer's own, so that they come from memory, and a layer begins when all blocks have ended the one
before. Times are µs per layer, the median of some rounds; floor: bytes of the group's weights / bandwidth. A JSON line
for each group and number of rows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from jaxsvd.bench.contenders import random
from jaxsvd.bench.machine import bandwidth, description
from jaxsvd.engine import Engine
from jaxsvd.kernels.gpu import layer_shapes
from jaxsvd.kernels.gpu.layers import make_layers

GROUPS = {"gate_up": 2, "down": 3}  # of a layer's groups which
ROUNDS, LAUNCHES = 8, 20


def prepare(engine: Engine, group: str, rows: int) -> Callable[[], list[float]]:
    """Compile a group of all layers, to be timed by what this returns: seconds of each of some rounds."""
    model, config, cache = engine.model, engine.model.config, engine.empty_cache(rows, 128)
    shapes = tuple(layer_shapes(*model._form))
    kernel = make_layers(shapes, rows, jax.local_devices()[0].core_count, alone=group)

    def run(x: jax.Array, arrays: list, norms: list, keys: list, values: list) -> jax.Array:
        caches = [list(map(jax.new_ref, kind)) for kind in (keys, values)]
        angles = jnp.ones((2, rows, config.head_dim // 2), jnp.float32)

        def launch(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return kernel(x, jnp.zeros((rows,), jnp.int32), *angles, norms, arrays, *caches).astype(x.dtype), None

        return lax.scan(launch, x, length=LAUNCHES)[0]  # the host is out of it

    x = jnp.ones((rows, config.hidden_size), jnp.bfloat16)
    arrays = [[array for part in layer.groups for array in part.values] for layer in model.layers]
    given = x, arrays, model.norms, cache.keys, cache.values
    step = jax.jit(run).lower(*given).compile()

    def measure() -> list[float]:
        times = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            jax.block_until_ready(step(*given))
            times.append((time.perf_counter() - begin) / LAUNCHES)
        return times[1:]

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one group of projections on a GPU.")
    parser.add_argument("--model", default="qwen3-4b")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--bandwidth", type=float, help="bytes per second, for the floor (default: the device's)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rate = args.bandwidth or 1e9 * bandwidth().rate
    engine = random("model", args.model, args.keep, 128, "gpu").engine
    layers = engine.model.layers
    cases = [(group, rows) for group in GROUPS for rows in args.rows]
    with ThreadPoolExecutor() as pool:  # they compile side by side
        measures = list(pool.map(lambda case: prepare(engine, *case), cases))
    found = {"what": "µs per layer", **description(), "bandwidth": rate, "model": args.model, "keep": args.keep}
    found["results"] = []
    for (group, rows), measure in zip(cases, measures, strict=True):
        times = [1e6 * seconds / len(layers) for seconds in measure()]
        read = sum(array.nbytes for layer in layers for array in layer.groups[GROUPS[group]].values) / len(layers)
        median, floor = statistics.median(times), 1e6 * read / rate
        row = {"group": group, "rows": rows, "us": times, "floor_us": floor, "share": floor / median}
        found["results"].append(row)
        print(json.dumps(row | {"us": round(median, 2)}), flush=True)
        if args.out:  # what there is, should the machine be taken away
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
