"""Matrix-vector products whose weights are streamed through shared memory.

One warpgroup of a block does nothing but copy tiles of weights into a ring, by TMA and as far ahead as the ring has
room, across products and layers. Another multiplies them with x, which lies in shared memory too, on tensor cores: not
for their speed, but as one instruction then does what eighteen did.
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

from jaxsvd.kernels.gpu import ptx
from jaxsvd.kernels.gpu.perlayer import load
from jaxsvd.kernels.gpu.shape import NORMED, ROWS, SPAN, roomy, slots, whole

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
class X:
    """Something that products read: elements [start, start + width), with RMSNorm where there is a `gain`.

    `ref` is bfloat16 without a norm and float32 with one. It is read in whole slots there, here NORMED elements at a
    time, as `gain` is. Where the width is known at run time only, it is at most `most`.
    """

    ref: Any
    start: Any
    width: Any
    most: int
    gain: Any = None
    eps: float = 0.0


@dataclass(frozen=True)
class Streamed:
    """Rows of a weight (n, inputs) from `row` on, and where what they are multiplied with lies in shared memory."""

    weight: Any  # PerLayer
    inputs: Any
    row: Any = 0
    x: int = 0


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
    holds behind the edge of its weight is left from another.
    """

    x: Sequence[X]
    tiles: Sequence[Tiles]


# Of a phase: its tiles, this block's first one of them, and how many it has.
Deal = list[tuple[Tiles, jax.Array, jax.Array]]


