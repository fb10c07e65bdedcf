"""One decoded token through all layers of a model, in one persistent launch.

At batch 1 a step is a chain of matrix-vector products, and its floor is the time to read the weights. What keeps a
chain of kernels from that floor is not bandwidth but the gaps: a launch, a first load, a ragged tail, some twenty times
a layer. Here the blocks stay, one on each multiprocessor. While one warpgroup streams the block's share of all weights
(`jaxsvd.kernels.gpu.stream`), the other multiplies; between two products that depend on each other all blocks meet at
a counter in global memory, and meanwhile the ring fills.

Sums, norms, RoPE, softmax and the residual stream are float32; what one product gives to the next is bfloat16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import ptx
from jaxsvd.kernels.gpu.attention import SPLITS, Attention
from jaxsvd.kernels.gpu.shape import NORMED, SPAN, Group, LayerShape, roomy, whole
from jaxsvd.kernels.gpu.stream import ROWS, SCRATCH, SUMS, Phase, Stream, Streamed, Tiles, X, load


def gate(g: jax.Array, u: jax.Array) -> jax.Array:
    """silu(g)·u."""
    return g / (1.0 + jnp.exp(-g)) * u


@dataclass
class Products:
    """The products of a layer, in order: those `before` attention, and those `behind` it.

    x and `middle`, float32, are the residual stream before and after attention. Everything else lies in `vectors`,
    bfloat16, `size` elements: q, k and v at `heads`, what attention gives at `mixed`. References and weights may be
    None where only sizes are asked for.
    """

    shape: LayerShape
    weights: Sequence[Sequence[Any]]
    norms: Sequence[Any]
    x: Any
    middle: Any
    vectors: Any
    size: int = 0

    def __post_init__(self) -> None:
        shape, (qkv, o, gate_up, down) = self.shape, self.weights
        self.mixed, inner = self._take(shape.o.inputs), self._take(shape.down.inputs)
        before, behind = (
            X(ref, 0, shape.qkv.inputs, gain, shape.eps)
            for ref, gain in zip((self.x, self.middle), self.norms, strict=True)
        )
        self.before, self.heads = self._project(shape.qkv, qkv, before)
        self.behind = [
            *self._add(shape.o, o, self.mixed, self.x, self.middle),
            *self._gate(shape.gate_up, gate_up, behind, inner),
            *self._add(shape.down, down, inner, self.middle, self.x),
        ]

    @property
    def phases(self) -> list[Phase]:
        """All of them."""
        return [*self.before, *self.behind]

    def _take(self, width: int) -> int:
        start, self.size = self.size, self.size + width
        return start

    def _tiles(self, rows: int, members: Sequence[Streamed], start: int) -> Tiles:
        """Products whose results go to `vectors` from element `start` on."""

        def store(row: jax.Array, sums: list[jax.Array], _: Any) -> None:
            self.vectors.at[pl.ds(start + row, ROWS)][...] = sums[0].astype(jnp.bfloat16)

        return Tiles(rows, members, store)

    def _first(self, group: Group, weight: Any, x: X) -> tuple[Phase, int, X]:
        """The product that serves a whole group, where its result begins, and the part that the second ones read."""
        strip = self._take(sum(group.widths))
        phase = Phase(x, [self._tiles(sum(group.widths), [Streamed(weight, group.inputs)], strip)])
        begin, end = group.strip
        return phase, strip, X(self.vectors, strip + begin, end - begin)

    def _second(self, group: Group, weights: Sequence[Any]) -> list[Streamed]:
        """The V of each low-rank member."""
        return [
            Streamed(weight, group.widths[i], 0, group.starts[i] - group.strip[0])
            for weight, i in zip(weights, group.low_rank, strict=True)
        ]

    def _project(self, group: Group, weights: Sequence[Any], x: X) -> tuple[list[Phase], list[int]]:
        """The phases of a group, and where each member's result begins."""
        phase, strip, strips = self._first(group, weights[0], x)
        places = [strip + start for start in group.starts]
        tiles = []
        for i, member in zip(group.low_rank, self._second(group, weights[1:]), strict=True):
            places[i] = self._take(group.outputs[i])
            tiles.append(self._tiles(group.outputs[i], [member], places[i]))
        return [phase, *([Phase(strips, tiles)] if tiles else [])], places

    def _add(self, group: Group, weights: Sequence[Any], source: int, residual: Any, target: Any) -> list[Phase]:
        """The phases of a lone matrix, whose result is added to the residual stream."""

        def early(row: jax.Array) -> jax.Array:
            return load(residual.at[pl.ds(row, ROWS)], SUMS)

        def store(row: jax.Array, sums: list[jax.Array], held: jax.Array) -> None:
            target.at[pl.ds(row, ROWS)][...] = held + sums[0]

        x = X(self.vectors, source, group.inputs)
        if not group.low_rank:
            return [Phase(x, [Tiles(group.outputs[0], [Streamed(weights[0], group.inputs)], store, early)])]
        phase, _, strip = self._first(group, weights[0], x)
        return [phase, Phase(strip, [Tiles(group.outputs[0], self._second(group, weights[1:]), store, early)])]

    def _gate(self, group: Group, weights: Sequence[Any], x: X, target: int) -> list[Phase]:
        """The phases of gate and up, whose tiles go in pairs."""

        def put(row: jax.Array, pair: Sequence[jax.Array]) -> None:
            self.vectors.at[pl.ds(target + row, ROWS)][...] = gate(*pair).astype(jnp.bfloat16)

        if not group.low_rank:
            members = [Streamed(weights[0], group.inputs, start) for start in group.starts]
            return [Phase(x, [Tiles(group.outputs[0], members, lambda row, sums, _: put(row, sums))])]
        phase, strip, strips = self._first(group, weights[0], x)

        dense = {i: strip + start for i, start in enumerate(group.starts) if i not in group.low_rank}

        def early(row: jax.Array) -> dict[int, jax.Array]:
            parts = {i: load(self.vectors.at[pl.ds(start + row, ROWS)], SUMS) for i, start in dense.items()}
            return {i: part.astype(jnp.float32) for i, part in parts.items()}

        def store(row: jax.Array, sums: list[jax.Array], held: dict[int, jax.Array]) -> None:
            given = held | dict(zip(group.low_rank, sums, strict=True))
            put(row, [given[0], given[1]])

        return [phase, Phase(strips, [Tiles(group.outputs[0], self._second(group, weights[1:]), store, early)])]


