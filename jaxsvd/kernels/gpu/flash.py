"""A step of flash attention for one token's queries (Dao et al. 2022), on tensor cores: a head of keys, two tiles.

A tile is TOKENS tokens of the cache. Each of the four warps of a block has eight of them, and HEADS heads of queries,
of which some may be nothing. With a pair of lane numbers, g = 0…7 and t = 0…3, mma has rows g and g + 8 of A and of the
result, columns g of B, and pairs 2t, 2t + 1 of what is summed over and of the result's columns. Which inputs go with
which k is free, so that a thread can read 16 bytes of keys at once, and which outputs with which row, so that it can of
values.

All tokens begin in the same bank of shared memory. So every other thread reads the second half of what it has of a
token first, and mma is given both halves at once: of queries as rows g and g + 8, so that of two results one makes
sense; and of the weights of values those with even t, and in a second turn the others, beside zeros.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jaxsvd.kernels.gpu import ptx
from jaxsvd.kernels.gpu.shape import HEADS, TOKENS, WARPS

NOTHING = -1e30  # the maximum of no scores

# Eight rows of (WARPS, 8, n) to a warp, 16 bytes to a thread.
_EIGHTS = plgpu.Layout.TILED(plgpu.Tiling(((WARPS, 8, 32), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
QUERIES = _EIGHTS.reduce((0,))  # (HEADS, width): g is the head
KEYS = plgpu.Layout.TILED(  # (TOKENS, width): g is the token
    plgpu.Tiling(((TOKENS, 32), (8, 32), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
# (WARPS, HEADS): of each warp, g being the head.
STATS = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, HEADS, 4), (1,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
).reduce((2,))


def values(width: int) -> Any:
    """(TOKENS, width): tokens 2t and 2t + 1, and the g-th eighth of their elements, in two halves."""
    tiling = plgpu.Tiling(((TOKENS, width), (8, width), (2, width // 8), (width // 16,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-4, -5), vector_dim=-1)


def mixed(width: int) -> Any:
    """(WARPS, HEADS, width): heads 2t and 2t + 1, and the g-th eighth of their elements."""
    tiling = plgpu.Tiling(((WARPS, HEADS, width), (2, width // 8), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-6,), lane_dims=(-4, -5), vector_dim=-1)


State = tuple[jax.Array, jax.Array, jax.Array]
Tiles = Sequence[jax.Array]  # the keys of two tiles and their values, bfloat16 (TOKENS, width)


def held(slots: Sequence[Any], width: int) -> Tiles:
    """The two tiles in slots of shared memory, in the order in which `step` wants them to be in registers."""
    layouts, size = (KEYS, values(width)), (TOKENS, width)

    def run(_: Any, *slots: Any) -> Any:
        warp, g, t = _place()
        tokens, half = (warp, 8 * width), width // 16
        keys = [tokens, (g, width), (t, 8)], (g, 32), range(0, width, 32)
        eighths = [tokens, (t, 2 * width), (g, width // 8)], (t, half), (0, half, width, width + half)
        parts = enumerate(zip((keys, eighths), layouts, strict=True))
        return [_read(slot, i, *part, size, layout) for i, (part, layout) in parts for slot in slots]

    kinds = [plgpu.ShapeDtypeStruct(size, jnp.bfloat16, layout=layout) for layout in layouts for _ in slots]
    return ptx.inline((plgpu.RefType(),) * len(slots), run, *slots, result=kinds)


def step(state: State, q: jax.Array, tiles: Tiles, count: jax.Array, interpret: bool) -> State:
    """Attend to the first `count` of the tokens of two tiles.

    Args:
        state: of each warp and head, float32: the greatest score (WARPS, HEADS), the sum of the exponentials of all
            minus this one (WARPS, HEADS), and what they mix (WARPS, HEADS, width).
        q: bfloat16 (HEADS, width), scaled, as `ptx.arrange` gives it.
        tiles: as `held` gives them.
        count: () int32.
        interpret: whether this runs in Pallas' interpreter, where q and the tiles are what they seem.
    """
    if interpret:
        return _plain(state, q, tiles, count)
    width = tiles[0].shape[1]
    layouts = STATS, STATS, mixed(width)
    kinds = [
        plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout) for x, layout in zip(state, layouts, strict=True)
    ]
    types = (*layouts, QUERIES, *[KEYS] * 2, *[values(width)] * 2, ptx.NUMBER)
    return tuple(ptx.inline(types, _step, *state, q, *tiles, count, result=tuple(kinds)))


def _plain(state: State, q: jax.Array, tiles: Tiles, count: jax.Array) -> State:
    top, total, mix = state
    k, v = (
        jnp.concatenate([x.astype(jnp.float32).reshape(WARPS, 8, -1) for x in two], axis=1)
        for two in (tiles[:2], tiles[2:])
    )
    scores = jnp.einsum("gd,wtd->wgt", q.astype(jnp.float32), k)
    tokens = jnp.arange(2 * TOKENS).reshape(2, WARPS, 1, 8)
    scores = jnp.where(jnp.concatenate(list(tokens), axis=2) < count, scores, NOTHING)
    new = jnp.maximum(top, scores.max(2))
    shrink, weights = jnp.exp(top - new), jnp.exp(scores - new[..., None])
    rounded = weights.astype(jnp.bfloat16).astype(jnp.float32)
    return new, total * shrink + weights.sum(2), mix * shrink[..., None] + jnp.einsum("wgt,wtd->wgd", rounded, v)


def _place() -> tuple[Any, Any, Any]:
    """A thread's warp, g and t."""
    warp, lane = (op(ptx.thread(), _integer(32)) for op in (arith.divui, arith.remui))
    return warp, arith.divui(lane, _integer(4)), arith.remui(lane, _integer(4))


