"""One decoded token through one transformer layer, in one persistent launch: an experiment (docs/performance.md).

No part of jaxsvd uses it. Unrolled, as it was measured, it was right on one H200 and slower than what XLA makes of the
layer; with products as loops, as it is here, it has run in Pallas' interpreter only. It wants jax 0.11.

At batch 1 a layer is a chain of matrix-vector products, and its floor is the time to read its weights. What keeps a
chain of kernels from that floor is not bandwidth but the gaps: a launch, a first load, a ragged tail, some twenty times
a layer. Here the blocks stay. In each of them one warpgroup streams the block's share of *all* the layer's weights
through rings in shared memory, in the order of their use and as far ahead as there is room, while others multiply.
Between two products that depend on each other all blocks meet at a barrier in global memory; meanwhile the rings fill.

Weights lie (outputs, inputs), as for XLA, so that a tile of rows is a run of memory. A thread owns the same four of
every 512 inputs; the xs of a phase lie in shared memory, so that the products are short loops. Sums, norms, RoPE,
softmax and the residual are float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from attention import SPLITS, Heads
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from shape import Group, LayerShape
from stream import BLOCK, CHUNK, ROWS, SCRATCH, SLOTS, SUMS, WIDE, Phase, Stream, Streamed, Vector, X, load, slots


def write(target: Vector, residual: Vector | None, row: jax.Array, sums: list[jax.Array]) -> None:
    """Store a tile's only sum, with the residual where there is one."""
    y = sums[0]
    if residual is not None:
        y = y + load(residual.rows(row), SUMS)
    target.rows(row)[...] = y


def group_phases(
    group: Group,
    weights: Sequence[Any],
    x: X,
    strip: Any,
    outputs: Sequence[Any],
    residual: Vector | None = None,
) -> tuple[list[Phase], list[Vector]]:
    """The phases of a group, and where its members' outputs are then.

    One product serves the group: the U of low-rank members, the whole of dense ones; then each V. `strip` is the buffer
    for the first, `outputs` those of the second, one for each low-rank member.
    """
    first, *second = weights
    starts = [sum(group.widths[:i]) for i in range(len(group.widths))]
    only = residual if group.ranks == (None,) else None  # a lone dense member is done after the first product
    target = Vector(outputs[0]) if group.ranks == (None,) else Vector(strip)
    phases = [Phase([x], [(sum(group.widths), [Streamed(first, 0, group.inputs)], partial(write, target, only))])]
    vectors, tiles, reads = [], [], []
    for start, rank, width in zip(starts, group.ranks, group.outputs, strict=True):
        if rank is None:
            vectors.append(Vector(target.ref, start))
            continue
        j = len(tiles)
        vectors.append(Vector(outputs[j]))
        reads.append(X(Vector(strip, start), rank))
        tiles.append((width, [Streamed(second[j], 0, rank, j)], partial(write, vectors[-1], residual)))
    if tiles:
        phases.append(Phase(reads, tiles))
    return phases, vectors


def gated_phases(group: Group, weights: Sequence[Any], x: X, strip: Any, target: Vector) -> list[Phase]:
    """The phases of gate and up, which leave silu(gate(x))·up(x) in `target`."""
    first, *second = weights
    starts = (0, group.widths[0])
    width = group.outputs[0]
    if group.ranks == (None, None):

        def store_both(row: jax.Array, sums: list[jax.Array]) -> None:
            target.rows(row)[...] = gate(*sums)

        members = [Streamed(first, start, group.inputs) for start in starts]
        return [Phase([x], [(width, members, store_both)])]
    strips = [Vector(strip, start) for start in starts]
    low_rank = [j for j, rank in enumerate(group.ranks) if rank is not None]
    members = [Streamed(second[i], 0, group.ranks[j] or 0, i) for i, j in enumerate(low_rank)]

    def store(row: jax.Array, sums: list[jax.Array]) -> None:
        given = iter(sums)
        pair = [next(given) if j in low_rank else load(strips[j].rows(row), SUMS) for j in range(2)]
        target.rows(row)[...] = gate(*pair)

    whole = [Streamed(first, 0, group.inputs)]
    return [
        Phase([x], [(sum(group.widths), whole, partial(write, Vector(strip), None))]),
        Phase([X(strips[j], group.ranks[j] or 0) for j in low_rank], [(width, members, store)]),
    ]


def gate(g: jax.Array, u: jax.Array) -> jax.Array:
    """silu(g)·u."""
    return g / (1.0 + jnp.exp(-g)) * u


