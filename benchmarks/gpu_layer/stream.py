"""Matrix-vector products whose weights are streamed through shared memory, and how they are laid out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 64  # inputs in a row of a vector's buffer
CHUNK = 8 * BLOCK  # inputs that a warpgroup takes at once, four to a thread
ROWS = 8  # outputs in a tile
WIDE = 2  # chunks in a slot of the ring
SLOTS = 10  # slots of (ROWS, WIDE · CHUNK) in a block's ring, all workers' together
SCRATCH = 2048  # bytes of shared memory in which the warps of a warpgroup add up

# How the 128 threads hold a tile of weights (rows, 8, 64), the inputs (8, 64) that it meets, and a value per row.
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((1, 8, BLOCK), (2, BLOCK), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
INPUTS = TILE.reduce((0,))
SUMS = TILE.reduce((1, 2))


def load(ref: Any, layout: Any) -> jax.Array:
    """Read a reference into registers in a layout; from global memory too, where rows may be narrow."""
    return plgpu.load(ref, layout=layout, optimized=False)


@dataclass(frozen=True)
class Vector:
    """A part of a buffer (n, 64) that holds a vector: from element `start`, a multiple of 64."""

    ref: Any
    start: int = 0

    def chunk(self, index: jax.Array, width: int) -> jax.Array:
        """Inputs [512·index, 512·(index + 1)) of a vector of `width`, float32; zeros behind its end."""
        first = jnp.minimum(self.start // BLOCK + index * 8, self.ref.shape[0] - 8)
        values = load(self.ref.at[pl.ds(first, 8)], INPUTS).astype(jnp.float32)
        inside = plgpu.broadcasted_iota(jnp.int32, (8, BLOCK), 0, layout=INPUTS) < width // BLOCK - index * 8
        return jnp.where(inside, values, 0.0)

    def rows(self, row: jax.Array) -> Any:
        """The reference to elements [row, row + ROWS)."""
        element = row + self.start
        return self.ref.at[lax.div(element, BLOCK), pl.ds(lax.rem(element, BLOCK), ROWS)]

    def half(self, element: jax.Array, width: int) -> Any:
        """The reference to `width` elements from a dynamic one, a multiple of `width`, which divides 64."""
        element = element + self.start
        return self.ref.at[lax.div(element, BLOCK), pl.ds(lax.rem(element, BLOCK), width)]


@dataclass(frozen=True)
class X:
    """What a product reads: a vector of `width`, with RMSNorm where it has a `gain`."""

    vector: Vector
    width: int
    gain: Any = None
    eps: float = 0.0

    def scale(self) -> jax.Array | float:
        """What the norm multiplies with, beside its gain."""
        if self.gain is None:
            return 1.0

        def add(i: jax.Array, squares: jax.Array) -> jax.Array:
            values = self.vector.chunk(i, self.width)
            return squares + values * values

        none = plgpu.layout_cast(jnp.zeros((8, BLOCK), jnp.float32), INPUTS)
        squares = lax.fori_loop(0, chunks(self.width), add, none)
        return lax.rsqrt(jnp.sum(jnp.sum(squares, axis=1), axis=0) / self.width + self.eps)

    def chunk(self, index: jax.Array, scale: jax.Array | float) -> jax.Array:
        """See `Vector.chunk`."""
        values = self.vector.chunk(index, self.width)
        return values if self.gain is None else values * scale * Vector(self.gain).chunk(index, self.width)


@dataclass(frozen=True)
class Streamed:
    """Rows [row, row + rows) of a weight (n, inputs/64, 64), and the index of the x that they meet."""

    weight: Any
    row: int
    inputs: int
    x: int = 0


@dataclass(frozen=True)
class Phase:
    """Products that need no barrier between them.

    Each of `tiles` is (rows, streamed members, store): a tile takes ROWS rows of each member, and `store(row, sums)`
    does what is to be done with their products.
    """

    xs: list[X]
    tiles: list[tuple[int, list[Streamed], Callable[[jax.Array, list[jax.Array]], None]]]


def chunks(width: int) -> int:
    """How many chunks an x of this width is."""
    return -(-width // CHUNK)


def slots(width: int) -> int:
    """How many slots a tile of this width takes."""
    return -(-chunks(width) // WIDE)


class Stream:
    """Rings of weight tiles, one for each worker: `fill` runs in the thread that copies, `multiply` in the workers.

    The workers take turns at the block's tiles. A slot belongs to one worker for good, because a thread must wait for
    every phase of a barrier to know which one comes next.
    """

    def __init__(self, block: jax.Array, blocks: int, workers: int, scratch: Sequence[Any]) -> None:
        self._block, self._blocks, self._workers = block, blocks, workers
        self._ring, self._held, self._full, self._empty, self._local = scratch
        self._slots = SLOTS // workers

    def _slot(self, worker: Any, count: jax.Array) -> jax.Array:
        return worker * self._slots + lax.rem(count, self._slots)

    def _share(self, tiles: int, shift: int) -> tuple[jax.Array, jax.Array]:
        """This block's first tile of `tiles`, dealt out from block `shift` on, and how many it has."""
        first = lax.rem(self._block + (self._blocks - shift), self._blocks)
        return first, lax.div(tiles - first + self._blocks - 1, self._blocks)

    def _deal(self, phases: Sequence[Phase]) -> list[list[tuple[jax.Array, jax.Array]]]:
        """The shares of all phases: each begins where the one before ended, which evens out the remainders."""
        shift, shares = 0, []
        for phase in phases:
            shares.append([])
            for rows, _, _ in phase.tiles:
                shares[-1].append(self._share(rows // ROWS, shift))
                shift = (shift + rows // ROWS) % self._blocks
        return shares

    def fill(self, phases: Sequence[Phase]) -> None:
        """Copy every tile that this block will need, in order, each as soon as its slot is free."""
        turn, counts = jnp.int32(0), (jnp.int32(0),) * self._workers
        for phase, shares in zip(phases, self._deal(phases), strict=True):
            for (_, members, _), (first, tiles) in zip(phase.tiles, shares, strict=True):

                def tile(i: jax.Array, at: Any, members: Any = members, first: Any = first) -> Any:
                    turn, counts = at
                    worker, row = lax.rem(turn, self._workers), (first + i * self._blocks) * ROWS
                    count = counts[0] if self._workers == 1 else jnp.where(worker == 0, *counts)
                    for member in members:

                        def copy(part: jax.Array, count: jax.Array, member: Streamed = member) -> jax.Array:
                            slot = self._slot(worker, count)

                            @pl.when(count >= self._slots)
                            def wait() -> None:
                                plgpu.barrier_wait(self._empty.at[slot])

                            # The last slot may reach over the edge, where the copy reads zeros.
                            columns = pl.ds(part * WIDE * 8, WIDE * 8)
                            source = member.weight.at[pl.ds(row + member.row, ROWS), columns]
                            plgpu.copy_gmem_to_smem(source, self._ring.at[slot], self._full.at[slot])
                            return count + 1

                        count = lax.fori_loop(0, slots(member.inputs), copy, count)
                    counts = tuple(jnp.where(worker == w, count, old) for w, old in enumerate(counts))
                    return turn + 1, counts

                turn, counts = lax.fori_loop(0, tiles, tile, (turn, counts))
        for worker, count in enumerate(counts):

            def drain(i: jax.Array, _: None, worker: int = worker) -> None:
                plgpu.barrier_wait(self._empty.at[self._slot(worker, i)])

            lax.fori_loop(jnp.maximum(count - self._slots, 0), count, drain, None)

    def together(self) -> None:
        """The workers of the block wait for each other."""
        plgpu.barrier_arrive(self._local)
        plgpu.barrier_wait(self._local)

    def _hold(self, worker: int, xs: Sequence[X]) -> list[int]:
        """Put the xs into shared memory, whole slots of each, the workers in turns: the row where each begins."""
        starts, end = [], 0
        for x in xs:
            starts.append(end)
            scale, count = x.scale(), slots(x.width) * WIDE

            def copy(i: jax.Array, _: None, x: X = x, scale: Any = scale, start: int = end) -> None:
                chunk = i * self._workers + worker
                self._held.at[pl.ds(start + chunk * 8, 8)][...] = x.chunk(chunk, scale)

            lax.fori_loop(0, -(-(count - worker) // self._workers), copy, None)
            end += count * 8
        self.together()
        return starts

    def _product(self, worker: int, count: jax.Array, inputs: int, start: int) -> jax.Array:
        """The sums (ROWS,) of a tile whose slots begin at `count`, with the x at row `start`."""

        def add(part: jax.Array, total: jax.Array) -> jax.Array:
            slot = self._slot(worker, count + part)
            plgpu.barrier_wait(self._full.at[slot])
            for i in range(WIDE):
                weights = load(self._ring.at[slot, :, pl.ds(i * 8, 8)], TILE).astype(jnp.float32)
                x = load(self._held.at[pl.ds(start + (part * WIDE + i) * 8, 8)], INPUTS)
                total = total + weights * plgpu.layout_cast(lax.broadcast_in_dim(x, weights.shape, (1, 2)), TILE)
            plgpu.barrier_arrive(self._empty.at[slot])
            return total

        none = plgpu.layout_cast(jnp.zeros((ROWS, 8, BLOCK), jnp.float32), TILE)
        return jnp.sum(jnp.sum(lax.fori_loop(0, slots(inputs), add, none), axis=2), axis=1)

    def multiply(self, worker: int, phases: Sequence[Phase], between: Callable[[int], None]) -> None:
        """Run the phases; `between(i)` runs behind the first i. The workers take turns at this block's tiles."""
        count = turn = jnp.int32(0)
        for number, (phase, shares) in enumerate(zip(phases, self._deal(phases), strict=True)):
            held = self._hold(worker, phase.xs)
            for (_, members, store), (first, tiles) in zip(phase.tiles, shares, strict=True):
                ends = [sum(slots(member.inputs) for member in members[:j]) for j in range(len(members) + 1)]

                def tile(
                    i: jax.Array,
                    at: Any,
                    members: Any = members,
                    first: Any = first,
                    store: Any = store,
                    ends: Any = ends,
                    held: Any = held,
                ) -> Any:
                    count, turn = at
                    is_mine = lax.rem(turn, self._workers) == worker

                    @pl.when(is_mine)
                    def mine() -> None:
                        sums = [
                            self._product(worker, count + end, member.inputs, held[member.x])
                            for end, member in zip(ends, members, strict=False)
                        ]
                        store((first + i * self._blocks) * ROWS, sums)

                    return count + jnp.where(is_mine, ends[-1], 0), turn + 1

                count, turn = lax.fori_loop(0, tiles, tile, (count, turn))
            between(number + 1)
