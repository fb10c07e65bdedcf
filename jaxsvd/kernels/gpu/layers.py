"""One decoded token of each row through all layers of a model, in one persistent launch.

For a few rows a step is a chain of matrix-vector products, and its floor is the time to read the weights. What keeps a
chain of kernels from that floor is not bandwidth but the gaps: a launch, a first load, a ragged tail, some twenty times
a layer. Here the blocks stay, one on each multiprocessor. While one warpgroup streams the block's share of all weights
(`jaxsvd.kernels.gpu.stream`), the other multiplies; between two products that depend on each other all blocks meet at
a counter in global memory, and meanwhile the ring fills.

Sums, norms, RoPE and the residual stream are float32; what one product gives to the next is bfloat16, in attention too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import ptx
from jaxsvd.kernels.gpu.attention import Attention, splits
from jaxsvd.kernels.gpu.perlayer import PerLayer, load, table
from jaxsvd.kernels.gpu.shape import (
    ROWS,
    SPAN,
    Group,
    LayerShape,
    aligned,
    height,
    ring,
    roomy,
    widest,
)
from jaxsvd.kernels.gpu.stream import SCRATCH, Norm, Phase, Stream, Streamed, Tiles, X, columns, squares, sums


def gate(g: jax.Array, u: jax.Array) -> jax.Array:
    """silu(g)·u."""
    return g / (1.0 + jnp.exp(-g)) * u


@dataclass(frozen=True)
class Buffers:
    """What the blocks tell each other by, in global memory, with a row each, or `height` of several."""

    residual: Any  # the residual stream, float32
    normed: Any  # the same times the weights of the next norm, bfloat16
    squares: Any  # see `stream.Norm`
    vectors: Any  # everything else, bfloat16
    unfinished: Any  # the sums of products that go in pieces, float32


@dataclass
class Products:
    """The products of a layer, in order: those `before` attention, and those `behind` it.

    Of the vectors, `size` elements, q, k and v are at `heads`, and what attention gives at `mixed`. Buffers, weights
    and norms may be None where only sizes are asked for.
    """

    shape: LayerShape  # of this layer
    layer: Any
    layers: int
    weights: Sequence[Sequence[Any]]
    norms: Sequence[Any]  # their weights, (layers, hidden) each
    buffers: Buffers
    height: int
    size: int = 0

    def __post_init__(self) -> None:
        shape, (qkv, o, gate_up, down) = self.shape, self.weights
        self.mixed, inner = self._take(shape.o.inputs), self._take(shape.down.inputs)
        self.before, self.heads = self._project(shape.qkv, qkv)
        self.behind = [
            *self._add(shape.o, o, self.mixed, 1, self.layer),
            *self._gate(shape.gate_up, gate_up, inner),
            *self._add(shape.down, down, inner, 0, self.layer + 1),
        ]

    @property
    def phases(self) -> list[Phase]:
        """All of them."""
        return [*self.before, *self.behind]

    @property
    def layout(self) -> Any:
        """Of the results of a tile."""
        return sums(self.height)

    def _take(self, width: int) -> int:
        start, self.size = self.size, self.size + width
        return start

    def _tiles(self, rows: int, members: Sequence[Streamed], start: int) -> Tiles:
        """Products whose results go to `vectors` from element `start` on."""

        def store(row: jax.Array, sums: list[jax.Array], _: Any) -> None:
            columns(self.buffers.vectors, start + row, ROWS)[...] = sums[0].astype(jnp.bfloat16)

        return Tiles(rows, members, store)

    @property
    def _normed(self) -> tuple[X, Norm]:
        """What the first product behind a norm reads."""
        width = self.shape.qkv.inputs
        return X(self.buffers.normed, 0, width, width), Norm(self.buffers.squares, width, self.shape.eps)

    def _pieces(self, x: X, tiles: Tiles, norm: Norm | None = None) -> list[Phase]:
        """The phases of a product: several if x is of several rows and too wide, of which each adds to the one before.

        A block has the same tiles in all of them, so what is unfinished is read by who has stored it.
        """
        step = widest(self.height)
        if x.width <= step:
            return [Phase([x], [tiles], norm)]
        members, phases = tiles.members, []

        def unfinished(row: jax.Array) -> list[Any]:
            return [columns(self.buffers.unfinished, member.row + row, ROWS) for member in members]

        for begin in range(0, x.width, step):
            end = min(begin + step, x.width)
            goes_on = end < x.width

            def early(row: jax.Array, begin: int = begin, goes_on: bool = goes_on) -> tuple[Any, Any]:
                before = [load(ref, self.layout) if begin else 0.0 for ref in unfinished(row)]
                return before, None if goes_on else tiles.early(row)

            def store(row: jax.Array, sums: list[jax.Array], early: tuple[Any, Any], goes_on: bool = goes_on) -> None:
                totals = [new + before for new, before in zip(sums, early[0], strict=True)]
                if not goes_on:
                    tiles.store(row, totals, early[1])
                    return
                for ref, total in zip(unfinished(row), totals, strict=True):
                    ref[...] = total

            piece = replace(x, start=x.start + begin, width=end - begin, most=end - begin)
            parts = [replace(member, begin=begin, end=end) for member in members]
            phases.append(Phase([piece], [Tiles(tiles.rows, parts, store, early)], norm, goes_on))
        return phases

    def _first(self, group: Group, weight: Any, x: X, norm: Norm | None = None) -> tuple[list[Phase], list[Any]]:
        """The product that serves a whole group, and where each member's result begins."""
        strip = self._take(sum(group.most))
        phases = self._pieces(x, self._tiles(sum(group.widths), [Streamed(weight, group.inputs)], strip), norm)
        return phases, [strip + start for start in group.starts]

    def _second(self, group: Group, weights: Sequence[Any], places: Sequence[Any]) -> tuple[list[X], list[Streamed]]:
        """The V of each low-rank member, and what they read, which lies at `places`."""
        members, at = [], 0
        for weight, i in zip(weights, group.low_rank, strict=True):
            members.append(Streamed(weight, group.ranks[i], 0, at))
            at += roomy(group.deepest[i])
        return [X(self.buffers.vectors, places[i], group.ranks[i], group.deepest[i]) for i in group.low_rank], members

    def _passed(self, group: Group, places: Sequence[Any], row: jax.Array) -> dict[int, jax.Array]:
        """What the first product gave of members that are dense, here or in other layers."""
        return {i: load(columns(self.buffers.vectors, places[i] + row, ROWS), self.layout) for i in group.dense}

    def _results(self, group: Group, sums: Sequence[jax.Array], passed: dict[int, jax.Array]) -> list[jax.Array]:
        """The result of each member: its sums, or what was passed on where it is dense."""
        passed = {i: part.astype(jnp.float32) for i, part in passed.items()}  # not before: it waits for the load
        given = passed | dict(zip(group.low_rank, sums, strict=True))
        for i in set(passed) & set(group.low_rank):
            numbers = plgpu.broadcasted_iota(jnp.int32, given[i].shape, 0, layout=self.layout)
            given[i] = jnp.where(numbers >= group.ranks[i], passed[i], given[i])  # all, or none
        return [given[i] for i in range(len(group.ranks))]

    def _project(self, group: Group, weights: Sequence[Any]) -> tuple[list[Phase], list[Any]]:
        """The phases of a group behind a norm, and where each member's result begins."""
        phases, places = self._first(group, weights[0], *self._normed)
        strips, members = self._second(group, weights[1:], places)
        tiles = []
        for i, member in zip(group.low_rank, members, strict=True):
            result = self._take(group.outputs[i])
            tiles.append(self._tiles(group.unless_dense(i, group.outputs[i], 0), [member], result))
            places[i] = group.unless_dense(i, result, places[i])
        return [*phases, *([Phase(strips, tiles)] if tiles else [])], places

    def _add(self, group: Group, weights: Sequence[Any], source: int, norm: int, layer: Any) -> list[Phase]:
        """The phases of a lone matrix, whose result is added to the residual stream.

        Which norm follows, and in which layer. What depends on it is for nothing behind the last layer.
        """
        several, buffers = self.height > 1, self.buffers

        def held(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            place = jnp.minimum(layer, self.layers - 1), pl.ds(row, ROWS)
            gain = load(self.norms[norm].at[place], self.layout.reduce((0,)) if several else self.layout)
            return load(columns(buffers.residual, row, ROWS), self.layout), gain

        def add(row: jax.Array, more: jax.Array, held: tuple[jax.Array, jax.Array]) -> None:
            total, gain = held[0] + more, held[1].astype(jnp.float32)
            if several:
                gain = plgpu.layout_cast(lax.broadcast_in_dim(gain, total.shape, (1,)), self.layout)
            columns(buffers.residual, row, ROWS)[...] = total
            columns(buffers.normed, row, ROWS)[...] = (total * gain).astype(jnp.bfloat16)
            square, tile = jnp.sum(total * total, axis=-1), lax.div(row, ROWS)
            if several:
                buffers.squares.at[pl.ds(0, self.height), tile][...] = square
            else:
                buffers.squares[0, tile] = square

        x = X(buffers.vectors, source, group.inputs, group.inputs)
        if not group.low_rank:
            lone = Streamed(weights[0], group.inputs)
            tiles = Tiles(group.outputs[0], [lone], lambda row, sums, held: add(row, sums[0], held), held)
            return self._pieces(x, tiles)
        phases, places = self._first(group, weights[0], x)
        strips, members = self._second(group, weights[1:], places)

        def early(row: jax.Array) -> tuple[Any, dict[int, jax.Array]]:
            return held(row), self._passed(group, places, row)

        def store(row: jax.Array, sums: list[jax.Array], given: tuple[Any, dict[int, jax.Array]]) -> None:
            add(row, self._results(group, sums, given[1])[0], given[0])

        return [*phases, Phase(strips, [Tiles(group.outputs[0], members, store, early)])]

    def _gate(self, group: Group, weights: Sequence[Any], target: int) -> list[Phase]:
        """The phases of gate and up, whose tiles go in pairs."""
        x, norm = self._normed

        def put(row: jax.Array, pair: Sequence[jax.Array]) -> None:
            columns(self.buffers.vectors, target + row, ROWS)[...] = gate(*pair).astype(jnp.bfloat16)

        if not group.low_rank:
            members = [Streamed(weights[0], group.inputs, start) for start in group.starts]
            return self._pieces(x, Tiles(group.outputs[0], members, lambda row, sums, _: put(row, sums)), norm)
        phases, places = self._first(group, weights[0], x, norm)
        strips, members = self._second(group, weights[1:], places)

        def early(row: jax.Array) -> dict[int, jax.Array]:
            return self._passed(group, places, row)

        def store(row: jax.Array, sums: list[jax.Array], passed: dict[int, jax.Array]) -> None:
            put(row, self._results(group, sums, passed))

        return [*phases, Phase(strips, [Tiles(group.outputs[0], members, store, early)])]


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
    shapes: tuple[LayerShape, ...], batch: int, blocks: int, interpret: Any = None
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
    """
    all_shapes = aligned(shapes)
    assert all_shapes is not None
    shape, layers = all_shapes[0], len(shapes)
    hidden, rows = shape.qkv.inputs, height(batch)
    counts = shape.matrices
    nothing = [[None] * count for count in counts], (None, None), Buffers(*[None] * 5)
    sizes = Products(shape, 0, layers, *nothing, rows)
    parted = splits(batch * shape.kv_heads) > 1  # whether the cache of a head is, and must be put together
    meetings = sum(not phase.goes_on for phase in sizes.phases) + 1 + parted  # of a layer
    matrices = sum(counts)  # of a layer
    slots = ring(shape, layers, batch)
    ranks = None if len(set(shapes)) == 1 else np.array([one.ranks for one in all_shapes], np.int32)

    def body(*refs: Any) -> None:
        take = iter(refs)
        positions, *angles = (next(take) for _ in range(3))
        norms = [next(take) for _ in range(2)]
        head_norms = [next(take) for _ in range(2 if shape.head_norms else 0)]
        ranked = None if ranks is None else next(take)
        weights = [[next(take) for _ in range(layers)] for _ in range(matrices)]
        counter = next(take)
        caches = [[next(take) for _ in range(layers)] for _ in range(2)]
        buffers = Buffers(*(next(take) for _ in range(5)))
        partial = [next(take) for _ in range(3)]
        tables = [None, None] if interpret else [next(take) for _ in range(2)]
        warps = [next(take) for _ in range(4)]
        block = lax.axis_index("block")
        stream = Stream(block, blocks, batch, slots, list(take), bool(interpret))

        def of(layer: jax.Array) -> Products:
            """A layer's products."""
            arrays = (PerLayer(refs, layer, tables[0], i * layers) for i, refs in enumerate(weights))
            groups = [list(islice(arrays, count)) for count in counts]
            given = shape if ranked is None else shape.of([ranked[layer, i] for i in range(len(shape.ranks))])
            return Products(given, layer, layers, groups, norms, buffers, rows)

        def attention_of(layer: jax.Array, products: Products) -> Attention:
            cached = [PerLayer(refs, layer, tables[1], i * layers) for i, refs in enumerate(caches)]
            return Attention(
                *(shape, layer, block, blocks, batch, positions, angles, head_norms, cached),
                *(buffers.vectors, products.heads, products.mixed),
                partial,
                warps,
            )

        def run(layer: jax.Array, count: jax.Array) -> jax.Array:
            met = iter(range(meetings))

            def meet() -> None:
                if not interpret:
                    ptx.meet(counter, (layer * meetings + next(met) + 1) * blocks)

            products = of(layer)
            attention, phases = attention_of(layer, products), products.phases
            for number, (phase, deal) in enumerate(zip(phases, stream.deal(phases), strict=True)):
                if number == len(products.before):
                    count = attention.attend(stream, count)
                    meet()
                    if parted:
                        attention.combine()
                        meet()
                stream.hold(phase)
                count = stream.multiply(layer * len(phases) + number, count, phase, deal)
                stream.together() if phase.goes_on else meet()
            return count

        def fill(layer: jax.Array, count: jax.Array) -> jax.Array:
            products = of(layer)
            deals, before = stream.deal(products.phases), len(products.before)
            count = attention_of(layer, products).fill(stream, stream.fill(count, deals[:before]))
            return stream.fill(count, deals[before:])

        def publish(table: Any, arrays: Sequence[Sequence[Any]]) -> None:
            if table is not None:
                ptx.publish(table, [ref for refs in arrays for ref in refs])

        @pl.when(lax.axis_index("thread") == 0)
        def compute() -> None:
            stream.join()
            lax.fori_loop(0, layers, run, jnp.int32(0))

        @pl.when(lax.axis_index("thread") == 1)
        def copy() -> None:
            publish(tables[0], weights)
            publish(tables[1], caches)
            stream.open()
            stream.drain(lax.fori_loop(0, layers, fill, jnp.int32(0)))

    tables = [] if interpret else [table(layers * matrices), table(layers * 2)]
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((rows, roomy(sizes.size) + SPAN), jnp.bfloat16),
            jax.ShapeDtypeStruct((rows, max(sum(group.most) for group in shape.groups)), jnp.float32),
            *(jax.ShapeDtypeStruct(size, jnp.float32) for size in Attention.partials(shape, batch)),
        ],
        scratch_types=[*tables, *Attention.scratch(shape), *Stream.scratch(slots, shape.held(batch), bool(interpret))],
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
        x = jnp.pad(x.astype(jnp.float32), ((0, rows - batch), (0, 0)))
        normed = jnp.pad(
            (x * before[0].astype(jnp.float32)).astype(jnp.bfloat16), ((0, 0), (0, roomy(hidden) - hidden))
        )
        parts = jnp.pad(jnp.sum(x * x, axis=1, keepdims=True), ((0, 0), (0, squares(hidden) - 1)))
        residual, *others = (jax.new_ref(buffer) for buffer in (x, normed, parts))
        counter = jax.new_ref(jnp.zeros((1,), jnp.int32))
        # A position behind the end is clamped, as XLA's dynamic slices are.
        positions = jnp.minimum(positions, keys[0].shape[1] - 1)
        complete = [_complete(one, given) for one, given in zip(all_shapes, arrays, strict=True)]
        weights = [array for one in zip(*complete, strict=True) for array in one]
        ranked = [] if ranks is None else [jnp.asarray(ranks)]
        vectors = positions, cosines, sines, before, behind, *head_norms, *ranked
        kernel(*vectors, *weights, counter, *keys, *values, residual, *others)
        return residual[...][:batch]

    return call