def make_layer(shape: LayerShape, blocks: int, workers: int = 2, interpret: Any = None) -> Callable[..., Any]:
    """The kernel of a layer.

    It takes x float32 (hidden,), the position () int32, cosines and sines float32 (head_dim/2,), the two norms'
    weights (hidden,), those of the heads' norms (head_dim,) or nothing, the arrays of the four groups (outputs,
    inputs), and references to the layer's cache (kv_heads, capacity, head_dim), which it appends to. It returns x.
    """
    hidden, width = shape.qkv.inputs, shape.heads * shape.head_dim
    groups = (shape.qkv, shape.o, shape.gate_up, shape.down)
    counts = [1 + sum(rank is not None for rank in group.ranks) for group in groups]
    second = [
        [outputs for outputs, rank in zip(group.outputs, group.ranks, strict=True) if rank is not None]
        for group in groups
    ]

    sizes = [[group.inputs] for group in groups] + [[rank or 0 for rank in group.ranks] for group in groups]
    held = max(sum(slots(size) for size in phase) for phase in sizes) * WIDE * 8  # rows of the xs of a phase

    def body(*refs: Any) -> None:
        take = iter(refs)
        x, position, cosines, sines, before, after = (next(take) for _ in range(6))
        norms = [next(take) for _ in range(2 if shape.head_norms else 0)]
        weights = [[next(take) for _ in range(count)] for count in counts]
        keys, values = next(take), next(take)
        out, middle, mixed, inner, parts, tops, totals = (next(take) for _ in range(7))
        strips = [next(take) for _ in groups]
        projected = [next(take) for _ in second[0]]
        scratch = list(take)
        meeting = pl.get_global(plgpu.SemaphoreType.REGULAR((sum(counts) + 3,)))  # one set for all blocks
        block, thread = lax.axis_index("block"), lax.axis_index("thread")
        stream = Stream(block, blocks, workers, scratch)
        start = Vector(x)

        qkv, heads = group_phases(shape.qkv, weights[0], X(start, hidden, before, shape.eps), strips[0], projected)
        o, _ = group_phases(shape.o, weights[1], X(Vector(mixed), width), strips[1], [middle], start)
        gate_up = gated_phases(
            shape.gate_up, weights[2], X(Vector(middle), hidden, after, shape.eps), strips[2], Vector(inner)
        )
        down, _ = group_phases(
            shape.down, weights[3], X(Vector(inner), shape.down.inputs), strips[3], [out], Vector(middle)
        )
        phases = [*qkv, *o, *gate_up, *down]

        def work(worker: int) -> None:
            met = iter(range(len(phases) + 1))

            def meet() -> None:
                """Every warpgroup of the grid sees what all have stored before."""
                number = next(met)
                stream.together()
                if blocks > 1:
                    if worker == 0:
                        plgpu.semaphore_signal(meeting.at[number], 1, memory_scope="gpu")
                    plgpu.semaphore_wait(meeting.at[number], blocks, decrement=False, memory_scope="gpu")

            def between(number: int) -> None:
                if number == len(phases):
                    return
                meet()
                if number == len(qkv):
                    unit, units = block + worker * blocks, blocks * workers
                    caches = keys, values
                    attention = Heads(
                        shape, unit, units, position[0], cosines, sines, norms, *caches, parts, tops, totals
                    )
                    attention.attend(*heads)
                    meet()
                    attention.combine(Vector(mixed))
                    meet()

            @pl.when(thread == worker)
            def compute() -> None:
                stream.multiply(worker, phases, between)

        def apart(_: Any) -> None:
            work(1)

        # Each worker's sums want a place of their own, which is what lies behind the open allocations.
        if workers == 2:
            pl.run_scoped(apart, plgpu.SMEM((SCRATCH // 4,), jnp.float32), collective_axes="thread")
        work(0)

        @pl.when(thread == workers)
        def copy() -> None:
            stream.fill(phases)

    def buffer(size: int) -> jax.ShapeDtypeStruct:
        # Chunks are read whole.
        return jax.ShapeDtypeStruct((-(-size // BLOCK) + 8, BLOCK), jnp.float32)

    out = [
        *(buffer(size) for size in (hidden, hidden, width, shape.down.inputs)),
        jax.ShapeDtypeStruct((shape.heads, SPLITS, shape.head_dim), jnp.float32),
        *(jax.ShapeDtypeStruct((shape.heads, SPLITS), jnp.float32) for _ in range(2)),
        *(buffer(sum(group.widths)) for group in groups),
        *(buffer(size) for size in second[0]),
    ]
    scratch = [
        plgpu.SMEM((SLOTS, ROWS, WIDE * 8, BLOCK), jnp.bfloat16),
        plgpu.SMEM((held, BLOCK), jnp.float32),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=workers),
    ]
    run = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="thread",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            # Barriers are placed by hand: automatic ones, before every copy and load, would stop the stream.
            unsafe_no_auto_barriers=True,
            approx_math=True,
            reduction_scratch_bytes=SCRATCH,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )

    def call(x: jax.Array, position: jax.Array, cosines: jax.Array, sines: jax.Array, *rest: Any) -> jax.Array:
        """See `make_layer`; x comes and goes as (hidden/64 + 8, 64)."""
        before, after, *rest = rest
        norms = rest[: 2 if shape.head_norms else 0]
        weights, caches = rest[len(norms) : -2], rest[-2:]
        return run(
            x,
            position.reshape(1),
            cosines,
            sines,
            *(jnp.pad(weight, (0, -hidden % CHUNK)).reshape(-1, BLOCK) for weight in (before, after)),
            *norms,
            *(weight.reshape(weight.shape[0], -1, BLOCK) for weight in weights),
            *caches,
        )[0]

    return call
