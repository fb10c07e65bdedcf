"""One decoded token through all layers of a model, in one persistent launch.

At batch 1 a step is a chain of matrix-vector products, and its floor is the time to read the weights. What keeps a
chain of kernels from that floor is not bandwidth but the gaps: a launch, a first load, a ragged tail, some twenty times
a layer. Here the blocks stay, one on each multiprocessor. While one warpgroup streams the block's share of all weights
(`jaxsvd.kernels.gpu.stream`), the other multiplies; between two products that depend on each other all blocks meet at
a counter in global memory, and meanwhile the ring fills.

U and V need no such meeting where a block that has some ranks has them of both: then it adds what its ranks give to
all outputs, as the others do. Sums, norms, RoPE, softmax and the residual stream are float32; what products read is
bfloat16.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import accumulate, chain, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import ptx
from jaxsvd.kernels.gpu.attention import Attention
from jaxsvd.kernels.gpu.perlayer import PerLayer, load, table
from jaxsvd.kernels.gpu.shape import Group, LayerShape, aligned, ring, roomy, shares, whole
from jaxsvd.kernels.gpu.stream import SCRATCH, Member, Product, Stream, full, strided

NORMED = 512  # elements that a warpgroup reads at once: 16 bytes a thread
CLEARED = 512  # elements that a block clears at once
PIECE = 2048  # elements of gate and of up that are read at once


def normed(state: Any, gain: Any, width: int, eps: float) -> list[jax.Array]:
    """RMSNorm of the residual stream, the first elements of `state`, times a gain with room for whole NORMED ones."""
    size = whole(width, NORMED)
    x, gain = (load(ref.at[pl.ds(0, size)], strided(4)) for ref in (state, gain))
    x = within(x, width)
    scale = lax.rsqrt(jnp.sum(x * x) / width + eps)
    return [(x * scale * gain.astype(jnp.float32)).astype(jnp.bfloat16)]


def gated(state: Any, gate: int, up: int, width: int) -> list[jax.Array]:
    """silu(gate)·up of elements of `state`."""
    pieces = []
    for start in range(0, width, PIECE):
        size = min(PIECE, whole(width - start, NORMED))
        g, u = (load(state.at[pl.ds(place + start, size)], strided(4)) for place in (gate, up))
        pieces.append(within(g / (1.0 + jnp.exp(-g)) * u, width - start).astype(jnp.bfloat16))
    return pieces


def within(values: jax.Array, width: Any) -> jax.Array:
    """Zeros from `width` on."""
    if isinstance(width, int) and values.size <= width:
        return values
    inside = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=strided(4)) < width
    return jnp.where(inside, values, jnp.zeros((), values.dtype))


Read = Callable[[], Sequence[jax.Array]]


@dataclass(frozen=True)
class Share:
    """A block's share of the products of a layer. Results are added to elements of `state`."""

    block: jax.Array
    blocks: int
    state: Any

    def products(
        self, group: Group, arrays: Iterator[PerLayer], read: Read, places: Sequence[int], strips: Sequence[int]
    ) -> list[Product]:
        """Those of a group, whose arrays are the next ones.

        `places` are those of the members' results. By rows there are two, and `strips` are the places between them.
        """
        first, low_rank = next(arrays), group.low_rank
        seconds = dict(zip(low_rank, arrays, strict=False))
        between = dict(zip(low_rank, strips, strict=True)) if group.by_rows else {}
        members = []
        each = zip(group.starts, shares(group.widths, group.costs, self.block, self.blocks), places, strict=True)
        for i, (start, share, place) in enumerate(each):
            member = Member(first, group.inputs, start, *share, self.state, place)
            if i in between:
                member = replace(member, place=group.either(i, between[i], place))
            elif i in seconds:
                dense = group.ranks[i] == 0 if i in group.dense else False
                member = replace(member, second=seconds[i], outputs=group.outputs[i], dense=dense)
            members.append(member)
        if not between:
            return [Product(members, read)]
        behind, x = [], 0
        for i, share in zip(low_rank, shares(*group.seconds, self.block, self.blocks), strict=True):
            behind.append(Member(seconds[i], group.ranks[i], 0, *share, self.state, places[i], x))
            x += roomy(group.deepest[i])

        def strip(i: int) -> jax.Array:
            values = load(self.state.at[pl.ds(between[i], roomy(group.deepest[i]))], strided(4))
            return within(values, group.ranks[i]).astype(jnp.bfloat16)

        return [Product(members, read), Product(behind, lambda: [strip(i) for i in low_rank])]