def _read(
    slot: Any,
    part: int,
    begin: Sequence[tuple[Any, int]],
    turn: tuple[Any, int],
    places: Sequence[int],
    size: tuple[int, int],
    layout: Any,
) -> Any:
    """The keys or the values of a slot, its part 0 or 1: in each register what is at one of these places.

    A thread's elements begin at the sum of some products. Where the first number of `turn` is odd, registers are
    exchanged whose places are apart by the second.
    """
    bf16, kind = ir.BF16Type.get(), ir.MemRefType(slot.type)
    number, apart = turn
    first = reduce(arith.addi, [arith.muli(x, _integer(factor)) for x, factor in begin])
    odd = arith.muli(arith.remui(number, _integer(2)), _integer(apart))
    pointers = [ptx.pointer(slot, op(first, odd)) for op in (arith.addi, arith.subi)]
    layout, start = layout.to_mgpu(), math.prod(kind.shape) // 2 * part
    registers = np.empty(layout.registers_shape(size), dtype=object)
    for i, place in enumerate(places):
        source = utils.getelementptr(pointers[place // apart % 2], [start + place], bf16)
        registers.flat[i] = llvm.load(ir.VectorType.get((layout.vector_length,), bf16), source)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _step(_: Any, top: Any, total: Any, mix: Any, q: Any, *given: Any) -> Any:
    *tiles, count = given
    warp, _, t = _place()
    first = arith.addi(arith.muli(warp, _integer(8)), arith.muli(t, _integer(2)))
    left = arith.subi(count.registers.item(), first)  # from this thread's first token on
    queries = [ptx.words(register, 4) for register in q.registers.flat]
    scores = [score for i, keys in enumerate(tiles[:2]) for score in _scores(queries, keys, left, i * TOKENS)]

    (held_top,), (held_total,) = top.registers.flat, total.registers.flat
    old = ptx.element(held_top, 0)
    new = arith.maximumf(old, _across(reduce(arith.maximumf, scores), arith.maximumf))
    shrink = _exponential(arith.subf(old, new))
    weights = [_exponential(arith.subf(score, new)) for score in scores]
    sums = arith.addf(arith.mulf(ptx.element(held_total, 0), shrink), _across(reduce(arith.addf, weights), arith.addf))
    return _like(top, [new]), _like(total, [sums]), _like(mix, _mixes(mix, shrink, weights, tiles[2:], t))


def _scores(queries: Sequence[Any], keys: Any, left: Any, behind: int) -> list[Any]:
    """Of a thread's two tokens of a tile: `behind` its first one are these, and only `left` are to be looked at."""
    chains = [[[_number(0.0)] * 4 for _ in range(2)] for _ in range(2)]  # two of each half, all independent
    for chain, half in zip(chains, keys.registers.reshape(-1, 2).T, strict=True):
        b = [word for register in half for word in ptx.words(register, 4)]
        for i, a in enumerate(queries):
            chain[i % 2] = ptx.mma(a, b[2 * i : 2 * i + 2], chain[i % 2])
    scores = []
    for e, places in enumerate([(0, 2), (3, 1)]):  # the halves of an odd token are exchanged
        one, other = (arith.addf(*(sums[i] for sums in chain)) for chain, i in zip(chains, places, strict=True))
        seen = arith.cmpi(arith.CmpIPredicate.sgt, left, _integer(behind + e))
        scores.append(arith.select(seen, arith.addf(one, other), _number(NOTHING)))
    return scores


def _mixes(mix: Any, shrink: Any, weights: Sequence[Any], values: Sequence[Any], t: Any) -> list[Any]:
    """What was mixed before, times `shrink`, and the values of two tiles times weights, two tokens of each a thread."""
    i32 = ir.IntegerType.get_signless(32)
    pairs = [_pure(i32, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", weights[i + 1], weights[i]) for i in (0, 2)]
    even = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(t, _integer(2)), _integer(0))
    turns = [
        [arith.select(even, pair, _integer(0)) for pair in pairs],
        [arith.select(even, _integer(0), pair) for pair in pairs],
    ]
    # Rows of A are elements, the two of a word g and g + 8, and columns of B are heads: so a thread gets the elements
    # that it has of values, for two heads.
    each = mix.shape[-1] // 8  # elements of a head in a thread
    lanes = [arith.addi(arith.muli(t, _integer(8)), _integer(4 * e)) for e in range(2)]
    shrinks = [_shuffled(shrink, lane, nvvm.ShflKind.idx) for lane in lanes]
    mixes = [ptx.element(register, i) for register in mix.registers.flat for i in range(4)]
    mixes = [arith.mulf(x, shrinks[i // each]) for i, x in enumerate(mixes)]
    results = [[mixes[e * each + i + k] for k in range(2) for e in range(2)] for i in range(0, each, 2)]
    rows = [row for v in values for row in v.registers.reshape(2, -1)]  # a token's, in two registers
    tokens = [[word for half in row for word in ptx.words(half, each // 4)] for row in rows]
    columns = [
        [
            _pure(i32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", *pair)
            for pair in (word[:2], word[2:])
            for selector in ("0x5410", "0x7632")
        ]
        for word in zip(*tokens, strict=True)
    ]
    for turn, b in enumerate(turns):
        for i, a in enumerate(columns):
            place = (i + turn * len(columns) // 2) % len(columns)  # in the other half, where t is odd
            results[place] = ptx.mma(a, b, results[place])
    return [result[2 * k + e] for e in range(2) for result in results for k in range(2)]


def _number(x: float) -> Any:
    return arith.constant(ir.F32Type.get(), x)


def _integer(x: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), x)


def _pure(kind: Any, code: str, constraints: str, *given: Any) -> Any:
    return llvm.inline_asm(kind, list(given), code, constraints, has_side_effects=False)


def _exponential(x: Any) -> Any:
    scaled = arith.mulf(x, _number(np.log2(np.e)))
    return _pure(ir.F32Type.get(), "ex2.approx.ftz.f32 $0, $1;", "=f,f", scaled)


def _shuffled(x: Any, lane: Any, kind: Any) -> Any:
    return nvvm.shfl_sync(_integer(0xFFFFFFFF), x, lane, _integer(31), kind)


def _across(x: Any, op: Any) -> Any:
    """Over the four threads that have the same head."""
    for distance in (1, 2):
        x = op(x, _shuffled(x, _integer(distance), nvvm.ShflKind.bfly))
    return x


def _like(array: Any, values: Sequence[Any]) -> Any:
    """An array of these numbers, held as another."""
    each = ir.VectorType(array.registers.flat[0].type).shape[0]
    registers = np.empty(array.registers.shape, dtype=object)
    for i in range(registers.size):
        part = values[i * each : (i + 1) * each]
        registers.flat[i] = vector.from_elements(ir.VectorType.get((each,), ir.F32Type.get()), part)
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)
