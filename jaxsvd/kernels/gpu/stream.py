"""Products of weights with one x or a few, whose weights are streamed through shared memory.

One warpgroup of a block does nothing but copy tiles of weights into a ring, by TMA and as far ahead as the ring has
room, across products and layers; keys and values go the same way. Another multiplies them with x, which a third brings
to shared memory too, on tensor cores: not for their speed, but as one instruction then does what eighteen did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import present, ptx
from jaxsvd.kernels.gpu.perlayer import load
from jaxsvd.kernels.gpu.shape import BATCH, ROWS, SPAN, loose, roomy, slots, whole

PAIR = "pair"  # the axis of the blocks that share what is brought of several rows
SCRATCH = 1024  # bytes of shared memory in which the warps of a warpgroup add up

# How four warps hold a tile: of every 128 inputs 32 each, 16 bytes to a thread, as mma wants its B.
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, 128), (ROWS, 32), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
# What mma gives: the sums (4, BATCH, ROWS) of the warps, two in a thread.
PARTIAL = plgpu.Layout.TILED(plgpu.Tiling(((4, BATCH, ROWS), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
# Four rows of something, one to a warp.
APIECE = plgpu.Layout.TILED(plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def inputs(height: int) -> Any:
    """How four warps hold x: of all rows if there are several, else the one, which all lanes have that need it."""
    return TILE if height > 1 else TILE.reduce((0,))


def partial_sums(height: int) -> Any:
    """How they hold the sums of each of them: (4, BATCH, ROWS), or (4, ROWS) of one row."""
    return PARTIAL if height > 1 else PARTIAL.reduce((1,))


def sums(height: int) -> Any:
    """How they hold the sums of all: (BATCH, ROWS), or (ROWS,)."""
    return partial_sums(height).reduce((0,))


def squares(width: int) -> int:
    """How many numbers tell of the squares of a row: one for each of its tiles, and zeros behind these."""
    return whole(width // ROWS, 128)


def columns(ref: Any, start: Any, size: int) -> Any:
    """The same elements of all rows of a buffer: (BATCH, size), or (size,) of one row."""
    return ref.at[0 if ref.shape[0] == 1 else pl.ds(0, BATCH), pl.ds(start, size)]


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
class X:
    """Something that products read: elements [start, start + width) of each row of `ref` (1 or BATCH, n), bfloat16.

    Where the width is known at run time only, it is at most `most`. What the ring held before lies behind the edge of a
    slot, against zeros of x: all weights, keys and values are to be finite. It may be on its way: see `present`.
    """

    ref: Any
    start: Any
    width: Any
    most: int


@dataclass(frozen=True)
class Norm:
    """RMSNorm of what products read, but for its weights, which x has been multiplied with: the sums are scaled.

    Those elements of `squares` (1 or BATCH, n) float32 from `start` on that `squares` counts add up to the squares of
    the `width` elements of each row.
    """

    squares: Any
    start: Any
    width: int
    eps: float


@dataclass(frozen=True)
class Streamed:
    """Rows of a weight (n, inputs) from `row` on, and where what they are multiplied with lies in shared memory.

    Where they are multiplied in pieces, this is the one of inputs [begin, end).
    """

    weight: Any  # PerLayer
    inputs: Any
    row: Any = 0
    x: int = 0
    begin: int = 0
    end: int | None = None

    @property
    def slots(self) -> Any:
        """How many a tile takes."""
        return slots(self.inputs if self.end is None else self.end - self.begin)


@dataclass(frozen=True)
class Tiles:
    """`rows` rows of each member, ROWS at a time.

    `early(row)` is run before a tile's products, for loads that they hide, and `store(row, sums, its result)` behind.
    """

    rows: Any
    members: Sequence[Streamed]
    store: Callable[[jax.Array, list[jax.Array], Any], None]
    early: Callable[[jax.Array], Any] = lambda row: None

    @property
    def count(self) -> Any:
        """How many tiles of all blocks."""
        return self.rows >> (ROWS.bit_length() - 1)  # a shift, as for `slots`


@dataclass(frozen=True)
class Phase:
    """Products that need no meeting of the blocks between them, and what they read.

    Each x begins in shared memory behind the whole slots of the one before, and zeros follow it there: what a slot
    holds behind the edge of its weight is left from another. If it `goes_on`, the next phase has other inputs of the
    same tiles: each block goes on with its own, and they need not meet. If it is `fixed`, a block has the same tiles in
    all layers and other such phases: nobody else need know what it keeps for them.
    """

    x: Sequence[X]
    tiles: Sequence[Tiles]
    norm: Norm | None = None
    goes_on: bool = False
    fixed: bool = False

    @property
    def places(self) -> dict[int, X]:
        """Where each x begins in shared memory."""
        places, start = {}, 0
        for x in self.x:
            places[start] = x
            start += roomy(x.most)
        return places


# Of a phase: its tiles, this block's first one of them, and how many it has.
Deal = list[tuple[Tiles, jax.Array, jax.Array]]


class Stream:
    """A block's ring: `fill` runs in the warpgroup that copies weights, `multiply` in the one that uses them.

    Both walk the same tiles in the same order, and count the slots that they have used. A third one, in `hold`, brings
    what they are multiplied with. `batch` is the rows of x.
    """

    def __init__(
        self, block: jax.Array, blocks: int, batch: int, slots: int, scratch: Sequence[Any], interpret: bool
    ) -> None:
        self._block, self._blocks, self._batch, self._slots, self.interpret = block, blocks, batch, slots, interpret
        self._ring, self._held, self._scales, *barriers = scratch
        self._full, self._empty, self._ready, self._left, self._arrived, *self._both = barriers

    @staticmethod
    def scratch(slots: int, held: tuple[int, int], interpret: bool) -> list[Any]:
        """What a block needs in shared memory; `held` is the shape of a phase's x."""
        return [
            plgpu.SMEM((slots, ROWS, SPAN), jnp.bfloat16),
            plgpu.SMEM(held, jnp.bfloat16),
            plgpu.SMEM(held[:1], jnp.float32),
            *[plgpu.Barrier(num_barriers=slots) if interpret else plgpu.SMEM((slots, 2), jnp.int32)] * 2,
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier() if interpret else plgpu.SMEM((held[1] // SPAN + 1, 2), jnp.int32),
            *([plgpu.ClusterBarrier(collective_axes=(PAIR,))] if held[0] > 1 and not interpret else []),
        ]

    def open(self) -> None:
        """Before `fill`: zeros in the ring, as what is behind an edge is multiplied, and in rows of no token."""
        if not self.interpret:
            ptx.prepare(self._full, 1)
            ptx.prepare(self._arrived, 4)
            ptx.prepare(self._empty, 4)
            layout = plgpu.Layout.WG_STRIDED((ROWS, SPAN), 8)
            for slot in range(self._slots):
                self._ring.at[slot][...] = full(0.0, (ROWS, SPAN), layout, jnp.bfloat16)
            if self._batch < self._held.shape[0]:
                for span in range(self._spans):
                    columns(self._held, span * SPAN, SPAN)[...] = full(0.0, (ROWS, SPAN), TILE, jnp.bfloat16)
            plgpu.commit_smem()
        plgpu.barrier_arrive(self._ready)

    def join(self) -> None:
        """Before `multiply`, and before `hold`: wait until the ring is open."""
        plgpu.barrier_wait(self._ready)

    def deal(self, phases: Sequence[Phase]) -> list[Deal]:
        """What this block has of each phase.

        Each deal but the fixed ones begins with the block where the one before ended: this evens out the remainders.
        """
        shift, deals = jnp.int32(0), []
        for phase in phases:
            deals.append([])
            behind = jnp.int32(0) if phase.fixed else shift
            for tiles in phase.tiles:
                first = lax.rem(self._block + (self._blocks - behind), self._blocks)
                deals[-1].append((tiles, first, share(tiles.count, first, self._blocks)))
                behind = lax.rem(behind + tiles.count, self._blocks)
            shift = shift if phase.goes_on or phase.fixed else behind
        return deals

    def _row(self, first: jax.Array, i: jax.Array) -> jax.Array:
        return (first + i * self._blocks) * ROWS

    def fill(self, count: jax.Array, deals: Sequence[Deal]) -> jax.Array:
        """Copy this block's tiles of a layer, in order, each as soon as there is room; the count behind them."""
        for deal in deals:
            for tiles, first, mine in deal:

                def tile(i: jax.Array, count: jax.Array, tiles: Tiles = tiles, first: Any = first) -> jax.Array:
                    for member in tiles.members:
                        row = self._row(first, i) + member.row

                        def copy(part: jax.Array, count: jax.Array, member: Any = member, row: Any = row) -> Any:
                            fetch = partial(member.weight.fetch, row, member.begin + part * SPAN, member.inputs)
                            return self.put(count, fetch)

                        count = lax.fori_loop(0, member.slots, copy, count)
                    return count

                count = lax.fori_loop(0, mine, tile, count)
        return count

    def put(self, count: jax.Array, fetch: Callable[[Any, Any, jax.Array], None]) -> jax.Array:
        """Fill the next slot as soon as it is empty, by `fetch(slot, barriers, its number)`; the count behind it."""
        slot = lax.rem(count, self._slots)

        @pl.when(count >= self._slots)
        def wait() -> None:
            self._emptied(count - self._slots)

        fetch(self._ring.at[slot], self._full, slot)
        return count + 1

    def take(self, count: jax.Array, read: Callable[[Any], Any]) -> Any:
        """What `read(slot)` gives of the slot of this number; behind it the slot is empty."""
        slot = lax.rem(count, self._slots)
        if self.interpret:
            plgpu.barrier_wait(self._full.at[slot])
        else:
            ptx.wait(self._full, slot, lax.rem(lax.div(count, self._slots), 2))
        found = read(self._ring.at[slot])
        self._release(count)
        return found

    def _emptied(self, count: jax.Array) -> None:
        """Wait until the slot of this number has been released."""
        slot = lax.rem(count, self._slots)
        if self.interpret:
            plgpu.barrier_wait(self._empty.at[slot])
        else:
            ptx.wait(self._empty, slot, lax.rem(lax.div(count, self._slots), 2))

    def _release(self, count: jax.Array) -> None:
        """It is empty again."""
        slot = lax.rem(count, self._slots)
        if self.interpret:
            plgpu.barrier_arrive(self._empty.at[slot])
        else:
            ptx.arrive(self._empty, slot)

    def together(self) -> None:
        """What any thread of the warpgroup has stored in shared memory before is seen by all behind it."""
        if not self.interpret:
            ptx.together()

    def drain(self, count: jax.Array) -> None:
        """Wait until all that was copied has been used: no block may end before."""

        def wait(i: jax.Array, _: None) -> None:
            self._emptied(i)

        lax.fori_loop(jnp.maximum(count - self._slots, 0), count, wait, None)

    def leave(self) -> None:
        """Before `multiply`: what is held is not read any more, and `hold` may bring the next x."""
        plgpu.barrier_arrive(self._left)

    def clear(self, meet: Callable[[], None] = lambda: None) -> None:
        """Wait until what is held has been left, by the other block of a pair too, and for the blocks, to `meet`."""
        plgpu.barrier_wait(self._left)
        for both in self._both:
            plgpu.barrier_arrive(both)
        meet()
        for both in self._both:
            plgpu.barrier_wait(both)

    def hold(self, number: jax.Array, phase: Phase, meet: Callable[[], None]) -> None:
        """Bring what a phase reads, the `number`-th of all, to shared memory, a slot's inputs after the other.

        See `clear` for what it waits for.
        """
        self.clear(meet)
        if self._both:
            ptx.instruct("fence.proxy.async.global;")  # what other threads stored is read by copies in bulk
        parts = [(x, part, place + part) for place, x in phase.places.items() for part in range(0, roomy(x.most), SPAN)]
        for x, part, place in parts:
            self._bring(x, part, place)
        squares = self._squares(phase.norm) if phase.norm else []
        peeked = self.peek(squares, self._apiece)  # they come while x does
        if loose(self._batch) and not self.interpret:
            for behind, (x, part, place) in zip(reversed(range(len(parts))), parts, strict=True):
                present.ensure(x.ref, x.start + part, self._held, place, behind)
                ptx.tell(self._arrived, place // SPAN)
        if phase.norm:
            self._scale(phase.norm, self.settle(squares, peeked, self._apiece))
        if self.interpret:
            plgpu.barrier_arrive(self._arrived)
            return
        for unused in range(len(parts), self._spans):
            ptx.tell(self._arrived, unused)
        for span in range(len(parts) if self._both else 0):
            self._await(span, number)
        ptx.tell(self._arrived, self._spans)

    def _bring(self, x: X, part: int, place: int) -> None:
        """Start to copy the elements of x from `part` on to `place` of what is held, and zeros behind its end."""
        start, left = x.start + part, x.width - part
        if self._both:
            ptx.share(x.ref, start, left, self._held, place, self._batch, self._arrived, lax.axis_index(PAIR))
            ptx.tell(self._arrived, place // SPAN)
            return
        if not self.interpret:
            ptx.bring(x.ref, start, left, self._held, place)
            ptx.cut()
            return

        def row(i: jax.Array, _: None) -> None:
            values = load(x.ref.at[i, pl.ds(start, SPAN)], strided(8))
            inside = plgpu.broadcasted_iota(jnp.int32, (SPAN,), 0, layout=strided(8)) < left
            self._held.at[i, pl.ds(place, SPAN)][...] = jnp.where(inside, values, jnp.zeros((), values.dtype))

        lax.fori_loop(0, self._batch, row, None)

    @property
    def _apiece(self) -> Any:
        """How warps hold what belongs to rows: each has one of them, or all have the one."""
        return APIECE if self._batch > 1 else APIECE.reduce((0,))

    def _squares(self, norm: Norm) -> list[Any]:
        """The squares of the rows, as many rows to each as there are warps."""
        parts = pl.ds(norm.start, squares(norm.width))
        rows = [pl.ds(first, 4) for first in range(0, self._batch, 4)] if self._batch > 1 else [0]
        return [norm.squares.at[some, parts] for some in rows]

    def _scale(self, norm: Norm, squares: Sequence[jax.Array]) -> None:
        """Put the scales of all rows into shared memory."""
        for i, each in enumerate(squares):
            scale = lax.rsqrt(jnp.sum(each, axis=-1) / norm.width + norm.eps)
            if self._batch > 1:
                self._scales.at[pl.ds(4 * i, 4)][...] = scale
            else:
                self._scales[0] = scale

    def peek(self, regions: Sequence[Any], layout: Any) -> list[jax.Array]:
        """Begin to read what blocks have sent, or are about to: regions of global memory in a layout. See `present`."""
        if not self.interpret:
            return present.peek(regions, layout)
        return [
            jnp.stack([load(part, layout.reduce((0,))) for part in region.parts])
            if isinstance(region, present.Piece)
            else load(region, layout)
            for region in regions
        ]

    def settle(self, regions: Sequence[Any], found: Sequence[jax.Array], layout: Any) -> list[jax.Array]:
        """End what `peek` has begun."""
        return list(found) if self.interpret else present.settle(regions, found, layout)

    def send(self, piece: present.Piece, values: jax.Array, layout: Any) -> None:
        """Store the parts of a piece, of which there may be less than four."""
        if not self.interpret:
            present.send(piece, values, layout)
            return
        for i, part in enumerate(piece.parts[: piece.count - piece.first]):
            part[...] = values[i]

    def _scaled(self, found: jax.Array) -> jax.Array:
        """The sums of a tile times the scales of their rows."""
        if self._batch == 1:
            return found * self._scales[0]
        layout = sums(self._batch)
        scales = lax.broadcast_in_dim(load(self._scales, layout.reduce((1,))), found.shape, (0,))
        return found * plgpu.layout_cast(scales, layout)

    def multiply(self, number: jax.Array, count: jax.Array, phase: Phase, deal: Deal) -> jax.Array:
        """This block's tiles of a phase, the `number`-th of all, times the x that is held; the count behind them."""
        if self.interpret:
            plgpu.barrier_wait(self._arrived)
        for tiles, first, mine in deal:

            def tile(i: jax.Array, count: jax.Array, tiles: Tiles = tiles, first: Any = first) -> jax.Array:
                row = self._row(first, i)
                early, sums = tiles.early(row), []
                for member in tiles.members:
                    sums.append(self._product(count, member, i == 0, number))
                    count = count + member.slots
                if phase.norm:
                    pl.when(i == 0)(partial(self._await, self._spans, number))
                tiles.store(row, list(map(self._scaled, sums)) if phase.norm else sums, early)
                return count

            count = lax.fori_loop(0, mine, tile, count)
        self._await(self._spans, number)  # a block without a tile has not waited
        return count

    def _await(self, span: Any, number: jax.Array) -> None:
        """Wait until a slot's inputs of the `number`-th phase are there, or all of them, and the scales."""
        if not self.interpret:
            ptx.wait(self._arrived, jnp.asarray(span, jnp.int32), lax.rem(number, 2))

    @property
    def _spans(self) -> int:
        """How many slots' inputs are held at most."""
        return self._held.shape[1] // SPAN

    def _product(self, count: jax.Array, member: Streamed, first: jax.Array, number: jax.Array) -> jax.Array:
        """The sums of a tile whose slots begin at `count`: (BATCH, ROWS), or (ROWS,) of one row."""
        rows = self._held.shape[0]
        layouts = partial_sums(rows), TILE, inputs(rows)

        def add(part: jax.Array, sums: jax.Array) -> jax.Array:
            pl.when(first)(lambda: self._await(member.x // SPAN + part, number))
            held = columns(self._held, member.x + part * SPAN, SPAN)
            weights, x = self.take(count + part, lambda slot: (load(slot, TILE), load(held, layouts[2])))
            if not self.interpret:
                return ptx.multiply(sums, weights, x, layouts)
            shape = (-1, SPAN // 128, 4, 32)  # the same as PTX does
            pieces = (array.astype(jnp.float32).reshape(shape) for array in (weights, x))
            return sums + jnp.einsum("nswi,bswi->wbn", *pieces).reshape(sums.shape)

        shape = (4, ROWS) if rows == 1 else (4, BATCH, ROWS)
        return jnp.sum(lax.fori_loop(0, member.slots, add, full(0.0, shape, layouts[0])), axis=0)
