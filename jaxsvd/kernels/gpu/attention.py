"""Attention of each row's new token to the cache, dealt out to the blocks: two steps, a meeting between them.

This is split-K flash decoding (Dao et al. 2023) for grouped queries: each block takes some heads of keys and some
tokens, and the queries of a head of keys share what it reads.
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

from jaxsvd.kernels.gpu import flash, ptx
from jaxsvd.kernels.gpu.perlayer import PerLayer, load
from jaxsvd.kernels.gpu.shape import HEADS, TOKENS, LayerShape
from jaxsvd.kernels.gpu.stream import Stream, full, share

UNITS = 128  # parts of the cache that are attended to side by side, of all heads of keys: some one to a block
SPLITS = 16  # of them per head of keys, at most


def splits(kv_heads: int) -> int:
    """Into how many parts the cache of a head of keys is cut, there being so many of all rows."""
    return min(SPLITS, max(1, UNITS // kv_heads))


@dataclass(frozen=True)
class Attention:
    """The two steps. `vectors` bfloat16 holds q, k and v at `heads` of each row, and gets the result at `mixed`.

    Where there is only one part of the cache of a head, `attend` gives the result, and `combine` is not needed.
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

    @staticmethod
    def partials(shape: LayerShape, batch: int) -> list[tuple[int, ...]]:
        """Of each head of all rows and each part, float32: its greatest score, the sum of exponentials, and the mix.

        This, of values, is not yet divided by the sum.
        """
        each = batch * shape.heads, splits(batch * shape.kv_heads)
        return [each, each, (*each, shape.head_dim)]

    @staticmethod
    def scratch(shape: LayerShape) -> list[Any]:
        """Queries, and of each warp the same as of a part: see `LayerShape.sides`."""
        queries, *warps = shape.sides
        return [plgpu.SMEM(queries, jnp.bfloat16), *(plgpu.SMEM(size, jnp.float32) for size in warps)]

    @property
    def half(self) -> int:
        """RoPE pairs element i with i + head_dim/2, so heads are held as two halves."""
        return self.shape.head_dim // 2

    @staticmethod
    def spread(width: int) -> Any:
        """How warps hold so many numbers: over the lanes, all alike."""
        tiling = plgpu.Tiling(((4, width), (width // 32,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1).reduce((0,))

    @property
    def halves(self) -> Any:
        """How they hold half of a head."""
        return self.spread(self.half)

    def mine(self, count: int) -> jax.Array:
        """How many of `count` items are this block's: every `blocks`-th."""
        return share(count, self.block, self.blocks)

    def places(self, kind: int, row: jax.Array, index: jax.Array) -> list[Any]:
        """Where the halves of a row's head of q, k or v (kind 0 to 2) are."""
        start = self.heads[kind] + index * self.shape.head_dim
        return [self.vectors.at[row, pl.ds(start + at, self.half)] for at in (0, self.half)]

    def head(self, kind: int, row: jax.Array, halves: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """What attends of them: normed where the model does, and rotated; not v."""
        layout = self.halves
        low, high = (half.astype(jnp.float32) for half in halves)
        if kind == 2:
            return low, high
        if self.norms:
            scale = lax.rsqrt(jnp.sum(low * low + high * high, axis=0) / self.shape.head_dim + self.shape.eps)
            gains = [
                load(self.norms[kind].at[self.layer, pl.ds(at, self.half)], layout).astype(jnp.float32)
                for at in (0, self.half)
            ]
            low, high = low * scale * gains[0], high * scale * gains[1]
        cosine, sine = (load(angle.at[row, pl.ds(0, self.half)], layout) for angle in self.angles)
        return low * cosine - high * sine, high * cosine + low * sine

    def append(
        self, kv_head: jax.Array, position: jax.Array, key: Sequence[jax.Array], value: Sequence[jax.Array]
    ) -> None:
        """The new token to the cache of a head of keys, one of all rows'."""
        for cache, halves in zip(self.caches, (key, value), strict=True):
            for at, half in zip((0, self.half), halves, strict=True):
                place = kv_head, position, pl.ds(at, self.half)
                cache.store(place, half.astype(jnp.bfloat16), self.halves)

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

    def tile(
        self, stream: Stream, count: jax.Array, kv_head: jax.Array, start: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """Keys and values, (TOKENS, head_dim), of tokens from `start` on; the count behind the slot they were in."""
        layouts = flash.KEYS, flash.values(self.shape.head_dim)
        size = TOKENS, self.shape.head_dim
        if stream.interpret:
            region = kv_head, pl.ds(start, TOKENS), pl.ds(0, self.shape.head_dim)
            return [cache.load(region, layout) for cache, layout in zip(self.caches, layouts, strict=True)], count

        def read(slot: Any) -> list[jax.Array]:
            return [ptx.held(slot, i, len(layouts), size, layout) for i, layout in enumerate(layouts)]

        return stream.take(count, read), count + 1

    @staticmethod
    def tiles(begin: jax.Array, end: jax.Array) -> jax.Array:
        """How many a part has."""
        return lax.div(jnp.maximum(end - begin, 0) + (TOKENS - 1), TOKENS)

    def attend(self, stream: Stream, count: jax.Array) -> jax.Array:
        """The parts, dealt out to the blocks; the count behind them.

        The first part of each head of keys also attends to the new token.
        """
        shape, (queries, *_) = self.shape, self.warps
        group, scale = shape.heads // shape.kv_heads, shape.head_dim**-0.5

        def item(i: jax.Array, count: jax.Array) -> jax.Array:
            index = self.block + i * self.blocks
            kv_head, split, begin, end = self.part(index)
            row, own = lax.div(kv_head, shape.kv_heads), lax.rem(kv_head, shape.kv_heads)  # its number in the row
            # All is loaded and computed before anything is stored, so that nothing waits for something else.
            wanted = [(1, own), (2, own), *((0, own * group + g) for g in range(group))]
            halves = stream.receive(
                [place for kind, head in wanted for place in self.places(kind, row, head)], self.halves
            )
            pairs = zip(wanted, zip(halves[::2], halves[1::2], strict=True), strict=True)
            key, value, *heads = (self.head(kind, row, pair) for (kind, _), pair in pairs)
            asked = [[x * scale for x in head] for head in heads]
            products = [jnp.sum(query[0] * key[0] + query[1] * key[1], axis=0) for query in asked]
            # Of the new token, with which the first part begins.
            scores = [jnp.where(split == 0, product, flash.NOTHING) for product in products]
            pl.when(split == 0)(lambda: self.append(kv_head, self.position(kv_head), key, value))
            for g, query in enumerate(asked):
                for start, x in zip((0, self.half), query, strict=True):
                    queries.at[g, pl.ds(start, self.half)][...] = x.astype(jnp.bfloat16)
            stream.together()
            rows = range(0, shape.together, HEADS)
            held = [load(queries.at[pl.ds(row, HEADS)], flash.QUERIES) for row in rows]

            def tile(i: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
                states, count = carry
                (k, v), count = self.tile(stream, count, kv_head, begin + i * TOKENS)
                left = end - begin - i * TOKENS
                states = [
                    flash.step(state, q, k, v, left, stream.interpret) for state, q in zip(states, held, strict=True)
                ]
                return states, count

            start = [self.nothing() for _ in rows], count
            states, count = lax.fori_loop(0, self.tiles(begin, end), tile, start)
            self.gather(stream, kv_head * group, split, states, scores, value)
            return count

        return lax.fori_loop(0, self.mine(self.kv_heads * self.splits), item, count)

    def nothing(self) -> flash.State:
        """Where no token has been attended to."""
        stats, width = (flash.WARPS, HEADS), self.shape.head_dim
        tops, totals = (full(value, stats, flash.STATS) for value in (flash.NOTHING, 0.0))
        return tops, totals, full(0.0, (*stats, width), flash.mixed(width))

    def gather(
        self,
        stream: Stream,
        first: jax.Array,
        split: jax.Array,
        states: Sequence[flash.State],
        scores: Sequence[jax.Array],
        value: Sequence[jax.Array],
    ) -> None:
        """Put together what the warps have of a part and the new token, for heads from `first` on."""
        tops, totals, sides = self.warps[1:]
        stream.together()  # all have read what the part before has left there
        for i, state in enumerate(states):
            heads = pl.ds(i * HEADS, HEADS)
            for ref, x in zip((tops, totals, sides), state, strict=True):
                ref.at[:, heads][...] = x
        stream.together()
        warps = range(flash.WARPS)
        found = []
        for g, score in enumerate(scores):
            each = [*(tops[warp, g] for warp in warps), score]
            greatest = reduce(jnp.maximum, each)
            *shrinks, new = [jnp.exp(top - greatest) for top in each]
            total = reduce(jnp.add, [shrink * totals[warp, g] for warp, shrink in enumerate(shrinks)], new)
            halves = []
            for start, x in zip((0, self.half), value, strict=True):
                at = [sides.at[warp, g, pl.ds(start, self.half)] for warp in warps]
                parts = [load(part, self.halves) * shrink for part, shrink in zip(at, shrinks, strict=True)]
                halves.append(reduce(jnp.add, parts, x * new))
            found.append((greatest, total, halves))
        for head, (greatest, total, halves) in enumerate(found):
            if self.splits == 1:
                self.put(first + head, [half / total for half in halves])
                continue
            for ref, number in zip(self.partial, (greatest, total), strict=False):
                ref[first + head, split] = number
            for start, half in zip((0, self.half), halves, strict=True):
                self.partial[2].at[first + head, split, pl.ds(start, self.half)][...] = half

    def put(self, head: jax.Array, pieces: Sequence[jax.Array]) -> None:
        """The result of a head, one of all rows', a piece after the other."""
        row, own = lax.div(head, self.shape.heads), lax.rem(head, self.shape.heads)
        start = self.mixed + own * self.shape.head_dim
        for piece in pieces:
            self.vectors.at[row, pl.ds(start, piece.shape[0])][...] = piece.astype(jnp.bfloat16)
            start += piece.shape[0]

    def combine(self) -> None:
        """Put the parts of each head together."""
        layout, splits = self.spread(self.shape.head_dim), range(self.splits)

        def item(i: jax.Array, _: None) -> None:
            head = self.block + i * self.blocks
            all_tops, all_totals, all_mixes = self.partial
            mixes = [load(all_mixes.at[head, split], layout) for split in splits]
            tops, totals = ([numbers[head, split] for split in splits] for numbers in (all_tops, all_totals))
            greatest = reduce(jnp.maximum, tops)
            weights = [jnp.exp(top - greatest) for top in tops]
            total, mixed = (
                reduce(jnp.add, [one * weight for one, weight in zip(kind, weights, strict=True)])
                for kind in (totals, mixes)
            )
            self.put(head, [mixed / total])

        lax.fori_loop(0, self.mine(self.batch * self.shape.heads), item, None)
