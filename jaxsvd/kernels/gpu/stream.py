"""Matrix-vector products whose weights are streamed through shared memory.

One warpgroup of a block does nothing but copy tiles of weights into a ring, by TMA and as far ahead as the ring has
room, across products and layers. Another multiplies them with x, which lies in shared memory too, on tensor cores: not
for their speed, but as one instruction then does what eighteen did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import ptx
from jaxsvd.kernels.gpu.perlayer import PerLayer, load
from jaxsvd.kernels.gpu.shape import ROWS, SPAN, roomy, slots

SCRATCH = 1024  # bytes of shared memory in which the warps of a warpgroup add up

# How four warps hold a tile: of every 128 inputs 32 each, 16 bytes to a thread, as mma wants its B.
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, 128), (ROWS, 32), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
INPUTS = TILE.reduce((0,))
# What mma gives: the sums (4, ROWS) of the warps, two in a thread.
PARTIAL = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 8, ROWS), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
).reduce((1,))
SUMS = PARTIAL.reduce((0,))


def full(fill: float, shape: tuple[int, ...], layout: Any, dtype: Any = jnp.float32) -> jax.Array:
    """A constant in a layout."""
    return plgpu.layout_cast(jnp.full(shape, fill, dtype), layout)


def share(count: int, first: jax.Array, blocks: int) -> jax.Array:
    """How many of `count` things a block has whose first is `first`, every `blocks`-th being its own."""
    return lax.div(count - first + (blocks - 1), blocks)


def strided(vector: int) -> Any:
    """How a warpgroup holds (n,), `vector` neighbours to a thread."""
    tiling = plgpu.Tiling(((128 * vector,), (32 * vector,), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


@dataclass(frozen=True)
class Member:
    """Rows of `first` (n, inputs) from `start` on, of which this block has [low, high), times x.

    x lies in shared memory from element `x` on. If there is no `second` the results are added to `target`, elements
    from `place` on. Else the rows are a U and `second` is the V (rank, outputs) behind it, whose results are added
    there; `dense` tells that this is not so in this layer.
    """

    first: PerLayer
    inputs: Any
    start: Any
    low: jax.Array
    high: jax.Array
    target: Any
    place: Any
    x: int = 0
    second: PerLayer | None = None
    outputs: int = 0
    dense: Any = False

    @property
    def tiles(self) -> jax.Array:
        """How many the block has."""
        return (self.high - self.low + (ROWS - 1)) >> (ROWS.bit_length() - 1)

    @property
    def chunks(self) -> Any:
        """How many slots each row of V takes."""
        return jnp.where(self.dense, 0, slots(self.outputs)) if self.dense is not False else slots(self.outputs)


@dataclass(frozen=True)
class Product:
    """Matrices that need no meeting of the blocks between them, and how what they read comes to shared memory.

    `read` gives it piece by piece. Zeros follow to the end of a slot: what the ring holds there is left from another.
    """

    members: Sequence[Member]
    read: Callable[[], Sequence[jax.Array]]


def _nested(outer: Any, inner: Any, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """`body(i, j, carry)` for all i and j."""
    return lax.fori_loop(
        0, outer, lambda i, carry: lax.fori_loop(0, inner, lambda j, carry: body(i, j, carry), carry), carry
    )


class Stream:
    """A block's ring: `fill` runs in the warpgroup that copies, `multiply` in the other.

    Both walk the same tiles in the same order, and count the slots that they have used.
    """

    def __init__(self, block: jax.Array, slots: int, scratch: Sequence[Any], interpret: bool) -> None:
        self._block, self._slots, self._interpret = block, slots, interpret
        self._ring, self._held, self._strip, self._full, self._empty, self._together, self._ready = scratch

    @staticmethod
    def scratch(slots: int, held: int, strip: int, interpret: bool) -> list[Any]:
        """What a block needs in shared memory."""
        return [
            plgpu.SMEM((slots, ROWS, SPAN), jnp.bfloat16),
            plgpu.SMEM((held,), jnp.bfloat16),
            plgpu.SMEM((strip,), jnp.float32),
            plgpu.Barrier(num_barriers=slots) if interpret else plgpu.SMEM((slots, 2), jnp.int32),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ]

    def open(self) -> None:
        """Before `fill`: a ring of zeros, as what no copy has reached is multiplied too, if only with zeros."""
        if not self._interpret:
            ptx.prepare(self._full)
            layout = plgpu.Layout.WG_STRIDED((ROWS, SPAN), 8)
            for slot in range(self._slots):
                self._ring.at[slot][...] = full(0.0, (ROWS, SPAN), layout, jnp.bfloat16)
            plgpu.commit_smem()
        plgpu.barrier_arrive(self._ready)

    def join(self) -> None:
        """Before `multiply`: wait until the ring is open."""
        plgpu.barrier_wait(self._ready)

    def fill(self, count: jax.Array, product: Product) -> jax.Array:
        """Copy this block's tiles of a product, in order, each as soon as there is room; the count behind them."""
        for member in product.members:
            count = self._fill(count, member)
        return count

    def _fill(self, count: jax.Array, member: Member) -> jax.Array:
        def copy(
            array: PerLayer, row: Any, tile: jax.Array, part: jax.Array, width: Any, count: jax.Array
        ) -> jax.Array:
            slot = lax.rem(count, self._slots)

            @pl.when(count >= self._slots)
            def wait() -> None:
                plgpu.barrier_wait(self._empty.at[slot])

            first = member.low + tile * ROWS
            rows = jnp.minimum(member.high - first, ROWS)
            array.fetch(row + first, rows, part * SPAN, width, self._ring.at[slot], self._full, slot)
            return count + 1

        def u(tile: jax.Array, part: jax.Array, count: jax.Array) -> jax.Array:
            return copy(member.first, member.start, tile, part, member.inputs, count)

        def v(part: jax.Array, tile: jax.Array, count: jax.Array) -> jax.Array:
            assert member.second is not None
            return copy(member.second, 0, tile, self._turned(member, part), member.outputs, count)

        count = _nested(member.tiles, slots(member.inputs), u, count)
        return count if member.second is None else _nested(member.chunks, member.tiles, v, count)

    def _turned(self, member: Member, part: jax.Array) -> jax.Array:
        """The blocks begin their rows of V at different places, as they add to the same results."""
        return lax.rem(part + self._block, slots(member.outputs))

    def drain(self, count: jax.Array) -> None:
        """Wait until all that was copied has been used: no block may end before."""

        def wait(i: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self._empty.at[lax.rem(i, self._slots)])

        lax.fori_loop(jnp.maximum(count - self._slots, 0), count, wait, None)

    def multiply(self, count: jax.Array, product: Product) -> jax.Array:
        """This block's tiles of a product; the count behind them. All threads have left the one before."""
        place = 0
        for piece in product.read():
            self._held.at[pl.ds(place, piece.size)][...] = piece
            place += piece.size
        if rest := roomy(place) - place:
            self._held.at[pl.ds(place, rest)][...] = full(0.0, (rest,), strided(4), jnp.bfloat16)
        self.together()
        for member in product.members:
            count = self._multiply(count, member)
        return count

    def together(self) -> None:
        """What any thread of the warpgroup has stored in shared memory before is seen by all behind it."""
        plgpu.barrier_arrive(self._together)
        plgpu.barrier_wait(self._together)

    def _multiply(self, count: jax.Array, member: Member) -> jax.Array:
        def u(tile: jax.Array, count: jax.Array) -> jax.Array:
            sums = self._product(count, member)
            first = tile * ROWS
            left = member.high - member.low - first
            if member.second is None or member.dense is not False:
                final = left if member.second is None else jnp.where(member.dense, left, 0)
                self._add(member, member.low + first, sums, final, SUMS)
            if member.second is not None:
                inside = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=SUMS) < left
                self._strip.at[pl.ds(first, ROWS)][...] = jnp.where(inside, sums, full(0.0, (ROWS,), SUMS))
            return count + slots(member.inputs)

        def v(part: jax.Array, count: jax.Array) -> jax.Array:
            def add(tile: jax.Array, sums: jax.Array) -> jax.Array:
                slot = self._arrival(count + tile)
                rows = [load(self._ring.at[slot, i], strided(4)) for i in range(ROWS)]
                plgpu.barrier_arrive(self._empty.at[slot])
                for i, row in enumerate(rows):
                    sums = sums + self._strip[tile * ROWS + i] * row.astype(jnp.float32)
                return sums

            sums = lax.fori_loop(0, member.tiles, add, full(0.0, (SPAN,), strided(4)))
            place = self._turned(member, part) * SPAN
            self._add(member, place, sums, member.outputs - place, strided(4))
            return count + member.tiles

        count = lax.fori_loop(0, member.tiles, u, count)
        if member.second is None:
            return count
        self.together()
        return lax.fori_loop(0, member.chunks, v, count)

    def _add(self, member: Member, place: jax.Array, sums: jax.Array, count: jax.Array, layout: Any) -> None:
        """The first `count` of the sums to a member's result."""
        if not self._interpret:
            ptx.add(member.target, member.place + place, sums, count, layout)
            return
        inside = jnp.arange(sums.size) < count
        region = member.target.at[pl.ds(member.place + place, sums.size)]
        region[...] = region[...] + jnp.where(inside, sums, 0.0)

    def _product(self, count: jax.Array, member: Member) -> jax.Array:
        """The sums (ROWS,) of a tile of rows times the x that is held; its slots begin at `count`."""

        def add(part: jax.Array, sums: jax.Array) -> jax.Array:
            slot = self._arrival(count + part)
            weights = load(self._ring.at[slot], TILE)
            x = load(self._held.at[pl.ds(member.x + part * SPAN, SPAN)], INPUTS)
            plgpu.barrier_arrive(self._empty.at[slot])
            if not self._interpret:
                return ptx.multiply(sums, weights, x, (PARTIAL, TILE, INPUTS))
            shape = (ROWS, SPAN // 128, 4, 32)  # the same as PTX does
            pieces = weights.astype(jnp.float32).reshape(shape) * x.astype(jnp.float32).reshape(shape[1:])
            return sums + pieces.sum((1, 3)).T

        sums = lax.fori_loop(0, slots(member.inputs), add, full(0.0, (4, ROWS), PARTIAL))
        return jnp.sum(sums, axis=0)

    def _arrival(self, count: jax.Array) -> jax.Array:
        """Wait for the copy of this number; its slot."""
        slot = lax.rem(count, self._slots)
        if self._interpret:
            plgpu.barrier_wait(self._full.at[slot])
        else:
            ptx.wait(self._full, slot, lax.rem(lax.div(count, self._slots), 2))
        return slot
