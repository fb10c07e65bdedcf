"""The experiment of docs/performance.md: a layer as one launch, on an NVIDIA GPU of compute capability 9.

    python benchmarks/gpu_layer/run.py check            # against plain jax.numpy in float32
    python benchmarks/gpu_layer/run.py time             # 36 layers of Qwen3-4B at keep 0.8, and what the time goes into

It wants jax 0.11. `check --interpret` runs small layers in Pallas' interpreter, on a CPU; with two workers that needs
more threads than two cores give (NPROC=8).
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel import make_layer
from shape import Group, LayerShape
from stream import BLOCK

QWEN3_4B = LayerShape(
    *(32, 8, 128, 1e-6, True),
    Group(2560, (4096, 1024, 1024), (1280, 640, 640)),
    Group(4096, (2560,), (1280,)),
    Group(2560, (9728, 9728), (1664, 1664)),
    Group(9728, (2560,), (1664,)),
)
# Hardly any weights: what is left is the latency of eleven meetings and of attention.
LATENCY = LayerShape(
    *(4, 2, 128, 1e-6, True),
    Group(512, (512, 256, 256), (64, 64, 64)),
    Group(512, (512,), (64,)),
    Group(512, (512, 512), (64, 64)),
    Group(512, (512,), (64,)),
)
# Ragged widths, dense members among low-rank ones, heads without norms.
SMALL = [
    LayerShape(
        *(4, 2, 128, 1e-6, True),
        Group(1088, (512, 256, 256), (128, 64, None)),
        Group(512, (1088,), (192,)),
        Group(1088, (640, 640), (192, None)),
        Group(640, (1088,), (None,)),
    ),
    LayerShape(
        *(4, 2, 64, 1e-5, False),
        Group(1088, (256, 128, 128), (None, None, None)),
        Group(256, (1088,), (None,)),
        Group(1088, (640, 640), (None, None)),
        Group(640, (1088,), (128,)),
    ),
]


def shapes(shape, capacity):
    """What the kernel takes, but x and the position: angles, norms, weights; and the cache."""
    vectors = [(shape.head_dim // 2, jnp.float32)] * 2 + [(shape.qkv.inputs, jnp.bfloat16)] * 2
    vectors += [(shape.head_dim, jnp.bfloat16)] * (2 if shape.head_norms else 0)
    given = [jax.ShapeDtypeStruct((size,), dtype) for size, dtype in vectors]
    for group in (shape.qkv, shape.o, shape.gate_up, shape.down):
        sizes = [(sum(group.widths), group.inputs)]
        sizes += [(outputs, rank) for outputs, rank in zip(group.outputs, group.ranks, strict=True) if rank]
        given += [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    cache = jax.ShapeDtypeStruct((shape.kv_heads, capacity, shape.head_dim), jnp.bfloat16)
    return given, [cache, cache]


@partial(jax.jit, static_argnums=1)
def draw(key, sizes):
    """Normal values, of variance 1/inputs where it is a matrix."""
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(key, size, jnp.float32) * (size[-1] ** -0.5 if len(size) == 2 else 1)).astype(dtype)
        for key, (size, dtype) in zip(keys, sizes, strict=True)
    ]


def random(shape, capacity, seed):
    given, caches = shapes(shape, capacity)
    sizes = tuple((array.shape, array.dtype) for array in (*given, *caches))
    *arrays, keys, values = draw(jax.random.key(seed, impl="rbg"), sizes)
    return arrays, keys, values


def run(layer, keys, values, x, position, *arrays):
    """The layer, with its cache as arrays."""
    keys, values = jax.new_ref(keys), jax.new_ref(values)
    y = layer(x, position, *arrays, keys, values)
    return y, keys[...], values[...]


def reference(shape, x, position, arrays, keys, values):
    """The same in plain jax.numpy, float32."""
    take = iter([array.astype(jnp.float32) for array in arrays])
    cosines, sines, before, after = (next(take) for _ in range(4))
    norms = [next(take) for _ in range(2)] if shape.head_norms else None

    def norm(x, gain):
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + shape.eps) * gain

    def project(group, x):
        strip, outputs, start = next(take) @ x, [], 0
        for width, rank in zip(group.widths, group.ranks, strict=True):
            part = strip[start : start + width]
            outputs.append(next(take) @ part if rank else part)
            start += width
        return outputs

    def rotate(heads):
        low, high = jnp.split(heads, 2, axis=1)
        return jnp.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=1)

    q, k, v = (part.reshape(-1, shape.head_dim) for part in project(shape.qkv, norm(x, before)))
    if norms:
        q, k = norm(q, norms[0]), norm(k, norms[1])
    seen = [
        cache.astype(jnp.float32)[:, : position + 1].at[:, position].set(new)
        for cache, new in ((keys, rotate(k)), (values, v))
    ]
    grouped = rotate(q).reshape(shape.kv_heads, -1, shape.head_dim)
    scores = jnp.einsum("hqd,hsd->hqs", grouped, seen[0]) * shape.head_dim**-0.5
    x = x + project(shape.o, jnp.einsum("hqs,hsd->hqd", jax.nn.softmax(scores), seen[1]).ravel())[0]
    gate, up = project(shape.gate_up, norm(x, after))
    return x + project(shape.down, jax.nn.silu(gate) * up)[0]


def check(args):
    interpret = plgpu.InterpretGPUParams() if args.interpret else None
    cases = [(shape, 128, position) for shape, position in zip(SMALL, (50, 0), strict=True)]
    if not interpret:
        cases += [(QWEN3_4B, 1024, 511), (QWEN3_4B, 1024, 700)]
    with jax.default_matmul_precision("highest"):
        for seed, (shape, capacity, position) in enumerate(cases):
            arrays, keys, values = random(shape, capacity, seed)
            x = jax.random.normal(jax.random.key(9), (shape.qkv.inputs,), jnp.float32)
            layer = make_layer(shape, 1 if interpret else args.blocks, args.workers, interpret)
            padded = jnp.pad(x, (0, 8 * BLOCK)).reshape(-1, BLOCK)
            compiled = partial(run, layer) if interpret else jax.jit(partial(run, layer))
            y, *_ = compiled(keys, values, padded, jnp.int32(position), *arrays)
            expected = reference(shape, x, position, arrays, keys, values)
            error = jnp.linalg.norm(y.ravel()[: x.size] - expected) / jnp.linalg.norm(expected)
            print(f"{shape.qkv.inputs} wide, token {position}: relative error {error:.2e}", flush=True)
            if not error < 1e-5:
                raise SystemExit(1)


def measure(args):
    for name, shape in (("Qwen3-4B, keep 0.8", QWEN3_4B), ("hardly any weights", LATENCY)):
        layers, steps = 36, 8
        weights = [random(shape, args.capacity, seed)[0] for seed in range(layers)]
        size = (shape.kv_heads, args.capacity, shape.head_dim)
        caches = [jnp.zeros(size, jnp.bfloat16) for _ in range(2 * layers)]
        layer = jax.jit(partial(run, make_layer(shape, args.blocks, args.workers)))

        def decode(weights, caches, x, layer=layer, steps=steps):
            def step(carry, _):
                x, caches, position = carry
                made = []
                for i, arrays in enumerate(weights):
                    x, *cache = layer(caches[2 * i], caches[2 * i + 1], x, position, *arrays)
                    made += cache
                return (x * 0.01, made, position + 1), None

            return lax.scan(step, (x, caches, jnp.int32(args.position)), length=steps)[0][:2]

        x = jnp.ones((shape.qkv.inputs // BLOCK + 8, BLOCK), jnp.float32)
        compiled = jax.jit(decode, donate_argnums=1).lower(weights, caches, x).compile()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            x, caches = jax.block_until_ready(compiled(weights, caches, x))
            times.append(1e3 * (time.perf_counter() - start) / steps)
        floor = sum(array.nbytes for arrays in weights for array in arrays) / 4.3e9
        found = {"what": name, "layers": layers, "ms": statistics.median(times[1:]), "floor_ms": floor}
        print(json.dumps(found | {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--blocks", type=int, default=132, help="of the grid: all must be resident at once (132)")
    parser.add_argument(
        "--workers", type=int, default=2, choices=[1, 2], help="warpgroups of a block that multiply (2)"
    )
    parser.add_argument("--capacity", type=int, default=1024, help="tokens of the cache (1024)")
    parser.add_argument("--position", type=int, default=512, help="tokens in it (512)")
    parser.add_argument("--interpret", action="store_true", help="in Pallas' interpreter")
    args = parser.parse_args()
    check(args) if args.what == "check" else measure(args)


if __name__ == "__main__":
    main()