class Stream:
    """A block's ring: `fill` runs in the warpgroup that copies, `multiply` in the other.

    Both walk the same tiles in the same order, and count the slots that they have used.
    """

    def __init__(self, block: jax.Array, blocks: int, slots: int, scratch: Sequence[Any], interpret: bool) -> None:
        self._block, self._blocks, self._slots, self.interpret = block, blocks, slots, interpret
        self._ring, self._held, self._full, self._empty, self._together, self._ready = scratch

    @staticmethod
    def scratch(slots: int, held: int, interpret: bool) -> list[Any]:
        """What a block needs in shared memory."""
        return [
            plgpu.SMEM((slots, ROWS, SPAN), jnp.bfloat16),
            plgpu.SMEM((held,), jnp.bfloat16),
            plgpu.Barrier(num_barriers=slots) if interpret else plgpu.SMEM((slots, 2), jnp.int32),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ]

    def open(self) -> None:
        """Before `fill`: a ring of zeros, as what is behind the edge of a weight is multiplied, if only with zeros."""
        if not self.interpret:
            ptx.prepare(self._full)
            layout = plgpu.Layout.WG_STRIDED((ROWS, SPAN), 8)
            for slot in range(self._slots):
                self._ring.at[slot][...] = full(0.0, (ROWS, SPAN), layout, jnp.bfloat16)
            plgpu.commit_smem()
        plgpu.barrier_arrive(self._ready)

    def join(self) -> None:
        """Before `multiply`: wait until the ring is open."""
        plgpu.barrier_wait(self._ready)

    def deal(self, phases: Sequence[Phase]) -> list[Deal]:
        """What this block has of each phase.

        Each deal begins with the block where the one before ended, which evens out the remainders.
        """
        shift, deals = jnp.int32(0), []
        for phase in phases:
            deals.append([])
            for tiles in phase.tiles:
                first = lax.rem(self._block + (self._blocks - shift), self._blocks)
                deals[-1].append((tiles, first, share(tiles.count, first, self._blocks)))
                shift = lax.rem(shift + tiles.count, self._blocks)
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
                            fetch = partial(member.weight.fetch, row, part * SPAN, member.inputs)
                            return self.put(count, fetch)

                        count = lax.fori_loop(0, slots(member.inputs), copy, count)
                    return count

                count = lax.fori_loop(0, mine, tile, count)
        return count

    def put(self, count: jax.Array, fetch: Callable[[Any, Any, jax.Array], None]) -> jax.Array:
        """Fill the next slot as soon as it is empty, by `fetch(slot, barriers, its number)`; the count behind it."""
        slot = lax.rem(count, self._slots)

        @pl.when(count >= self._slots)
        def wait() -> None:
            plgpu.barrier_wait(self._empty.at[slot])

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
        plgpu.barrier_arrive(self._empty.at[slot])
        return found

    def together(self) -> None:
        """What any thread of the warpgroup has stored in shared memory before is seen by all behind it."""
        plgpu.barrier_arrive(self._together)
        plgpu.barrier_wait(self._together)

    def drain(self, count: jax.Array) -> None:
        """Wait until all that was copied has been used: no block may end before."""

        def wait(i: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self._empty.at[lax.rem(i, self._slots)])

        lax.fori_loop(jnp.maximum(count - self._slots, 0), count, wait, None)

    def hold(self, layer: jax.Array, phase: Phase) -> None:
        """Put what a phase reads into shared memory, bfloat16. All threads have left the phase before."""
        place = 0
        for x, values in [(x, self._read(layer, x)) for x in phase.x]:  # none waits for another
            self._held.at[pl.ds(place, values.size)][...] = values
            if rest := roomy(x.most) - values.size:
                zeros = full(0.0, (rest,), strided(4), jnp.bfloat16)
                self._held.at[pl.ds(place + values.size, rest)][...] = zeros
            place += roomy(x.most)
        self.together()

    @staticmethod
    def _read(layer: jax.Array, x: X) -> jax.Array:
        """x as bfloat16, and zeros behind its end."""
        size = whole(x.most, SPAN if x.gain is None else NORMED)
        layout = strided(8 if x.gain is None else 4)  # 16 bytes
        values = load(x.ref.at[pl.ds(x.start, size)], layout)
        gain = None if x.gain is None else load(x.gain.at[layer, pl.ds(0, size)], layout).astype(jnp.float32)
        if not isinstance(x.width, int) or size > x.width:
            inside = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) < x.width
            values = jnp.where(inside, values, jnp.zeros((), values.dtype))
        if gain is None:
            return values
        scale = lax.rsqrt(jnp.sum(values * values) / x.width + x.eps)
        return (values * scale * gain).astype(jnp.bfloat16)

    def multiply(self, count: jax.Array, deal: Deal) -> jax.Array:
        """This block's tiles of a phase times the x that is held; the count behind them."""
        for tiles, first, mine in deal:

            def tile(i: jax.Array, count: jax.Array, tiles: Tiles = tiles, first: Any = first) -> jax.Array:
                row = self._row(first, i)
                early, sums = tiles.early(row), []
                for member in tiles.members:
                    sums.append(self._product(count, member))
                    count = count + slots(member.inputs)
                tiles.store(row, sums, early)
                return count

            count = lax.fori_loop(0, mine, tile, count)
        return count

    def _product(self, count: jax.Array, member: Streamed) -> jax.Array:
        """The sums (ROWS,) of a tile whose slots begin at `count`."""

        def add(part: jax.Array, sums: jax.Array) -> jax.Array:
            def read(slot: Any) -> tuple[jax.Array, jax.Array]:
                return load(slot, TILE), load(self._held.at[pl.ds(member.x + part * SPAN, SPAN)], INPUTS)

            weights, x = self.take(count + part, read)
            if not self.interpret:
                return ptx.multiply(sums, weights, x, (PARTIAL, TILE, INPUTS))
            shape = (ROWS, SPAN // 128, 4, 32)  # the same as PTX does
            pieces = weights.astype(jnp.float32).reshape(shape) * x.astype(jnp.float32).reshape(shape[1:])
            return sums + pieces.sum((1, 3)).T

        sums = lax.fori_loop(0, slots(member.inputs), add, full(0.0, (4, ROWS), PARTIAL))
        return jnp.sum(sums, axis=0)
