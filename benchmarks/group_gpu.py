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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from jaxsvd import kernels
from jaxsvd.bench.contenders import config_of, ranks_of
from jaxsvd.bench.machine import bandwidth, description
from jaxsvd.cache import empty_cache
from jaxsvd.config import ModelConfig
from jaxsvd.kernels.gpu import layer_shapes
from jaxsvd.kernels.gpu.layers import make_layers
from jaxsvd.kernels.gpu.shape import LayerShape
from jaxsvd.models import build
from jaxsvd.weights import AbstractWeights

GROUPS = {"gate_up": 2, "down": 3}  # of a layer's groups which
ROUNDS, LAUNCHES = 8, 20

Arrays = list[list[list[jax.Array]]]  # of each group of each layer


def model_of(config: ModelConfig, keep: float) -> tuple[list[LayerShape], Arrays]:
    """Its layers, of random weights."""
    weights = AbstractWeights(jnp.bfloat16, ranks_of(config, keep, 128))
    heads, plans = build(config, weights, kernels.choose("gpu"))._form
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = iter(jax.random.split(jax.random.key(0), sum(len(plan.array_shapes) for layer in plans for plan in layer)))
    arrays = [[[draw(next(keys), shape, jnp.bfloat16) for shape in plan.array_shapes] for plan in one] for one in plans]
    return layer_shapes(heads, plans), arrays


def prepare(
    config: ModelConfig, shapes: Sequence[LayerShape], arrays: Arrays, group: str, rows: int
) -> Callable[[], list[float]]:
    """Compile a group of all layers, to be timed by what this returns: seconds of each of some rounds."""
    kernel = make_layers(tuple(shapes), rows, jax.local_devices()[0].core_count, alone=group)
    layers, width, cache = len(shapes), config.head_dim, empty_cache(config, rows, 128, jnp.bfloat16)
    widths = [config.hidden_size] * 2 + [width] * 2 * shapes[0].head_norms

    def run(x: jax.Array, arrays: Arrays, norms: list, keys: list, values: list) -> jax.Array:
        caches = [list(map(jax.new_ref, kind)) for kind in (keys, values)]
        angles = jnp.ones((2, rows, width // 2), jnp.float32)
        flat = [[array for group in layer for array in group] for layer in arrays]

        def launch(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return kernel(x, jnp.zeros((rows,), jnp.int32), *angles, norms, flat, *caches).astype(x.dtype), None

        return lax.scan(launch, x, length=LAUNCHES)[0]  # the host is out of it

    x, norms = jnp.ones((rows, widths[0]), jnp.bfloat16), [jnp.ones((layers, size), jnp.bfloat16) for size in widths]
    given = x, arrays, norms, cache.keys, cache.values
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
    config = config_of(args.model)
    shapes, arrays = model_of(config, args.keep)
    cases = [(group, rows) for group in GROUPS for rows in args.rows]
    with ThreadPoolExecutor() as pool:  # they compile side by side
        measures = list(pool.map(lambda case: prepare(config, shapes, arrays, *case), cases))
    found = {"what": "µs per layer", **description(), "bandwidth": rate, "model": args.model, "keep": args.keep}
    found["results"] = []
    for (group, rows), measure in zip(cases, measures, strict=True):
        times = [1e6 * seconds / len(shapes) for seconds in measure()]
        read = sum(array.nbytes for layer in arrays for array in layer[GROUPS[group]]) / len(shapes)
        median, floor = statistics.median(times), 1e6 * read / rate
        row = {"group": group, "rows": rows, "us": times, "floor_us": floor, "share": floor / median}
        found["results"].append(row)
        print(json.dumps(row | {"us": round(median, 2)}), flush=True)
        if args.out:  # what there is, should the machine be taken away
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
