"""A step of flash attention for one token's queries (Dao et al. 2022), on tensor cores: a head of keys, TOKENS tokens.

Each of the four warps of a block has eight of the tokens, and HEADS heads of queries, of which some may be nothing.
With a pair of lane numbers, g = 0…7 and t = 0…3, mma has rows g of A and of the result, columns g of B, and pairs 2t,
2t + 1 of what is summed over and of the result's columns. Which inputs go with which k is free, so that a thread can
read 16 bytes of keys at once, and which outputs with which column too, so that it can of values.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
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
    """(TOKENS, width): tokens 2t and 2t + 1, and the g-th eighth of their elements."""
    tiles = (TOKENS, width), (8, width), (2, width // 8)
    if width > 64:
        tiling = plgpu.Tiling((*tiles, (8,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-4, -5), vector_dim=-1)
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=(-6,), lane_dims=(-3, -4), vector_dim=-1)


def mixed(width: int) -> Any:
    """(WARPS, HEADS, width): g is the head, and t has the t-th quarter."""
    tiling = plgpu.Tiling(((WARPS, HEADS, width), (width // 4,), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-4, -3), vector_dim=-1)


State = tuple[jax.Array, jax.Array, jax.Array]


def step(state: State, q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array, interpret: bool) -> State:
    """Attend to the first `count` of TOKENS tokens.

    Args:
        state: of each warp and head, float32: the greatest score (WARPS, HEADS), the sum of the exponentials of all
            minus this one (WARPS, HEADS), and what they mix (WARPS, HEADS, width).
        q: bfloat16 (HEADS, width), scaled.
        k, v: bfloat16 (TOKENS, width).
        count: () int32.
        interpret: whether this runs in Pallas' interpreter.
    """
    if interpret:
        return _plain(state, q, k, v, count)
    width = q.shape[1]
    layouts = STATS, STATS, mixed(width)
    kinds = [
        plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout) for x, layout in zip(state, layouts, strict=True)
    ]
    types = (*layouts, QUERIES, KEYS, values(width), ptx.NUMBER)
    return tuple(ptx.inline(types, _step, *state, q, k, v, count, result=tuple(kinds)))


def _plain(state: State, q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> State:
    top, total, mix = state
    k, v = (x.astype(jnp.float32).reshape(WARPS, 8, -1) for x in (k, v))
    scores = jnp.einsum("gd,wtd->wgt", q.astype(jnp.float32), k)
    seen = jnp.arange(TOKENS).reshape(WARPS, 1, 8) < count
    scores = jnp.where(seen, scores, NOTHING)
    new = jnp.maximum(top, scores.max(2))
    shrink, weights = jnp.exp(top - new), jnp.exp(scores - new[..., None])
    rounded = weights.astype(jnp.bfloat16).astype(jnp.float32)
    return new, total * shrink + weights.sum(2), mix * shrink[..., None] + jnp.einsum("wgt,wtd->wgd", rounded, v)


def _step(_: Any, top: Any, total: Any, mix: Any, q: Any, k: Any, v: Any, count: Any) -> Any:
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def number(x: float) -> Any:
        return arith.constant(f32, x)

    def words(register: Any) -> list[Any]:
        four = vector.bitcast(ir.VectorType.get((4,), i32), register)
        return [ptx.element(four, i) for i in range(4)]

    def exponential(x: Any) -> Any:
        scaled = arith.mulf(x, number(np.log2(np.e)))
        return llvm.inline_asm(f32, [scaled], "ex2.approx.ftz.f32 $0, $1;", "=f,f", has_side_effects=False)

    def across(x: Any, op: Any) -> Any:
        """Over the four threads that have the same head."""
        for distance in (1, 2):
            at = [arith.constant(i32, n) for n in (0xFFFFFFFF, distance, 31)]
            x = op(x, nvvm.shfl_sync(at[0], x, at[1], at[2], nvvm.ShflKind.bfly))
        return x

    zero = arith.constant(i32, 0)
    chains = [[number(0.0)] * 4 for _ in range(4)]  # independent of each other
    for i, (a, b) in enumerate(zip(q.registers.flat, k.registers.flat, strict=True)):
        a, b = words(a), words(b)
        for j in (0, 2):
            turn = (2 * i + j // 2) % 4
            chains[turn] = ptx.mma([a[j], zero, a[j + 1], zero], b[j : j + 2], chains[turn])
    lane = arith.remui(ptx.thread(), arith.constant(i32, 32))
    warp = arith.divui(ptx.thread(), arith.constant(i32, 32))
    t = arith.remui(lane, arith.constant(i32, 4))
    first = arith.addi(arith.muli(warp, arith.constant(i32, 8)), arith.muli(t, arith.constant(i32, 2)))
    scores = []
    for e in range(2):
        low, high = (arith.addf(chains[i][e], chains[i + 1][e]) for i in (0, 2))
        at = arith.addi(first, arith.constant(i32, e))
        seen = arith.cmpi(arith.CmpIPredicate.slt, at, count.registers.item())
        scores.append(arith.select(seen, arith.addf(low, high), number(NOTHING)))

    (held_top,), (held_total,) = top.registers.flat, total.registers.flat
    old = ptx.element(held_top, 0)
    new = arith.maximumf(old, across(arith.maximumf(*scores), arith.maximumf))
    shrink = exponential(arith.subf(old, new))
    weights = [exponential(arith.subf(score, new)) for score in scores]
    sums = arith.addf(arith.mulf(ptx.element(held_total, 0), shrink), across(arith.addf(*weights), arith.addf))
    pair = llvm.inline_asm(
        i32, [weights[1], weights[0]], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", has_side_effects=False
    )

    # Of each of its two tokens a thread has an eighth of the values, and gets two eighths of the results of all.
    width = v.shape[1] // 8
    rows = v.registers.reshape(2, -1)
    rows = [[word for register in row for word in words(register)] for row in rows]
    results = [ptx.element(register, i) for register in mix.registers.flat for i in range(4)]
    for j in range(width):
        both = llvm.inline_asm(
            i32,
            [rows[0][j // 2], rows[1][j // 2]],
            f"prmt.b32 $0, $1, $2, {'0x7632' if j % 2 else '0x5410'};",
            "=r,r,r",
            has_side_effects=False,
        )
        given = [arith.mulf(results[j], shrink), arith.mulf(results[width + j], shrink), number(0.0), number(0.0)]
        results[j], results[width + j], _, _ = ptx.mma([pair, zero], [both], given)

    def like(array: Any, values: list[Any]) -> Any:
        each = ir.VectorType(array.registers.flat[0].type).shape[0]
        registers = np.empty(array.registers.shape, dtype=object)
        for i in range(registers.size):
            part = values[i * each : (i + 1) * each]
            registers.flat[i] = vector.from_elements(ir.VectorType.get((each,), f32), part)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return like(top, [new]), like(total, [sums]), like(mix, results)
