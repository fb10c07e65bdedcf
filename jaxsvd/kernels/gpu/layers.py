"""One decoded token of each row through all layers of a model, in one persistent launch.

For a few rows a step is a chain of matrix-vector products, and its floor is the time to read the weights. What keeps a
chain of kernels from that floor is not bandwidth but the gaps: a launch, a first load, a ragged tail, some twenty times
a layer. Here the blocks stay, one on each multiprocessor. While one warpgroup streams the block's share of all weights
(`jaxsvd.kernels.gpu.stream`), another multiplies it with what a third brings; between two products that depend on each
other all blocks meet at a counter in global memory, and meanwhile the ring fills. Of up to eight rows they mostly do
not wait there for what they send each other to arrive, as its reader sees whether it has
(`jaxsvd.kernels.gpu.present`), and of sixteen not for q, k and v. Of several, pairs of blocks share what they bring,
and put together what they have of a head.

Sums, norms, RoPE and the residual stream are float32; what one product gives to the next is bfloat16, in attention too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import copies, present, ptx
from jaxsvd.kernels.gpu.attention import Attention
from jaxsvd.kernels.gpu.perlayer import PerLayer, table
from jaxsvd.kernels.gpu.products import Buffers, Products
from jaxsvd.kernels.gpu.shape import ROWS, SLOTS, SPAN, LayerShape, aligned, height, ring, splits, used
from jaxsvd.kernels.gpu.stream import PAIR, Stream, squares

# Of a thread that multiplies, and of those that copy: no more in all than 3·168, with which three warpgroups begin.
# More would be waited for without an end.
REGISTERS, OTHERS = 232, 136


def _sent(x: jax.Array, gain: jax.Array, rows: int, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first three of `Buffers` before the first layer, whose first norm has weights `gain`."""
    batch, hidden = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, rows - batch), (0, 0)))
    normed = lax.bitcast_convert_type((x * gain.astype(jnp.float32)).astype(jnp.bfloat16), jnp.int16)
    behind = present.nothing((rows, 2 * room + SPAN - hidden), jnp.bfloat16)
    vectors = jnp.concatenate([normed, behind], axis=1)
    # One part has all the squares of a row, in the place of its tiles.
    parts = jnp.sum(x * x, axis=1, keepdims=True) * (jnp.arange(hidden // ROWS) == 0)
    tiles = jnp.stack([lax.bitcast_convert_type(parts, jnp.int32), *[present.nothing(parts.shape, jnp.float32)] * 3], 1)
    tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, squares(hidden) - tiles.shape[-1]))).reshape(rows, -1)
    tiles = jnp.pad(tiles, ((0, 0), (0, 128)))  # the counter of those that have met, and as much as loads are wide
    return x, lax.bitcast_convert_type(vectors, jnp.bfloat16), lax.bitcast_convert_type(tiles, jnp.float32)


def _complete(shape: LayerShape, arrays: Sequence[jax.Array]) -> Iterator[jax.Array]:
    """The arrays of a layer, any one, which is not read, in the place of the V of a matrix that is dense there."""
    left = iter(arrays)
    for group in shape.groups:
        first = next(left)
        yield first
        for i in group.low_rank:
            yield next(left) if group.ranks[i] else first


