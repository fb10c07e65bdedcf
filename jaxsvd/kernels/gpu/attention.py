"""Attention of one new token to the cache, dealt out to the blocks of the grid: two steps, a meeting between them.

This is split-K flash decoding (Dao et al. 2023) for grouped queries: each block takes some heads of keys and some
tokens, and the queries of a head of keys share what it reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu.perlayer import PerLayer, load
from jaxsvd.kernels.gpu.shape import TOKENS, LayerShape
from jaxsvd.kernels.gpu.stream import full, share

UNITS = 128  # parts of the cache that are attended to side by side, of all heads of keys: some one to a block
SPLITS = 16  # of them per head of keys, at most
NOTHING = -1e30  # the maximum of no scores


def splits(kv_heads: int) -> int:
    """Into how many parts the cache of a head of keys is cut."""
    return min(SPLITS, max(1, UNITS // kv_heads))


@dataclass(frozen=True)
class Attention:
    """The two steps. `vectors` bfloat16 holds q, k and v at elements `heads`, and gets the result at `mixed`."""

    shape: LayerShape
    layer: jax.Array
    block: jax.Array
    blocks: int
    position: jax.Array  # of the new token
    angles: Sequence[Any]  # cosines and sines, float32 (head_dim/2,)
    norms: Sequence[Any]  # of the heads of q and k, (layers, head_dim), or none
    caches: Sequence[PerLayer]  # keys and values, (kv_heads, capacity, head_dim)
    vectors: Any
    heads: Sequence[int]
    mixed: int
    parts: Any  # float32 (heads, splits, head_dim): what each part of the cache mixes, not yet divided by its total
    tops: Any  # float32 (heads, splits): the greatest score of each part
    totals: Any  # float32 (heads, splits): the sum of the exponentials there

    @property
    def half(self) -> int:
        """RoPE pairs element i with i + head_dim/2, so heads are held as two halves."""
        return self.shape.head_dim // 2

    @property
    def pairs(self) -> Any:
        """Four tokens, one per warp, and half of a head over the lanes."""
        tiling = plgpu.Tiling(((4, self.half), (self.half // 32,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def spread(self, x: jax.Array, axis: int) -> jax.Array:
        """A value per token (axis 0) or per element (axis 1) to (4, head_dim/2)."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (4, self.half), (axis,)), self.pairs)

    def every(self, count: int) -> Callable[[Callable[[jax.Array], None]], None]:
        """Run a function for this block's share of `count` items."""

        def run(item: Callable[[jax.Array], None]) -> None:
            mine = share(count, self.block, self.blocks)
            lax.fori_loop(0, mine, lambda i, _: item(self.block + i * self.blocks), None)

        return run

    def head(self, kind: int, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The halves of head `index` of q, k or v (kind 0 to 2): normed where the model does, and rotated; not v."""
        layout = self.pairs.reduce((0,))
        start = self.heads[kind] + index * self.shape.head_dim
        low, high = (load(self.vectors.at[pl.ds(start + at, self.half)], layout) for at in (0, self.half))
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
        if kind == 2:
            return low, high
        if self.norms:
            scale = lax.rsqrt(jnp.sum(low * low + high * high, axis=0) / self.shape.head_dim + self.shape.eps)
            gains = [
                load(self.norms[kind].at[self.layer, pl.ds(at, self.half)], layout).astype(jnp.float32)
                for at in (0, self.half)
            ]
            low, high = low * scale * gains[0], high * scale * gains[1]
        cosine, sine = (load(angle, layout) for angle in self.angles)
        return low * cosine - high * sine, high * cosine + low * sine

    def append(self, kv_head: jax.Array, key: Sequence[jax.Array], value: Sequence[jax.Array]) -> None:
        """The new token to the cache."""
        for cache, halves in zip(self.caches, (key, value), strict=True):
            for at, half in zip((0, self.half), halves, strict=True):
                place = kv_head, self.position, pl.ds(at, self.half)
                cache.store(place, half.astype(jnp.bfloat16), self.pairs.reduce((0,)))

    def fetch(self, kv_head: jax.Array, start: jax.Array) -> list[list[list[jax.Array]]]:
        """Of keys and of values, for every four of TOKENS tokens from `start` on, the halves: bfloat16."""
        # What lies behind the end is never used.
        start = jnp.minimum(start, self.caches[0].refs[0].shape[1] - TOKENS)
        rows = [start + i for i in range(0, TOKENS, 4)]
        columns = [pl.ds(at, self.half) for at in (0, self.half)]
        return [
            [[cache.load((kv_head, pl.ds(row, 4), part), self.pairs) for part in columns] for row in rows]
            for cache in self.caches
        ]

    def attend(self) -> None:
        """The parts, dealt out to the blocks; the first of each head of keys also attends to the new token."""
        shape, half, token = self.shape, self.half, self.pairs.reduce((1,))
        parts = splits(shape.kv_heads)
        group = shape.heads // shape.kv_heads

        @self.every(shape.kv_heads * parts)
        def item(index: jax.Array) -> None:
            kv_head, split = lax.div(index, parts), lax.rem(index, parts)
            # Each part has the same number of tokens, whole tiles of them; the last ones may have none.
            length = lax.div(self.position + (parts * TOKENS - 1), parts * TOKENS) * TOKENS
            begin = split * length
            end = jnp.minimum(begin + length, self.position)
            tiles = lax.div(jnp.maximum(end - begin, 0) + (TOKENS - 1), TOKENS)
            ahead = self.fetch(kv_head, begin)  # each tile is on its way while the one before is used

            scale = shape.head_dim**-0.5
            queries = [[x * scale for x in self.head(0, kv_head * group + i)] for i in range(group)]
            key, value = self.head(1, kv_head), self.head(2, kv_head)
            pl.when(split == 0)(lambda: self.append(kv_head, key, value))

            # The new token counts once: with the first warp of the first part.
            mine = plgpu.broadcasted_iota(jnp.int32, (4, half), 0, layout=self.pairs) + split == 0
            alone = plgpu.broadcasted_iota(jnp.int32, (4,), 0, layout=token) + split == 0
            state = []
            for low, high in queries:
                score = jnp.sum(low * key[0] + high * key[1], axis=0)
                state.append(jnp.where(alone, full(1.0, (4,), token) * score, full(NOTHING, (4,), token)))
                state.append(jnp.where(alone, full(1.0, (4,), token), full(0.0, (4,), token)))
                state += [jnp.where(mine, self.spread(x, 1), full(0.0, (4, half), self.pairs)) for x in value]

            def tile(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                state, fetched = carry
                rows = [begin + i * TOKENS + j for j in range(0, TOKENS, 4)]
                ahead = self.fetch(kv_head, begin + (i + 1) * TOKENS)
                keys, values = jax.tree.map(lambda x: x.astype(jnp.float32), fetched)
                seen = [plgpu.broadcasted_iota(jnp.int32, (4,), 0, layout=token) + row < end for row in rows]
                result = []
                for g, (low, high) in enumerate(queries):
                    top, total, *mixed = state[4 * g : 4 * g + 4]
                    query = self.spread(low, 1), self.spread(high, 1)
                    products = [jnp.sum(k[0] * query[0] + k[1] * query[1], axis=1) for k in keys]
                    scores = [jnp.where(see, score, NOTHING) for see, score in zip(seen, products, strict=True)]
                    new_top = reduce(jnp.maximum, scores, top)
                    shrink = jnp.exp(top - new_top)
                    weights = [jnp.exp(score - new_top) for score in scores]
                    total = reduce(jnp.add, weights, total * shrink)
                    mixed = [x * self.spread(shrink, 0) for x in mixed]
                    for weight, v in zip(weights, values, strict=True):
                        mixed = [x + self.spread(weight, 0) * part for x, part in zip(mixed, v, strict=True)]
                    result += [new_top, total, *mixed]
                return result, ahead

            state, _ = lax.fori_loop(0, tiles, tile, (state, ahead))
            for g in range(group):
                top, total, *mixed = state[4 * g : 4 * g + 4]
                greatest = jnp.max(top, axis=0)
                shrink = jnp.exp(top - greatest)
                head = kv_head * group + g
                self.tops[head, split] = greatest
                self.totals[head, split] = jnp.sum(total * shrink, axis=0)
                for start, x in zip((0, half), mixed, strict=True):
                    self.parts.at[head, split, pl.ds(start, half)][...] = jnp.sum(x * self.spread(shrink, 0), axis=0)

    def combine(self) -> None:
        """Put the parts of each head together."""
        layout = self.pairs.reduce((0,))

        @self.every(self.shape.heads)
        def item(head: jax.Array) -> None:
            tops = [self.tops[head, split] for split in range(splits(self.shape.kv_heads))]
            greatest = reduce(jnp.maximum, tops)
            weights = [jnp.exp(top - greatest) for top in tops]
            total = reduce(jnp.add, [weight * self.totals[head, split] for split, weight in enumerate(weights)])
            for start in (0, self.half):
                parts = [
                    load(self.parts.at[head, split, pl.ds(start, self.half)], layout) * weight
                    for split, weight in enumerate(weights)
                ]
                target = pl.ds(self.mixed + head * self.shape.head_dim + start, self.half)
                self.vectors.at[target][...] = (reduce(jnp.add, parts) / total).astype(jnp.bfloat16)
