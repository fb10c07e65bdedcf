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
from dataclasses import dataclass
from functools import partial, reduce
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
TOKENS = 32  # tokens that a block attends to at once
SPLITS = 16  # parts of the cache that are attended to side by side, per head of keys
NOTHING = -1e30  # the maximum of no scores

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
class Group:
    """Matrices that read the same x, as `Products` takes them: outputs, and ranks (None where dense)."""

    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int | None, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """What each member adds to the group's first product."""
        return tuple(rank or outputs for rank, outputs in zip(self.ranks, self.outputs, strict=True))


@dataclass(frozen=True)
class LayerShape:
    """Everything static about a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    head_norms: bool
    qkv: Group
    o: Group
    gate_up: Group
    down: Group


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


@dataclass(frozen=True)
class Heads:
    """Attention of one new token to the cache: the layouts of heads, and the two steps of it."""

    shape: LayerShape
    unit: jax.Array  # which of `units` warpgroups of the grid this is
    units: int
    position: jax.Array
    cosines: Any
    sines: Any
    norms: Sequence[Any]
    keys: Any
    values: Any
    parts: Any  # (heads, SPLITS, head_dim): what each part of the cache mixes, not yet divided by its total
    tops: Any  # (heads, SPLITS): the greatest score of each part
    totals: Any  # (heads, SPLITS): the sum of the exponentials there

    @property
    def half(self) -> int:
        """RoPE pairs element i with i + head_dim/2, so heads are held as two halves."""
        return self.shape.head_dim // 2

    @property
    def pairs(self) -> Any:
        """Four tokens, one per warp, and half of a head over the lanes."""
        return plgpu.Layout.TILED(
            plgpu.Tiling(((4, self.half), (self.half // 32,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )

    def every(self, count: int) -> Callable[[Callable[[jax.Array], None]], None]:
        """Run a function for this block's share of `count` items."""

        def run(item: Callable[[jax.Array], None]) -> None:
            share = lax.div(count - self.unit + (self.units - 1), self.units)
            lax.fori_loop(0, share, lambda i, _: item(self.unit + i * self.units), None)

        return run

    def head(self, source: Vector, index: jax.Array, weight: Any | None) -> tuple[jax.Array, jax.Array]:
        """The halves of head `index`, normed where there is a weight."""
        width, layout = self.shape.head_dim, self.pairs.reduce((0,))
        low, high = (load(source.half(index * width + at, self.half), layout) for at in (0, self.half))
        if weight is None:
            return low, high
        mean = jnp.sum(low * low + high * high, axis=0) / width
        scale = lax.rsqrt(mean + self.shape.eps)
        gains = [load(weight.at[pl.ds(at, self.half)], layout).astype(jnp.float32) for at in (0, self.half)]
        return low * scale * gains[0], high * scale * gains[1]

    def rotate(self, halves: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """RoPE at the new token's position."""
        layout = self.pairs.reduce((0,))
        low, high = halves
        cosine, sine = load(self.cosines, layout), load(self.sines, layout)
        return low * cosine - high * sine, high * cosine + low * sine

    def attend(self, q: Vector, k: Vector, v: Vector) -> None:
        """The parts, `SPLITS` a head of keys, dealt out to the blocks; the first also attends to the new token."""
        shape, half = self.shape, self.half
        group = shape.heads // shape.kv_heads
        pairs, token = self.pairs, self.pairs.reduce((1,))
        q_weight, k_weight = self.norms or (None, None)

        @self.every(shape.kv_heads * SPLITS)
        def item(index: jax.Array) -> None:
            kv_head, split = lax.div(index, SPLITS), lax.rem(index, SPLITS)
            scale = shape.head_dim**-0.5
            queries = []
            for i in range(group):
                low, high = self.rotate(self.head(q, kv_head * group + i, q_weight))
                queries.append((low * scale, high * scale))
            key = self.rotate(self.head(k, kv_head, k_weight))
            value = self.head(v, kv_head, None)

            @pl.when(split == 0)
            def append() -> None:
                for at, low_high in zip((self.keys, self.values), (key, value), strict=True):
                    for start, piece in zip((0, half), low_high, strict=True):
                        at.at[kv_head, self.position, pl.ds(start, half)][...] = piece.astype(at.dtype)

            # The new token counts once: with the first warp of the first part.
            mine = plgpu.broadcasted_iota(jnp.int32, (4, half), 0, layout=pairs) + split == 0
            alone = plgpu.broadcasted_iota(jnp.int32, (4,), 0, layout=token) + split == 0

            def spread(x: jax.Array, axis: int) -> jax.Array:
                return plgpu.layout_cast(lax.broadcast_in_dim(x, (4, half), (axis,)), pairs)

            def full(fill: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
                return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)

            state = []
            for low, high in queries:
                score = jnp.sum(low * key[0] + high * key[1], axis=0)
                state.append(jnp.where(alone, full(1.0, (4,), token) * score, full(NOTHING, (4,), token)))
                state.append(jnp.where(alone, full(1.0, (4,), token), full(0.0, (4,), token)))
                state += [jnp.where(mine, spread(piece, 1), full(0.0, (4, half), pairs)) for piece in value]

            # Each part has the same number of tokens, whole tiles of them; the last ones may have none.
            share = lax.div(self.position + (SPLITS * TOKENS - 1), SPLITS * TOKENS) * TOKENS
            begin = split * share
            end = jnp.minimum(begin + share, self.position)
            tiles = lax.div(jnp.maximum(end - begin, 0) + (TOKENS - 1), TOKENS)

            def tile(i: jax.Array, state: list[jax.Array]) -> list[jax.Array]:
                base = begin + i * TOKENS
                rows = [base + j for j in range(0, TOKENS, 4)]

                def halves(cache: Any) -> list[list[jax.Array]]:
                    return [
                        [
                            load(cache.at[kv_head, pl.ds(row, 4), pl.ds(at, half)], pairs).astype(jnp.float32)
                            for at in (0, half)
                        ]
                        for row in rows
                    ]

                ks, vs = halves(self.keys), halves(self.values)
                seen = [plgpu.broadcasted_iota(jnp.int32, (4,), 0, layout=token) + row < end for row in rows]
                result = []
                for g, (low, high) in enumerate(queries):
                    top, total, *mixed = state[4 * g : 4 * g + 4]
                    scores = [
                        jnp.where(see, jnp.sum(k[0] * spread(low, 1) + k[1] * spread(high, 1), axis=1), NOTHING)
                        for see, k in zip(seen, ks, strict=True)
                    ]
                    new_top = reduce(jnp.maximum, scores, top)
                    shrink = jnp.exp(top - new_top)
                    weights = [jnp.exp(score - new_top) for score in scores]
                    total = reduce(jnp.add, weights, total * shrink)
                    mixed = [piece * spread(shrink, 0) for piece in mixed]
                    for weight, value in zip(weights, vs, strict=True):
                        mixed = [piece + spread(weight, 0) * part for piece, part in zip(mixed, value, strict=True)]
                    result += [new_top, total, *mixed]
                return result

            state = lax.fori_loop(0, tiles, tile, state)
            for g in range(group):
                top, total, *mixed = state[4 * g : 4 * g + 4]
                greatest = jnp.max(top, axis=0)
                shrink = jnp.exp(top - greatest)
                head = kv_head * group + g
                self.tops[head, split] = greatest
                self.totals[head, split] = jnp.sum(total * shrink, axis=0)
                for start, piece in zip((0, half), mixed, strict=True):
                    self.parts.at[head, split, pl.ds(start, half)][...] = jnp.sum(piece * spread(shrink, 0), axis=0)

    def combine(self, target: Vector) -> None:
        """Put the parts of each head together."""

        @self.every(self.shape.heads)
        def item(head: jax.Array) -> None:
            tops = [self.tops[head, split] for split in range(SPLITS)]
            greatest = reduce(jnp.maximum, tops)
            weights = [jnp.exp(top - greatest) for top in tops]
            total = reduce(jnp.add, [weight * self.totals[head, split] for split, weight in enumerate(weights)])
            for start in (0, self.half):
                parts = [
                    load(self.parts.at[head, split, pl.ds(start, self.half)], self.pairs.reduce((0,))) * weight
                    for split, weight in enumerate(weights)
                ]
                mixed = reduce(jnp.add, parts) / total
                target.half(head * self.shape.head_dim + start, self.half)[...] = mixed


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