@cache
def make_layers(
    shapes: tuple[LayerShape, ...], batch: int, blocks: int, interpret: Any = None, alone: str | None = None
) -> Callable[..., jax.Array]:
    """The kernel for layers of these shapes, which differ in ranks only, on a GPU with `blocks` multiprocessors.

    `interpret` (`plgpu.InterpretGPUParams`) runs it in Pallas' interpreter, with one block. The kernel takes

    - x (batch, hidden), each row's token's vector, and the positions (batch,) int32 that they have;
    - cosines and sines of RoPE at the positions, float32 (batch, head_dim/2);
    - the weights of the two norms (layers, hidden), and of those of the heads of q and k (layers, head_dim), if any;
    - the weights of the four groups of each layer in bfloat16, (outputs, inputs) each: the first product's, then each
      V;
    - keys and values, each a list of references to the bfloat16 (batch·kv_heads, capacity, head_dim) of a layer, which
      get the new tokens: see `LayerShape.obstacle`,

    and returns x behind the last layer, float32 (batch, hidden).

    To be timed, one group of all layers can be `alone`, "o", "gate_up" or "down": what is returned then means nothing.
    """
    all_shapes = aligned(shapes)
    assert all_shapes is not None
    shape, layers = all_shapes[0], len(shapes)
    hidden, rows = shape.qkv.inputs, height(batch)
    counts = shape.matrices
    nothing = [[None] * count for count in counts], (None, None), Buffers(*[None] * 3), None
    sizes = Products(shape, 0, layers, *nothing, rows, alone=alone)
    room = sizes.size
    pairs = [] if batch == 1 or interpret else [2]
    blocks = used(blocks, batch)
    handed = shape.handed(batch, blocks)
    # Whether the cache of a head is in parts that others than a pair of blocks put together.
    parted = splits(batch * shape.kv_heads) > 1 and handed is None
    between = 0 if alone else 1 + parted  # meetings of attention
    meetings = len(sizes.phases) + between  # of a layer
    matrices = sum(counts)  # of a layer
    slots = SLOTS if interpret else ring(shape, layers, batch, blocks)
    ranks = None if len(set(shapes)) == 1 else np.array([one.ranks for one in all_shapes], np.int32)

    def body(*refs: Any) -> None:
        take = iter(refs)
        positions, *angles = (next(take) for _ in range(3))
        norms = [next(take) for _ in range(2)]
        head_norms = [next(take) for _ in range(2 if shape.head_norms else 0)]
        ranked = None if ranks is None else next(take)
        weights = [[next(take) for _ in range(layers)] for _ in range(matrices)]
        caches = [[next(take) for _ in range(layers)] for _ in range(2)]
        buffers = Buffers(*(next(take) for _ in range(3)))
        parts = [next(take) for _ in range(3)]
        addresses = None if interpret else next(take)
        sums, warps = next(take)
        of_pair = [next(take) for _ in Attention.pair_scratch(handed)]
        counter = buffers.squares.at[0, pl.ds(4 * squares(hidden), 1)]
        block = lax.axis_index("block")
        for size in pairs:
            block = block * size + lax.axis_index(PAIR)
        stream = Stream(block, blocks, batch, slots, [sums, *take], bool(interpret))

        def of(layer: jax.Array) -> Products:
            """A layer's products."""
            arrays = (PerLayer(refs, layer, addresses, i * layers) for i, refs in enumerate(weights))
            groups = [list(islice(arrays, count)) for count in counts]
            given = shape if ranked is None else shape.of([ranked[layer, i] for i in range(len(shape.ranks))])
            return Products(given, layer, layers, groups, norms, buffers, stream, rows, room, alone)

        def attention_of(layer: jax.Array, products: Products) -> Attention:
            cached = [PerLayer(refs, layer, addresses, i * layers) for i, refs in enumerate(caches, matrices)]
            return Attention(
                *(shape, layer, block, blocks, batch, positions, angles, head_norms, cached),
                *(buffers.vectors, products.heads, products.mixed),
                *(parts, warps, of_pair),
            )

        def meet(layer: jax.Array, met: int) -> None:
            """Wait for the end of the `met`-th meeting of a layer, or before 0 of the layer before."""
            if not interpret:
                ptx.meet(counter, (layer * meetings + met) * blocks, fenced[met])

        def announce(met: int) -> None:
            """Come to the `met`-th meeting of a layer."""
            if not interpret:
                ptx.announce(counter, fenced[met])

        turns = [stream.turns(phase) for phase in sizes.phases]
        # Whether each meeting of a layer, and the first of the next one, waits for what was stored. Attention looks at
        # q, k and v by itself, but not at its parts.
        fenced = [not stream.loose] * len(sizes.phases)
        fenced[len(sizes.before) : len(sizes.before)] = [False, True][:between]
        fenced.append(fenced[0])

        def turn(layer: jax.Array, number: int) -> jax.Array:
            """The number of the first turn of what is held in a phase of a layer."""
            return layer * sum(turns) + sum(turns[:number])

        def met_before(number: int) -> int:
            """The number of the meeting before a phase."""
            return number + between * (number >= len(sizes.before))

        def run(layer: jax.Array, count: jax.Array) -> jax.Array:
            products = of(layer)
            attention, phases = attention_of(layer, products), products.phases
            for number, (phase, deal) in enumerate(zip(phases, stream.deal(phases), strict=True)):
                if between and number == len(products.before):
                    meet(layer, number)
                    count = attention.attend(stream, count)
                    announce(number + 1)
                    if parted:
                        meet(layer, number + 1)
                        attention.combine()
                        announce(number + 2)
                stream.leave()
                count = stream.multiply(turn(layer, number), count, phase, deal)
                announce(met_before(number) + 1)
            return count

        def hold(layer: jax.Array, _: None) -> None:
            products = of(layer)
            for number, phase in enumerate(products.phases):
                stream.hold(turn(layer, number), phase, partial(meet, layer, met_before(number)))
                if between and number == len(products.before) and not interpret:
                    # The layer before has been left by all, and this one's attention too.
                    products.clear(block, blocks)
                    ptx.fence()

        def fill(layer: jax.Array, count: jax.Array) -> jax.Array:
            products = of(layer)
            phases, before = products.phases, len(products.before)
            deals = stream.deal(phases)
            count = stream.fill(count, phases[:before], deals[:before])
            count = attention_of(layer, products).fill(stream, count) if between else count
            return stream.fill(count, phases[before:], deals[before:])

        def limit(registers: int, action: Any) -> None:
            if not interpret:
                plgpu.set_max_registers(registers, action=action)

        @pl.when(lax.axis_index("thread") == 0)
        def compute() -> None:
            limit(REGISTERS, "increase")
            stream.join()
            lax.fori_loop(0, layers, run, jnp.int32(0))
            stream.leave()

        @pl.when(lax.axis_index("thread") == 1)
        def bring() -> None:
            limit(OTHERS, "decrease")
            stream.join()
            lax.fori_loop(0, layers, hold, None)
            stream.clear()  # the other block of a pair may still be sent something

        @pl.when(lax.axis_index("thread") == 2)
        def copy() -> None:
            limit(OTHERS, "decrease")
            if addresses is not None:
                copies.publish(addresses, [ref for refs in (*weights, *caches) for ref in refs])
            for barrier in of_pair[1:]:
                ptx.prepare(barrier, 1)
            stream.open()
            stream.drain(lax.fori_loop(0, layers, fill, jnp.int32(0)))

    sums = Stream.sums_scratch(shape.held(batch), shape.swept(batch, blocks))
    tables = [] if interpret else [table(layers * (matrices + 2))]
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(size, jnp.float32) for size in Attention.partials(shape, batch)],
        scratch_types=[
            *tables,
            # In the same place: a block's warps meet before attention stores anything there, and before products do.
            plgpu.RefUnion(sums, Attention.scratch(shape)),
            *Attention.pair_scratch(handed),
            *Stream.scratch(slots, shape.held(batch), bool(interpret)),
        ],
        grid=(blocks // math.prod(pairs),),
        grid_names=("block",),
        cluster=tuple(pairs),
        cluster_names=(PAIR,) * len(pairs),
        num_threads=3,
        thread_name="thread",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            # Barriers are placed by hand: automatic ones, before every copy and load, would stop the stream.
            unsafe_no_auto_barriers=True,
            approx_math=True,
            reduction_scratch_bytes=0,  # each warp adds up by itself
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )

    def call(
        x: jax.Array,
        positions: jax.Array,
        cosines: jax.Array,
        sines: jax.Array,
        norms: Sequence[jax.Array],
        arrays: Sequence[Sequence[jax.Array]],
        keys: Sequence[Any],
        values: Sequence[Any],
    ) -> jax.Array:
        """See `make_layers`."""
        before, behind, *head_norms = norms
        sent = _sent(x, before[0], rows, room)
        if alone:  # nobody sends what it reads
            sent = tuple(jnp.nan_to_num(each, nan=1.0) for each in sent)
        residual, *others = map(jax.new_ref, sent)
        complete = [_complete(one, given) for one, given in zip(all_shapes, arrays, strict=True)]
        weights = [array for one in zip(*complete, strict=True) for array in one]
        ranked = [] if ranks is None else [jnp.asarray(ranks)]
        vectors = positions, cosines, sines, before, behind, *head_norms, *ranked
        kernel(*vectors, *weights, *keys, *values, residual, *others)
        if alone:  # it may write nothing else
            return others[0][...][:batch, :hidden]
        return residual[...][:batch]

    return call
