"""Attention of each row's new token to the cache, dealt out to the blocks: two steps, or one.

This is split-K flash decoding (Dao et al. 2023) for grouped queries: each block takes some heads of keys and some
tokens, and the queries of a head of keys share what it reads. In a second step, behind a meeting, the parts of a head
are put together, unless there is but one, or a pair of blocks has its two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import copies, flash, ptx
from jaxsvd.kernels.gpu.layouts import full
from jaxsvd.kernels.gpu.perlayer import PerLayer, load
from jaxsvd.kernels.gpu.regions import Piece
from jaxsvd.kernels.gpu.shape import HEADS, TOKENS, WARPS, LayerShape, splits, whole
from jaxsvd.kernels.gpu.stream import Stream, share

Halves = Sequence[jax.Array]  # of one head (head_dim/2,), or of four (4, head_dim/2): RoPE pairs their elements


def four(i: int) -> Any:
    """The i-th four heads."""
    return pl.ds(i * WARPS, WARPS)


@dataclass(frozen=True)
class Attention:
    """The two steps. `vectors` bfloat16 holds q, k and v at `heads` of each row, and gets the result at `mixed`.

    Where there is only one part of the cache of a head, or a pair of blocks has its two, `attend` gives the result, and
    `combine` is not needed.
    """

    shape: LayerShape
    layer: jax.Array
    block: jax.Array
    blocks: int
    batch: int
    positions: Any  # of the new tokens, (batch,)
    angles: Sequence[Any]  # cosines and sines, float32 (batch, head_dim/2)
    norms: Sequence[Any]  # of the heads of q and k, (layers, head_dim), or none
    caches: Sequence[PerLayer]  # keys and values, (batch·kv_heads, capacity, head_dim)
    vectors: Any
    heads: Sequence[int]
    mixed: int
    partial: Sequence[Any]  # what each part of the cache gives: see `partials`
    warps: Sequence[Any]  # in shared memory, what each warp gives: see `scratch`
    of_pair: Sequence[Any]  # where its two blocks have the two parts of a head: see `pair_scratch`

    @staticmethod
    def partials(shape: LayerShape, batch: int) -> list[tuple[int, ...]]:
        """Of each head of keys of all rows, each part, and each of its queries: (…), (…), (…, head_dim) float32.

        The greatest score, the sum of exponentials, and the mix of values, not yet divided by the sum. There is room
        for queries in whole fours.
        """
        kv_heads = batch * shape.kv_heads
        each = kv_heads, splits(kv_heads), whole(shape.heads // shape.kv_heads, WARPS)
        return [each, each, (*each, shape.head_dim)]

    @staticmethod
    def scratch(shape: LayerShape) -> list[Any]:
        """Queries, and of each warp the same as of a part: see `LayerShape.sides`."""
        queries, *warps = shape.sides
        return [plgpu.SMEM(queries, jnp.bfloat16), *(plgpu.SMEM(size, jnp.float32) for size in warps)]

    @staticmethod
    def pair_scratch(handed: tuple[int, ...] | None) -> list[Any]:
        """What the first block of a pair is handed by the other, and the barrier of it: see `LayerShape.handed`."""
        return [plgpu.SMEM(handed, jnp.float32), plgpu.SMEM((1, 2), jnp.int32)] if handed else []

    @property
    def half(self) -> int:
        """RoPE pairs element i with i + head_dim/2, so heads are held as two halves."""
        return self.shape.head_dim // 2

    @staticmethod
    def spread(width: int, alike: bool = True) -> Any:
        """How warps hold so many numbers: over the lanes, all alike, or four times so many."""
        tiling = plgpu.Tiling(((WARPS, width), (width // 32,)))
        layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        return layout.reduce((0,)) if alike else layout

    @property
    def halves(self) -> Any:
        """How they hold half of a head."""
        return self.spread(self.half)

    def mine(self, count: int) -> jax.Array:
        """How many of `count` items are this block's: every `blocks`-th."""
        return share(count, self.block, self.blocks)

    @property
    def apart(self) -> Any:
        """How they hold the halves of four heads, (4, head_dim/2): each has its own."""
        return self.spread(self.half, alike=False)

    def across(self, x: jax.Array, axis: int) -> jax.Array:
        """The same for the halves of four heads, (4, head_dim/2), of what is along one axis of them."""
        wide = lax.broadcast_in_dim(x, (WARPS, self.half), (axis,))
        return plgpu.layout_cast(wide, self.apart)

    def pieces(self, ref: Any) -> list[list[Piece]]:
        """The halves of heads (n·head_dim,), four heads at a time."""
        count = ref.shape[0] // self.shape.head_dim
        return [[Piece(ref, count, first, at, self.half) for at in (0, self.half)] for first in range(0, count, WARPS)]

    def turned(self, halves: Halves, angles: Halves, gains: Halves) -> Halves:
        """What attends of a head of q or k, or of four: normed with these weights, if any, and rotated."""
        low, high = (half.astype(jnp.float32) for half in halves)
        along = (lambda x: self.across(x, 1)) if low.ndim > 1 else (lambda x: x)
        if gains:
            mean = jnp.sum(low * low + high * high, axis=-1) / self.shape.head_dim
            scale = lax.rsqrt(mean + self.shape.eps)
            scale = self.across(scale, 0) if low.ndim > 1 else scale
            low, high = (x * scale * along(gain) for x, gain in zip((low, high), gains, strict=True))
        cosine, sine = map(along, angles)
        return low * cosine - high * sine, high * cosine + low * sine

    def append(self, kv_head: jax.Array, position: jax.Array, key: Halves, value: Halves) -> None:
        """The new token to the cache of a head of keys, one of all rows'."""
        for cache, halves in zip(self.caches, (key, value), strict=True):
            for at, half in zip((0, self.half), halves, strict=True):
                place = kv_head, position, pl.ds(at, self.half)
                cache.store(place, half.astype(jnp.bfloat16), self.halves)

    @property
    def group(self) -> int:
        """The heads of queries to a head of keys."""
        return self.shape.heads // self.shape.kv_heads

    @property
    def kv_heads(self) -> int:
        """The heads of keys of all rows."""
        return self.batch * self.shape.kv_heads

    @property
    def splits(self) -> int:
        """The parts of each."""
        return splits(self.kv_heads)

    def part(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Of a part: its head of keys, its number there, its first token, and the one behind its last."""
        kv_head, split = lax.div(index, self.splits), lax.rem(index, self.splits)
        position = self.position(kv_head)
        # Each part has the same number of tokens, whole tiles of them; the last ones may have none.
        length = lax.div(position + (self.splits * TOKENS - 1), self.splits * TOKENS) * TOKENS
        begin = split * length
        return kv_head, split, begin, jnp.minimum(begin + length, position)

    def position(self, kv_head: jax.Array) -> jax.Array:
        """Of the new token of the row whose head of keys this is: the last one, if it is behind, as XLA does."""
        _, capacity, _ = self.caches[0].refs[0].shape
        return jnp.minimum(self.positions[lax.div(kv_head, self.shape.kv_heads)], capacity - 1)

    def fill(self, stream: Stream, count: jax.Array) -> jax.Array:
        """Copy keys and values of this block's parts into the ring; the count behind them.

        In Pallas' interpreter, which has no word for this, they are read where they lie.
        """
        keys, values = self.caches
        _, capacity, width = keys.refs[0].shape

        def item(i: jax.Array, count: jax.Array) -> jax.Array:
            kv_head, _, begin, end = self.part(self.block + i * self.blocks)

            def tile(i: jax.Array, count: jax.Array) -> jax.Array:
                # The new token may be among them or not: it is not looked at there.
                start = (kv_head * capacity + begin + i * TOKENS) * width
                return stream.put(count, partial(keys.fetch_with, values, start, TOKENS * width))

            return lax.fori_loop(0, self.tiles(begin, end), tile, count)

        return count if stream.interpret else lax.fori_loop(0, self.mine(self.kv_heads * self.splits), item, count)

    def two(
        self, stream: Stream, count: jax.Array, kv_head: jax.Array, start: jax.Array, more: jax.Array
    ) -> tuple[flash.Tiles, jax.Array]:
        """Two tiles, of tokens from `start` on, or twice one if `more` is 0, not 1; the count behind their slots."""
        width = self.shape.head_dim
        if not stream.interpret:
            return stream.take_two(count, more, lambda slots: flash.held(slots, width)), count + 1 + more
        starts = start, start + more * TOKENS
        regions = [(kv_head, pl.ds(first, TOKENS), pl.ds(0, width)) for first in starts]
        layouts = flash.KEYS, flash.values(width)
        pairs = zip(self.caches, layouts, strict=True)
        return [cache.load(region, layout) for cache, layout in pairs for region in regions], count

    @staticmethod
    def tiles(begin: jax.Array, end: jax.Array) -> jax.Array:
        """How many a part has."""
        return lax.div(jnp.maximum(end - begin, 0) + (TOKENS - 1), TOKENS)

    def asked(self, stream: Stream, row: jax.Array, own: jax.Array) -> tuple[list[Halves], Halves, Halves]:
        """Queries, scaled and four heads at a time, with the key and value of a row's head of keys: halves each."""
        width, size = self.shape.head_dim, self.group * self.shape.head_dim
        # All is loaded and computed before anything is stored, so that nothing waits for something else.
        asked = self.pieces(self.vectors.at[row, pl.ds(self.heads[0] + own * size, size)])
        asked = [half for halves in asked for half in halves]
        given = [
            self.vectors.at[row, pl.ds(self.heads[kind] + own * width + at, self.half)]
            for kind in (1, 2)
            for at in (0, self.half)
        ]
        peeked = stream.peek(asked, self.apart), stream.peek(given, self.halves)
        angles = [load(angle.at[row, pl.ds(0, self.half)], self.halves) for angle in self.angles]
        gains = [
            [load(norm.at[self.layer, pl.ds(at, self.half)], self.halves) for at in (0, self.half)]
            for norm in self.norms
        ]
        halves = stream.settle(asked, peeked[0], self.apart)
        *key, low, high = stream.settle(given, peeked[1], self.halves)
        value = [half.astype(jnp.float32) for half in (low, high)]
        gains = [[gain.astype(jnp.float32) for gain in one] for one in gains] or [[], []]
        key = self.turned(key, angles, gains[1])
        queries = [self.turned(pair, angles, gains[0]) for pair in zip(halves[::2], halves[1::2], strict=True)]
        return [[half * width**-0.5 for half in pair] for pair in queries], key, value

    def attend(self, stream: Stream, count: jax.Array) -> jax.Array:
        """The parts, dealt out to the blocks; the count behind them.

        The first part of each head of keys also attends to the new token.
        """
        shape, (asking, *_) = self.shape, self.warps
        group = self.group * shape.head_dim

        def item(i: jax.Array, count: jax.Array) -> jax.Array:
            index = self.block + i * self.blocks
            kv_head, split, begin, end = self.part(index)
            row, own = lax.div(kv_head, shape.kv_heads), lax.rem(kv_head, shape.kv_heads)  # its number in the row
            queries, key, value = self.asked(stream, row, own)
            # Of the new token, with which the first part begins.
            behind = jnp.where(split == 0, 0.0, flash.NOTHING)
            scores = [
                jnp.sum(low * self.across(key[0], 1) + high * self.across(key[1], 1), axis=1) + behind
                for low, high in queries
            ]
            pl.when(split == 0)(lambda: self.append(kv_head, self.position(kv_head), key, value))
            for n, pair in enumerate(queries):
                for start, x in zip((0, self.half), pair, strict=True):
                    asking.at[four(n), pl.ds(start, self.half)][...] = x.astype(jnp.bfloat16)
            stream.together()
            rows = range(0, shape.together, HEADS)
            held = [load(asking.at[pl.ds(row, HEADS)], flash.QUERIES) for row in rows]
            if not stream.interpret:
                zero = lax.shift_right_logical(count, 31)
                held = [ptx.arrange(q, flash.QUERIES, zero, beside=True) for q in held]
            tiles = self.tiles(begin, end)

            def two(i: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
                states, count = carry
                start, more = begin + 2 * i * TOKENS, jnp.minimum(tiles - 2 * i, 2) - 1
                given, count = self.two(stream, count, kv_head, start, more)
                pairs = zip(states, held, strict=True)
                return [flash.step(state, q, given, end - start, stream.interpret) for state, q in pairs], count

            start = [self.nothing() for _ in rows], count
            states, count = lax.fori_loop(0, lax.div(tiles + 1, 2), two, start)
            mixed = self.vectors.at[row, pl.ds(self.mixed + own * group, group)]
            self.gather(stream, kv_head, split, states, scores, value, self.pieces(mixed))
            return count

        return lax.fori_loop(0, self.mine(self.kv_heads * self.splits), item, count)

    def nothing(self) -> flash.State:
        """Where no token has been attended to."""
        stats, width = (WARPS, HEADS), self.shape.head_dim
        tops, totals = (full(value, stats, flash.STATS) for value in (flash.NOTHING, 0.0))
        return tops, totals, full(0.0, (*stats, width), flash.mixed(width))

    def gather(
        self,
        stream: Stream,
        kv_head: jax.Array,
        split: jax.Array,
        states: Sequence[flash.State],
        scores: Sequence[jax.Array],
        value: Halves,
        targets: Sequence[Sequence[Piece]],
    ) -> None:
        """Put together what the warps have of a part and the new token: each warp for a head of four.

        The results go to the `targets`, if there is but one part, or the other one is that of the other block of a
        pair, else to `partial`.
        """
        tops, totals, sides = self.warps[1:]
        stream.together()  # all have read what the part before has left there
        for i, state in enumerate(states):
            heads = pl.ds(i * HEADS, HEADS)
            for ref, x in zip((tops, totals, sides), state, strict=True):
                ref.at[:, heads][...] = x
        stream.together()
        warps, one = range(WARPS), self.apart.reduce((1,))
        mine = []
        for i, score in enumerate(scores):
            each = [*(load(tops.at[warp, four(i)], one) for warp in warps), score]
            top = reduce(jnp.maximum, each)
            *shrinks, new = [jnp.exp(x - top) for x in each]
            counts = [load(totals.at[warp, four(i)], one) for warp in warps]
            total = reduce(jnp.add, [count * shrink for count, shrink in zip(counts, shrinks, strict=True)], new)
            *shrinks, new = [self.across(x, 0) for x in (*shrinks, new)]
            halves = []
            for start, x in zip((0, self.half), value, strict=True):
                at = [sides.at[warp, four(i), pl.ds(start, self.half)] for warp in warps]
                parts = [load(part, self.apart) * shrink for part, shrink in zip(at, shrinks, strict=True)]
                halves.append(reduce(jnp.add, parts, self.across(x, 1) * new))
            if self.splits == 1:
                self._send(stream, targets[i], halves, self.across(total, 0))
                continue
            if self.of_pair:
                mine.append([self.across(top, 0), self.across(total, 0), *halves])
                continue
            for ref, number in zip(self.partial, (top, total), strict=False):
                ref.at[kv_head, split, four(i)][...] = number
            for start, half in zip((0, self.half), halves, strict=True):
                self.partial[2].at[kv_head, split, four(i), pl.ds(start, self.half)][...] = half
        if self.of_pair:
            pl.when(split == 1)(lambda: self._hand(mine))
            pl.when(split == 0)(lambda: self._take(stream, mine, targets))

    def _send(self, stream: Stream, target: Sequence[Piece], halves: Halves, total: jax.Array) -> None:
        """The result of four heads."""
        for half, piece in zip(halves, target, strict=True):
            stream.send(piece, (half / total).astype(jnp.bfloat16), self.apart)

    def _hand(self, mine: Sequence[Sequence[jax.Array]]) -> None:
        """What this block has of its part, to the first one of the pair.

        That one has read what it was handed a layer before: since then it has left its x, for which both wait.
        """
        place, barrier = self.of_pair
        for i, kinds in enumerate(mine):
            for kind, x in enumerate(kinds):
                copies.hand(place.at[kind, four(i)], x, self.apart, barrier)

    def _take(self, stream: Stream, mine: Sequence[Sequence[jax.Array]], targets: Sequence[Sequence[Piece]]) -> None:
        """The results, of this block's part and what it is handed, once a layer."""
        place, barrier = self.of_pair
        ptx.expect(barrier, 4 * sum(x.size for kinds in mine for x in kinds))
        ptx.wait(barrier, jnp.int32(0), lax.rem(self.layer, 2))
        for i, (top, *sums) in enumerate(mine):
            other, *others = (load(place.at[kind, four(i)], self.apart) for kind in range(4))
            greatest = jnp.maximum(top, other)
            own, its = jnp.exp(top - greatest), jnp.exp(other - greatest)
            total, *halves = (x * own + y * its for x, y in zip(sums, others, strict=True))
            self._send(stream, targets[i], halves, total)

    def combine(self) -> None:
        """Put the parts of each head together."""
        layout, splits = self.spread(self.shape.head_dim), range(self.splits)

        def item(i: jax.Array, _: None) -> None:
            head = self.block + i * self.blocks  # one of all rows'
            row, own = lax.div(head, self.shape.heads), lax.rem(head, self.shape.heads)
            kv_head, number = lax.div(head, self.group), lax.rem(head, self.group)
            all_tops, all_totals, all_mixes = self.partial
            mixes = [load(all_mixes.at[kv_head, split, number], layout) for split in splits]
            tops, totals = ([numbers[kv_head, split, number] for split in splits] for numbers in (all_tops, all_totals))
            greatest = reduce(jnp.maximum, tops)
            weights = [jnp.exp(top - greatest) for top in tops]
            total, mixed = (
                reduce(jnp.add, [one * weight for one, weight in zip(kind, weights, strict=True)])
                for kind in (totals, mixes)
            )
            start = self.mixed + own * self.shape.head_dim
            self.vectors.at[row, pl.ds(start, self.shape.head_dim)][...] = (mixed / total).astype(jnp.bfloat16)

        lax.fori_loop(0, self.mine(self.batch * self.shape.heads), item, None)