def _complete(shape: LayerShape, arrays: Sequence[jax.Array]) -> Iterator[jax.Array]:
    """The arrays of a layer, any one, which is not read, in the place of the V of a matrix that is dense there."""
    left = iter(arrays)
    for group in shape.groups:
        first = next(left)
        yield first
        for i in group.low_rank:
            yield next(left) if group.ranks[i] else first


@cache
def make_layers(shapes: tuple[LayerShape, ...], blocks: int, interpret: Any = None) -> Callable[..., jax.Array]:
    """The kernel for layers of these shapes, which differ in ranks only, on a GPU with `blocks` multiprocessors.

    `interpret` (`plgpu.InterpretGPUParams`) runs it in Pallas' interpreter, with one block. The kernel takes

    - x (hidden,), the token's vector, and the position () int32 that it has;
    - cosines and sines of RoPE at the position, float32 (head_dim/2,);
    - the weights of the two norms (layers, hidden), and of those of the heads of q and k (layers, head_dim), if any;
    - the weights of the four groups of each layer in bfloat16: the first product's (outputs, inputs), then each V,
      (outputs, rank) where the group is divided `by_rows`, and else (rank, outputs);
    - keys and values, each a list of references to the bfloat16 (kv_heads, capacity, head_dim) of a layer, which get
      the new token: see `LayerShape.obstacle`,

    and returns x behind the last layer, float32 (hidden,).
    """
    all_shapes = aligned(shapes)
    assert all_shapes is not None
    shape, layers = all_shapes[0], len(shapes)
    hidden, inner = shape.qkv.inputs, shape.down.inputs
    counts = [1 + len(group.low_rank) for group in shape.groups]
    matrices = sum(counts)  # of a layer
    slots = ring(shape, layers)
    strip = max(one.strip(blocks) for one in all_shapes)
    ranks = None if len(set(shapes)) == 1 else np.array([one.ranks for one in all_shapes], np.int32)
    meetings = sum(2 if group.strips else 1 for group in shape.groups) + 2  # of a layer: attention has two of its own
    # The state: the residual stream, then what is added up anew in each layer.
    places = accumulate(
        (hidden, *shape.qkv.outputs, *shape.gate_up.outputs, *chain(*(group.strips for group in shape.groups)))
    )
    heads, (gate, up) = list(islice(places, 3)), islice(places, 2)
    strips = [list(islice(places, len(group.strips))) for group in shape.groups]
    end = next(places)

    def body(*refs: Any) -> None:
        take = iter(refs)
        position, *angles = (next(take) for _ in range(3))
        norms = [next(take) for _ in range(2)]
        head_norms = [next(take) for _ in range(2 if shape.head_norms else 0)]
        ranked = None if ranks is None else next(take)
        weights = [[next(take) for _ in range(layers)] for _ in range(matrices)]
        state, counter = (next(take) for _ in range(2))
        caches = [[next(take) for _ in range(layers)] for _ in range(2)]
        mixed, *partial = (next(take) for _ in range(4))
        tables = [None, None] if interpret else [next(take) for _ in range(2)]
        warps = [next(take) for _ in range(3)]
        block = lax.axis_index("block")
        stream = Stream(block, slots, list(take), bool(interpret))

        def of(layer: jax.Array) -> list[list[Product]]:
            """A layer's products: of q, k and v, of o, of gate and up, and of down."""
            arrays = (PerLayer(refs, layer, tables[0], i * layers) for i, refs in enumerate(weights))
            given = shape if ranked is None else shape.of([ranked[layer, i] for i in range(len(shape.ranks))])
            before, behind = (norm.at[layer] for norm in norms)
            share = Share(block, blocks, state)
            reads = (
                lambda: normed(state, before, hidden, shape.eps),
                lambda: [within(load(mixed.at[pl.ds(0, mixed.shape[0])], strided(4)), shape.o.inputs)],
                lambda: normed(state, behind, hidden, shape.eps),
                lambda: gated(state, gate, up, inner),
            )
            each = zip(given.groups, reads, (heads, [0], [gate, up], [0]), strips, strict=True)
            return [share.products(group, arrays, read, place, strip) for group, read, place, strip in each]

        def clear() -> None:
            """What is added up anew in each layer, when nobody reads it any more or adds to it yet."""
            start, size = block * CLEARED, CLEARED * blocks
            for at in range(hidden, end, size):

                @pl.when(at + start < end)
                def region(at: int = at) -> None:
                    state.at[pl.ds(at + start, CLEARED)][...] = full(0.0, (CLEARED,), strided(4))

        def run(layer: jax.Array, count: jax.Array) -> jax.Array:
            met = iter(range(meetings))

            def meet() -> None:
                if not interpret:
                    ptx.meet(counter, (layer * meetings + next(met) + 1) * blocks)

            before, *behind = of(layer)
            cached = [PerLayer(refs, layer, tables[1], i * layers) for i, refs in enumerate(caches)]
            attention = Attention(
                *(shape, layer, block, blocks, position[0], angles, head_norms, cached, state, heads, mixed),
                partial,
                warps,
                stream.together,
            )
            fetched = None
            for product in before:
                count = stream.multiply(count, product)
                if product is before[-1]:
                    fetched = attention.ahead(block)
                meet()
            attention.attend(fetched)
            meet()
            attention.combine()
            clear()
            meet()
            for product in chain(*behind):
                count = stream.multiply(count, product)
                meet()
            return count

        def fill(layer: jax.Array, count: jax.Array) -> jax.Array:
            return reduce(stream.fill, chain(*of(layer)), count)

        def publish(table: Any, arrays: Sequence[Sequence[Any]]) -> None:
            if table is not None:
                ptx.publish(table, [ref for refs in arrays for ref in refs])

        @pl.when(lax.axis_index("thread") == 0)
        def compute() -> None:
            publish(tables[1], caches)
            stream.join()
            lax.fori_loop(0, layers, run, jnp.int32(0))

        @pl.when(lax.axis_index("thread") == 1)
        def copy() -> None:
            publish(tables[0], weights)
            stream.open()
            stream.drain(lax.fori_loop(0, layers, fill, jnp.int32(0)))

    tables = [] if interpret else [table(layers * matrices), table(layers * 2)]
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((roomy(shape.o.inputs),), jnp.bfloat16),
            *(jax.ShapeDtypeStruct(size, jnp.float32) for size in Attention.partials(shape)),
        ],
        scratch_types=[*tables, *Attention.scratch(shape), *Stream.scratch(slots, shape.held, strip, bool(interpret))],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
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

    def call(
        x: jax.Array,
        position: jax.Array,
        cosines: jax.Array,
        sines: jax.Array,
        norms: Sequence[jax.Array],
        arrays: Sequence[Sequence[jax.Array]],
        keys: Sequence[Any],
        values: Sequence[Any],
    ) -> jax.Array:
        """See `make_layers`."""
        before, behind, *head_norms = norms
        if odd := whole(hidden, NORMED) - hidden:  # not where it need not be: it is done in every step
            before, behind = (jnp.pad(gain, ((0, 0), (0, odd))) for gain in (before, behind))
        state = jax.new_ref(jnp.pad(x.astype(jnp.float32), (0, whole(end, CLEARED) + NORMED - hidden)))
        counter = jax.new_ref(jnp.zeros((1,), jnp.int32))
        # A position behind the end is clamped, as XLA's dynamic slices are.
        position = jnp.minimum(position, keys[0].shape[1] - 1).reshape(1)
        complete = [_complete(one, given) for one, given in zip(all_shapes, arrays, strict=True)]
        weights = [array for one in zip(*complete, strict=True) for array in one]
        ranked = [] if ranks is None else [jnp.asarray(ranks)]
        vectors = position, cosines, sines, before, behind, *head_norms, *ranked
        kernel(*vectors, *weights, state, counter, *keys, *values)
        return state[...][:hidden]

    return call