@cache
def make_layers(shape: LayerShape, layers: int, blocks: int, interpret: Any = None) -> Callable[..., jax.Array]:
    """The kernel for `layers` layers alike, on a GPU with `blocks` multiprocessors.

    `interpret` (`plgpu.InterpretGPUParams`) runs it in Pallas' interpreter, with one block. The kernel takes

    - x (hidden,), the token's vector, and the position () int32 that it has;
    - cosines and sines of RoPE at the position, float32 (head_dim/2,);
    - the weights of the two norms (layers, hidden), and of those of the heads of q and k (layers, head_dim), if any;
    - the weights of the four groups in bfloat16, (layers, outputs, inputs) each: the first product's, then each V;
    - keys and values, references to bfloat16 (layers, kv_heads, capacity, head_dim), which get the new token: see
      `LayerShape.obstacle`,

    and returns x behind the last layer, float32 (hidden,).
    """
    hidden = shape.qkv.inputs
    counts = [1 + len(group.low_rank) for group in shape.groups]
    sizes = Products(shape, [[None] * count for count in counts], (None, None), None, None, None)
    meetings = len(sizes.phases) + 2  # of a layer: attention has two of its own

    def body(*refs: Any) -> None:
        take = iter(refs)
        position, *angles = (next(take) for _ in range(3))
        norms = [next(take) for _ in range(2)]
        head_norms = [next(take) for _ in range(2 if shape.head_norms else 0)]
        weights = [[next(take) for _ in range(count)] for count in counts]
        x, counter, *caches = (next(take) for _ in range(4))
        middle, vectors, *partial = (next(take) for _ in range(5))
        block = lax.axis_index("block")
        stream = Stream(block, blocks, list(take), bool(interpret))
        products = Products(shape, weights, norms, x, middle, vectors)

        def run(layer: jax.Array, count: jax.Array) -> jax.Array:
            met = iter(range(meetings))

            def meet() -> None:
                if not interpret:
                    ptx.meet(counter, (layer * meetings + next(met) + 1) * blocks)

            attention = Attention(
                *(shape, layer, block, blocks, position[0], angles, head_norms, caches),
                *(vectors, products.heads, products.mixed, *partial),
            )
            phases = products.phases
            for number, (phase, deal) in enumerate(zip(phases, stream.deal(phases), strict=True)):
                if number == len(products.before):
                    attention.attend()
                    meet()
                    attention.combine()
                    meet()
                stream.hold(layer, phase)
                count = stream.multiply(count, deal)
                meet()
            return count

        def fill(layer: jax.Array, count: jax.Array) -> jax.Array:
            return stream.fill(count, layer, stream.deal(products.phases))

        @pl.when(lax.axis_index("thread") == 0)
        def compute() -> None:
            lax.fori_loop(0, layers, run, jnp.int32(0))

        @pl.when(lax.axis_index("thread") == 1)
        def copy() -> None:
            stream.drain(lax.fori_loop(0, layers, fill, jnp.int32(0)))

    splits = (shape.heads, SPLITS)
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((roomy(hidden),), jnp.float32),
            jax.ShapeDtypeStruct((roomy(sizes.size) + SPAN,), jnp.bfloat16),
            *(jax.ShapeDtypeStruct(size, jnp.float32) for size in ((*splits, shape.head_dim), splits, splits)),
        ],
        scratch_types=Stream.scratch(sizes.phases),
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

    def call(x: jax.Array, position: jax.Array, cosines: jax.Array, sines: jax.Array, *rest: Any) -> jax.Array:
        """See `make_layers`."""
        before, behind, *arrays, keys, values = rest
        if odd := whole(hidden, NORMED) - hidden:  # not where it need not be: it is done in every step
            before, behind = (jnp.pad(gain, ((0, 0), (0, odd))) for gain in (before, behind))
        stream = jax.new_ref(jnp.pad(x.astype(jnp.float32), (0, roomy(hidden) - hidden)))
        counter = jax.new_ref(jnp.zeros((1,), jnp.int32))
        # A position behind the end is clamped, as XLA's dynamic slices are.
        position = jnp.minimum(position, keys.shape[2] - 1).reshape(1)
        kernel(position, cosines, sines, before, behind, *arrays, stream, counter, keys, values)
        return stream[...][:hidden]

    return call
