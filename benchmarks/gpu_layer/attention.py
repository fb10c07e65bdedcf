"""Attention of one new token to the cache, dealt out to the warpgroups of the grid: two steps, a meeting between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from shape import LayerShape
from stream import Vector, load

TOKENS = 32  # tokens that a block attends to at once
SPLITS = 16  # parts of the cache that are attended to side by side, per head of keys
NOTHING = -1e30  # the maximum of no scores


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
