"""Products of weights with one x or a few, whose weights are streamed through shared memory.

One warpgroup of a block does nothing but copy tiles of weights into a ring, by TMA and as far ahead as the ring has
room, across products and layers; keys and values go the same way. Another multiplies them with x, which a third brings
to shared memory too, on tensor cores: not for their speed, but as one instruction then does what eighteen did.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import copies, present, ptx
from jaxsvd.kernels.gpu.layouts import APIECE, TILE, full, inputs, partial_sums, strided, sums_shape
from jaxsvd.kernels.gpu.perlayer import load
from jaxsvd.kernels.gpu.phases import Norm, Phase, Streamed, Tiles, X
from jaxsvd.kernels.gpu.regions import Parts
from jaxsvd.kernels.gpu.shape import ROWS, SPAN, WARPS, pitch, whole
from jaxsvd.kernels.gpu.sweep import Sweep

LOOSE = 1, 8  # heights of x of which each number need not be there when blocks have met, as its reader looks
PAIR = "pair"  # the axis of the blocks that share what is brought of several rows


def squares(width: int) -> int:
    """How many numbers tell of the squares of a row: one for each of its tiles, and zeros behind these."""
    return whole(width // ROWS, 128)


def columns(ref: Any, start: Any, size: int) -> Any:
    """The same elements of all rows of a buffer: (height, size), or (size,) of one row."""
    rows = ref.shape[0]
    return ref.at[0 if rows == 1 else pl.ds(0, rows), pl.ds(start, size)]


def share(count: int, first: jax.Array, blocks: int) -> jax.Array:
    """How many of `count` things a block has whose first is `first`, every `blocks`-th being its own."""
    return lax.div(count - first + (blocks - 1), blocks)


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
        self.sums, self._ring, self._held, self._scales, *barriers = scratch
        self._full, self._empty, self._ready, self._left, self._arrived, *self._both = barriers

    @staticmethod
    def sums_scratch(held: tuple[int, int], swept: int) -> Any:
        """What a block needs in shared memory while it multiplies: see `LayerShape`."""
        return plgpu.SMEM((swept, *sums_shape(held[0])), jnp.float32)

    @staticmethod
    def scratch(slots: int, held: tuple[int, int], interpret: bool) -> list[Any]:
        """What else it needs there; `held` is the shape of a phase's x."""
        spans = held[1] // SPAN
        return [
            plgpu.SMEM((slots, ROWS, SPAN if interpret else pitch(held[0])), jnp.bfloat16),
            plgpu.SMEM(held, jnp.bfloat16),
            plgpu.SMEM(held[:1], jnp.float32),
            *[plgpu.Barrier(num_barriers=slots) if interpret else plgpu.SMEM((slots, 2), jnp.int32)] * 2,
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=1 + (spans if held[0] > 1 else 0)),  # Pallas has room for 32
            plgpu.Barrier() if interpret else plgpu.SMEM((2 * spans + 1, 2), jnp.int32),
            *([plgpu.ClusterBarrier(collective_axes=(PAIR,))] if held[0] > 1 and not interpret else []),
        ]

    def open(self) -> None:
        """Before `fill`: zeros in the ring, as what is behind an edge is multiplied, and in rows of no token."""
        if not self.interpret:
            ptx.prepare(self._full, 1)
            ptx.prepare(self._arrived, WARPS)
            ptx.prepare(self._empty, WARPS)
            for slot in range(self._slots):
                self._weights(self._ring.at[slot])[...] = full(0.0, (ROWS, SPAN), TILE, jnp.bfloat16)
            rows = self.height
            if self._batch < rows:
                for span in range(self.places):
                    columns(self._held, span * SPAN, SPAN)[...] = full(0.0, (rows, SPAN), TILE, jnp.bfloat16)
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
            shift = shift if phase.fixed else behind
        return deals

    @property
    def apart(self) -> int:
        """The rows from one of this block's tiles to the next."""
        return self._blocks * ROWS

    def row(self, first: jax.Array, i: jax.Array) -> jax.Array:
        """The first row of the i-th of this block's tiles."""
        return first * ROWS + i * self.apart

    def fill(self, count: jax.Array, phases: Sequence[Phase], deals: Sequence[Deal]) -> jax.Array:
        """Copy this block's tiles of some phases, in order, each as soon as there is room; the count behind them."""
        for phase, deal in zip(phases, deals, strict=True):
            for tiles, first, mine in deal:
                count = Sweep(self, phase, tiles, first, mine).fill(count)
        return count

    def copy(self, member: Streamed, row: jax.Array, part: jax.Array, count: jax.Array) -> jax.Array:
        """A slot of a tile."""
        return self.put(count, partial(member.weight.fetch, row + member.row, part * SPAN, member.inputs))

    def put(self, count: jax.Array, fetch: Callable[[Any, Any, jax.Array], None]) -> jax.Array:
        """Fill the next slot as soon as it is empty, by `fetch(slot, barriers, its number)`; the count behind it."""
        slot = lax.rem(count, self._slots)

        @pl.when(count >= self._slots)
        def wait() -> None:
            self._wait(self._empty, count - self._slots)

        fetch(self._ring.at[slot], self._full, slot)
        return count + 1

    @staticmethod
    def _weights(slot: Any) -> Any:
        """The part of a slot that holds weights."""
        return slot.at[pl.ds(0, ROWS), pl.ds(0, SPAN)]

    def take(self, count: jax.Array, read: Callable[[Any], Any]) -> Any:
        """What `read(slot)` gives of the slot of this number; behind it the slot is empty."""
        self._wait(self._full, count)
        found = read(self._ring.at[lax.rem(count, self._slots)])
        self._release(count)
        return found

    def take_two(self, count: jax.Array, more: jax.Array, read: Callable[[Sequence[Any]], Any]) -> Any:
        """What `read(slots)` gives of the slot of this number and the next; behind it they are empty.

        Where `more` is 0, not 1, there is no next one, and it is the first again. Not in Pallas' interpreter.
        """
        both = count, count + more
        for each in both:
            self._wait(self._full, each)
        found = read([self._ring.at[lax.rem(each, self._slots)] for each in both])
        for each, real in zip(both, (1, more), strict=True):
            self._release(each, real)
        return found

    def _wait(self, barriers: Any, count: jax.Array) -> None:
        """Wait until the slot of this number is full, or empty again."""
        slot = lax.rem(count, self._slots)
        if self.interpret:
            plgpu.barrier_wait(barriers.at[slot])
        else:
            ptx.wait(barriers, slot, lax.rem(lax.div(count, self._slots), 2))

    def _release(self, count: jax.Array, real: Any = 1) -> None:
        """It is empty again, if it is `real`, not 0."""
        slot = lax.rem(count, self._slots)
        if self.interpret:
            plgpu.barrier_arrive(self._empty.at[slot])
        else:
            ptx.tell(self._empty, slot, real)

    def loop(self, start: Any, stop: Any, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """`lax.fori_loop`, of which ptxas makes no more code than it is: a layer's is about what its cache holds."""

        def once(i: jax.Array, carry: Any) -> Any:
            if not self.interpret:
                ptx.instruct('.pragma "nounroll";')
            return body(i, carry)

        return lax.fori_loop(start, stop, once, carry)

    def together(self) -> None:
        """What any thread of the warpgroup has stored in shared memory before is seen by all behind it."""
        if not self.interpret:
            ptx.together()

    def drain(self, count: jax.Array) -> None:
        """Wait until all that was copied has been used: no block may end before."""

        def wait(i: jax.Array, _: None) -> None:
            self._wait(self._empty, i)

        lax.fori_loop(jnp.maximum(count - self._slots, 0), count, wait, None)

    def turns(self, phase: Phase) -> int:
        """How often what is held is filled in a phase."""
        return -(-len(phase.spans) // self.places)

    def leave(self, place: Any = None) -> None:
        """Before `multiply`: what is held is not read any more, or what is at one place: `hold` may bring the next."""
        plgpu.barrier_arrive(self._left.at[0 if place is None else place + 1])

    def clear(self, meet: Callable[[], None] = lambda: None, place: int | None = None) -> None:
        """Wait until it has been left, by the other block of a pair too, and for the blocks, to `meet`."""
        plgpu.barrier_wait(self._left.at[0 if place is None else place + 1])
        for both in self._both:
            ptx.together()  # one warp arrives for all: none may be a turn behind it
            plgpu.barrier_arrive(both)
        meet()
        for both in self._both:
            plgpu.barrier_wait(both)

    def hold(self, number: jax.Array, phase: Phase, meet: Callable[[], None]) -> None:
        """Bring what a phase reads to shared memory, a slot's inputs after the other, from the `number`-th turn on.

        See `clear` for what it waits for.
        """
        self.clear(meet)
        if self._both:
            ptx.instruct("fence.proxy.async.global;")  # what other threads stored is read by copies in bulk
        squares = self._squares(phase.norm) if phase.norm else []
        for turn in range(self.turns(phase)):
            spans = phase.spans[turn * self.places :][: self.places]
            for place in range(self.places):
                if turn:  # even if nothing comes: the barrier of a place must not end two phases at once
                    self.clear(place=place)
                coming = place < len(spans)
                if coming:
                    self._bring(*spans[place], place)
                self._tell(place, coming and self.loose)
            peeked = self.peek(squares, self._apiece) if turn == 0 else []  # they come while x does
            for place, span in enumerate(spans):
                self._ensure(*span, place, number + turn, len(spans) - 1 - place)
            if turn == 0 and phase.norm:
                self._scale(phase.norm, self.settle(squares, peeked, self._apiece))
            if self.interpret:
                plgpu.barrier_arrive(self._arrived)
            else:
                ptx.tell(self._arrived, self.places)

    def _ensure(self, x: X, part: int, place: int, number: jax.Array, behind: int) -> None:
        """Wait for what was begun by `_bring`, `behind` which others were, in the `number`-th turn."""
        if self.interpret:
            return
        if not self.loose:
            self._await(place, number)
            return
        if self._both:
            self._await(self._landed(place), number)
        else:
            ptx.instruct(f"cp.async.wait_group {behind};")
        present.ensure(x.ref, x.start + part, self._held, place * SPAN, self._batch)
        ptx.tell(self._arrived, place)

    @property
    def loose(self) -> bool:
        """Whether blocks meet without waiting for what they have stored: see `present`.

        Of sixteen rows too much would come too late.
        """
        return self.height in LOOSE

    def _landed(self, place: int) -> int:
        """The barrier of copies in bulk to a place that are to be looked at before the place's own says they are there.

        Both end a phase with each turn.
        """
        return self.places + 1 + place

    def _tell(self, place: int, looked: bool) -> None:
        """Tell that all was begun that comes to a place in a turn, if anything, unless it is to be `looked` at."""
        for barrier in () if self.interpret else [place] * (not looked) + [self._landed(place)] * len(self._both):
            ptx.tell(self._arrived, barrier)

    def _bring(self, x: X, part: int, place: int) -> None:
        """Start to copy a slot's inputs of x, from `part` on, to a place of what is held, and zeros behind its end.

        If blocks met loosely they are to be looked at: see `_ensure`.
        """
        start, left, at = x.start + part, x.width - part, place * SPAN
        if self._both:
            barrier = self._landed(place) if self.loose else place
            copies.share(x.ref, start, left, self._held, at, self._batch, self._arrived, barrier, lax.axis_index(PAIR))
            return
        if not self.interpret:
            copies.bring(x.ref, start, left, self._held, at)
            copies.cut()
            return

        def row(i: jax.Array, _: None) -> None:
            values = load(x.ref.at[i, pl.ds(start, SPAN)], strided(8))
            inside = plgpu.broadcasted_iota(jnp.int32, (SPAN,), 0, layout=strided(8)) < left
            self._held.at[i, pl.ds(at, SPAN)][...] = jnp.where(inside, values, jnp.zeros((), values.dtype))

        lax.fori_loop(0, self._batch, row, None)

    @property
    def _apiece(self) -> Any:
        """How warps hold what belongs to rows: each has one of them, or all have the one."""
        return APIECE if self._batch > 1 else APIECE.reduce((0,))

    def _squares(self, norm: Norm) -> list[Any]:
        """The squares of the rows, as many rows to each as there are warps."""
        parts = pl.ds(norm.start, squares(norm.width))
        rows = [pl.ds(first, WARPS) for first in range(0, self._batch, WARPS)] if self._batch > 1 else [0]
        return [norm.squares.at[some, parts] for some in rows]

    def _scale(self, norm: Norm, squares: Sequence[jax.Array]) -> None:
        """Put the scales of all rows into shared memory."""
        for i, each in enumerate(squares):
            scale = lax.rsqrt(jnp.sum(each, axis=-1) / norm.width + norm.eps)
            if self._batch > 1:
                self._scales.at[pl.ds(WARPS * i, WARPS)][...] = scale
            else:
                self._scales[0] = scale

    def peek(self, regions: Sequence[Any], layout: Any) -> list[jax.Array]:
        """Begin to read what blocks have sent, or are about to: regions of global memory in a layout. See `present`."""
        if not self.interpret:
            return present.peek(regions, layout)
        return [
            jnp.stack([load(part, layout.reduce((0,))) for part, _ in region.parts])
            if isinstance(region, Parts)
            else load(region, layout)
            for region in regions
        ]

    def settle(self, regions: Sequence[Any], found: Sequence[jax.Array], layout: Any) -> list[jax.Array]:
        """End what `peek` has begun."""
        return list(found) if self.interpret else present.settle(regions, found, layout)

    def send(self, region: Any, values: jax.Array, layout: Any) -> None:
        """Store what warps have of a region, each its own part, if there is one."""
        if not self.interpret:
            present.send(region, values, layout)
            return

        def store(part: Any, value: jax.Array) -> None:
            part[...] = value

        for i, (part, real) in enumerate(region.parts):
            pl.when(real)(partial(store, part, values[i]))

    def scaled(self, found: jax.Array) -> jax.Array:
        """The sums of four tiles times the scales of their rows."""
        if self._batch == 1:
            return found * self._scales[0]
        layout = partial_sums(self.height)
        scales = lax.broadcast_in_dim(load(self._scales, layout.reduce((0, 2))), found.shape, (1,))
        return found * plgpu.layout_cast(scales, layout)

    def multiply(self, number: jax.Array, count: jax.Array, phase: Phase, deal: Deal) -> jax.Array:
        """This block's tiles of a phase times the x that is held from the `number`-th turn on; the count behind."""
        if self.interpret:
            plgpu.barrier_wait(self._arrived)
        for tiles, first, mine in deal:
            count = Sweep(self, phase, tiles, first, mine).multiply(number, count)
        self.complete(number + (self.turns(phase) - 1))  # a block without a tile has not waited
        return count

    def arrive(self, span: jax.Array, number: jax.Array) -> None:
        """Wait until a span of a phase is there, whose first turn has this number."""
        if self.interpret:  # which knows whole turns only, the first of which has been waited for
            pl.when((span > 0) & (lax.rem(span, self.places) == 0))(lambda: plgpu.barrier_wait(self._arrived))
        self._await(lax.rem(span, self.places), number + lax.div(span, self.places))

    def complete(self, number: jax.Array) -> None:
        """Wait until all is there of the turn of this number, and the scales."""
        self._await(self.places, number)

    def _await(self, span: Any, number: jax.Array) -> None:
        """Wait until a slot's inputs of the `number`-th turn are there."""
        if not self.interpret:
            ptx.wait(self._arrived, jnp.asarray(span, jnp.int32), lax.rem(number, 2))

    @property
    def height(self) -> int:
        """The rows of what is held."""
        return self._held.shape[0]

    @property
    def places(self) -> int:
        """How many slots' inputs are held at most."""
        return self._held.shape[1] // SPAN

    def nothing(self) -> jax.Array:
        """The sums of each warp before the first slot."""
        return full(0.0, sums_shape(self.height), partial_sums(self.height))

    def part(self, place: Any, count: jax.Array) -> jax.Array:
        """A slot's inputs of x: (height, SPAN), or (SPAN,) of one row, as `add` wants them. `count` is any slot's."""
        layout = inputs(self.height)
        x = load(columns(self._held, place * SPAN, SPAN), layout)
        return x if self.interpret else ptx.arrange(x, layout, lax.shift_right_logical(count, 31))

    def add(self, sums: jax.Array, count: jax.Array, x: jax.Array) -> jax.Array:
        """Add to the sums of the warps what the slot of this number gives with a part of x."""
        layouts = partial_sums(self.height), TILE, inputs(self.height)
        weights = self.take(count, lambda slot: load(self._weights(slot), TILE))
        if not self.interpret:
            return ptx.multiply(sums, weights, x, layouts)
        shape = (-1, SPAN // 128, 4, 32)  # the same as PTX does
        pieces = (array.astype(jnp.float32).reshape(shape) for array in (weights, x))
        return sums + jnp.einsum("nswi,bswi->wbn", *pieces).reshape(sums.shape)
