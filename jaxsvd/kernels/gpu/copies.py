"""Copies: from arrays in global memory to shared memory, and from a block's to that of the other one of its pair.

Arrays of which every layer has its own are found by their addresses, in a table in shared memory. None of it runs in
Pallas' interpreter.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxsvd.kernels.gpu.ptx import (
    NUMBER,
    barrier_of,
    inline,
    instruct,
    perform,
    pointer,
    shared,
    thread,
    warp_and_lane,
    words,
)
from jaxsvd.kernels.gpu.regions import offset
from jaxsvd.kernels.gpu.shape import SPAN, WARPS


def publish(table: Any, refs: Sequence[Any]) -> None:
    """Write the addresses of arrays in global memory to `table` (n, 2) int32 in shared memory: for one warpgroup."""

    def run(_: Any, table: Any, *refs: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        start = utils.memref_ptr(table)
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            for i, ref in enumerate(refs):
                llvm.store(llvm.ptrtoint(i64, utils.memref_ptr(ref)), utils.getelementptr(start, [i], i64))
        utils.warpgroup_barrier()

    inline((plgpu.RefType(),) * (1 + len(refs)), run, table, *refs)


def _found(table: Any, entry: Any, offset: Any) -> Any:
    """The pointer to an element of the bfloat16 array whose address is an entry of a table."""
    i64, pointer = ir.IntegerType.get_signless(64), llvm.PointerType.get()
    start = llvm.load(pointer, utils.getelementptr(utils.memref_ptr(table), [entry], i64))
    return utils.getelementptr(start, [arith.extsi(i64, offset)], ir.BF16Type.get())


def _region(table: Any, entry: Any, offset: Any, sizes: Sequence[int], strides: Sequence[int]) -> Any:
    layout = ir.StridedLayoutAttr.get(0, list(strides))
    return utils.ptr_as_memref(
        _found(table, entry.registers.item(), offset.registers.item()),
        ir.MemRefType.get(list(sizes), ir.BF16Type.get(), layout),
    )


def store(
    table: Any, entry: jax.Array, offset: jax.Array, strides: Sequence[int], values: jax.Array, layout: Any
) -> None:
    """Write a region, bfloat16, of the array whose address is an entry of a table: from element `offset` on."""
    sizes = values.shape

    def run(_: Any, table: Any, entry: Any, offset: Any, values: Any) -> None:
        values.store_untiled(_region(table, entry, offset, sizes, strides), optimized=False)

    inline((plgpu.RefType(), NUMBER, NUMBER, layout), run, table, entry, offset, values)


def fetch(
    table: Any,
    entry: jax.Array,
    start: jax.Array,
    stride: Any,
    size: jax.Array,
    target: Any,
    barriers: Any,
    slot: jax.Array,
) -> None:
    """Start to copy `size` elements of each of some rows of an array, `stride` apart, into those of `target`.

    `entry` of `table` is the array's address, `start` the first element. The slot's barrier ends its phase behind it.
    """

    def run(_: Any, target: Any, table: Any, barriers: Any, slot: Any, *numbers: Any) -> None:
        entry, start, stride, size = (value.registers.item() for value in numbers)

        def source(row: Any) -> Any:
            return _found(table, entry, arith.addi(start, arith.muli(row, stride)))

        kind = ir.MemRefType(target.type)
        rows, pitch = kind.shape[0], kind.get_strides_and_offset()[0][0]
        _copy(rows, source, size, target, pitch, barrier_of(barriers, slot.registers.item()))

    types = (plgpu.RefType(),) * 3 + (NUMBER,) * 5
    inline(types, run, target, table, barriers, slot, entry, start, jnp.asarray(stride, jnp.int32), size)


def fetch_all(
    table: Any, entries: Sequence[jax.Array], start: jax.Array, size: int, target: Any, barriers: Any, slot: jax.Array
) -> None:
    """Start to copy the same `size` elements of several arrays, at most a warp's number of them.

    Each goes into a part of `target` of its own: see `flash.held`.
    """

    def run(_: Any, target: Any, table: Any, barriers: Any, slot: Any, start: Any, *entries: Any) -> None:
        utils.warpgroup_barrier()  # those warps that copy nothing must not fall a whole ring behind
        i32 = ir.IntegerType.get_signless(32)

        def source(row: Any) -> Any:
            entry, *others = (value.registers.item() for value in entries)
            for i, other in enumerate(others, 1):
                chosen = arith.cmpi(arith.CmpIPredicate.eq, row, arith.constant(i32, i))
                entry = arith.select(chosen, other, entry)
            return _found(table, entry, start.registers.item())

        pitch = math.prod(ir.MemRefType(target.type).shape) // len(entries)
        barrier = barrier_of(barriers, slot.registers.item())
        _copy(len(entries), source, arith.constant(i32, size), target, pitch, barrier)

    types = (plgpu.RefType(),) * 3 + (NUMBER,) * (2 + len(entries))
    inline(types, run, target, table, barriers, slot, start, *entries)


def _bulk(priority: str, both: bool = False) -> str:
    """A copy in bulk of $2 bytes at $1 to shared memory at $0, of `both` blocks of a pair, which tells the barrier $3.

    `priority` is what the second-level cache does with them: "evict_first" or "evict_last".
    """
    to, mask, blocks = (".multicast::cluster", ", both", ".reg .b16 both; mov.b16 both, 3; ") if both else [""] * 3
    return (
        f"{{ {blocks}.reg .b64 kept; createpolicy.fractional.L2::{priority}.b64 kept, 1.0; "
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{to}.L2::cache_hint "
        f"[$0], [$1], $2, [$3]{mask}, kept; }}"
    )


def _copy(rows: int, source: Callable[[Any], Any], size: Any, target: Any, pitch: int, barrier: Any) -> None:
    """`size` elements from the source of each row to shared memory, `pitch` elements apart."""
    i32 = ir.IntegerType.get_signless(32)
    # One thread for each row, in all warps alike: those of a warp copy one after the other.
    warp, lane = warp_and_lane()
    at = arith.addi(arith.muli(lane, arith.constant(i32, WARPS)), warp)
    size = arith.muli(size, arith.constant(i32, 2))
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, at, arith.constant(i32, rows))):
        first = arith.cmpi(arith.CmpIPredicate.eq, thread(), arith.constant(i32, 0))
        barrier.arrive_expect_tx(arith.muli(size, arith.constant(i32, rows)), predicate=first)
        row = arith.addi(shared(utils.memref_ptr(target)), arith.muli(at, arith.constant(i32, 2 * pitch)))
        perform(
            # Weights, keys and values are read once: what blocks send each other must not make room for them.
            _bulk("evict_first"),
            "r,l,r,r",
            row,
            source(at),
            size,
            shared(barrier.get_ptr()),
        )


def bring(source: Any, start: Any, left: Any, target: Any, place: int) -> None:
    """Start to copy elements of the row of `source`, eight to a thread of a warpgroup, to that of `target`.

    They go from `start` there to `place` here, bfloat16, from global to shared memory, where zeros follow the first
    `left` ones. See `present.ensure`.
    """

    def run(_: Any, source: Any, target: Any, *numbers: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        start, left = (value.registers.item() for value in numbers)
        mine = arith.muli(thread(), arith.constant(i32, 8))
        inside = arith.cmpi(arith.CmpIPredicate.slt, mine, left)
        size = arith.select(inside, arith.constant(i32, 16), arith.constant(i32, 0))
        to = shared(pointer(target, arith.addi(mine, arith.constant(i32, place))))
        perform(
            "cp.async.cg.shared.global [$0], [$1], 16, $2;",
            "r,l,r",
            to,
            pointer(source, arith.addi(start, mine)),
            size,
        )

    numbers = (jnp.asarray(number, jnp.int32) for number in (start, left))
    inline((plgpu.RefType(),) * 2 + (NUMBER,) * 2, run, source, target, *numbers)


def cut() -> None:
    """Tell what was begun by `bring` since the last time from what follows, so that it can be waited for alone."""
    instruct("cp.async.commit_group;")


def share(
    source: Any, start: Any, left: Any, target: Any, place: int, rows: int, barriers: Any, number: int, own: jax.Array
) -> None:
    """Start to copy the same elements of some rows to a pair of blocks, of which this one, 0 or 1, is its `own`.

    SPAN elements of each row go from `start` of `source` to `place` of `target`, the even rows by one block and the odd
    ones by the other, but only the first `left`; zeros follow them. The barrier of this number, of either block, waits
    for all the bytes.
    """

    def run(_: Any, source: Any, target: Any, barriers: Any, *numbers: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        start, left, own = (value.registers.item() for value in numbers)

        def constant(number: int) -> Any:
            return arith.constant(i32, number)

        def at(ref: Any, row: Any, column: Any) -> Any:
            pitch = ir.MemRefType(ref.type).get_strides_and_offset()[0][0]
            return pointer(ref, arith.addi(arith.muli(row, constant(pitch)), column))

        size = arith.muli(arith.minsi(arith.maxsi(left, constant(0)), constant(SPAN)), constant(2))
        barrier = shared(barrier_of(barriers, constant(number)).get_ptr())
        mine = arith.muli(thread(), constant(8))
        with utils.when(arith.cmpi(arith.CmpIPredicate.sge, mine, left)):
            for row in range(rows):
                to = shared(at(target, constant(row), arith.addi(mine, constant(place))))
                perform("st.shared.v4.b32 [$0], {$1, $1, $1, $1};", "r,r", to, constant(0))
            perform("fence.proxy.async.shared::cta;")  # copies in bulk come here in other phases
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            total = arith.muli(size, constant(rows))
            perform("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$0], $1;", "r,r", barrier, total)
        # A thread in each warp has a row, as those of one would copy one after the other.
        warp, lane = warp_and_lane()
        one = arith.cmpi(arith.CmpIPredicate.eq, lane, constant(0))
        some = arith.cmpi(arith.CmpIPredicate.sgt, size, constant(0))
        for first in range(0, rows, 2 * WARPS):
            row = arith.addi(arith.addi(arith.muli(warp, constant(2)), own), constant(first))
            real = arith.cmpi(arith.CmpIPredicate.slt, row, constant(rows))
            with utils.when(arith.andi(arith.andi(one, real), some)):
                perform(
                    _bulk("evict_last", both=True),
                    "r,l,r,r",
                    *(shared(at(target, row, constant(place))), at(source, row, start), size, barrier),
                )

    numbers = (jnp.asarray(number, jnp.int32) for number in (start, left, own))
    inline((plgpu.RefType(),) * 3 + (NUMBER,) * 3, run, source, target, barriers, *numbers)


def hand(target: Any, values: jax.Array, layout: Any, barrier: Any) -> None:
    """Store values where the first block of a pair has `target`, in its shared memory, and tell its barrier of them."""

    def run(_: Any, target: Any, values: Any, barrier: Any) -> None:
        own = shared(barrier_of(barrier, arith.constant(ir.IntegerType.get_signless(32), 0)).get_ptr())
        for index, register in zip(values.layout.thread_idxs(values.shape), values.registers.flat, strict=True):
            count = ir.VectorType(register.type).shape[0]
            several = f".v{count}" if count > 1 else ""
            perform(
                "{ .reg .b32 there, told; mapa.shared::cluster.u32 there, $0, 0; mapa.shared::cluster.u32 told, $1, 0; "
                f"st.async.shared::cluster.mbarrier::complete_tx::bytes{several}.b32 "
                f"[there], {{{', '.join(f'${2 + i}' for i in range(count))}}}, [told]; }}",
                ",".join(["r"] * (2 + count)),
                *(shared(pointer(target, offset(target, index))), own, *words(register, count)),
            )

    inline((plgpu.RefType(), layout, plgpu.RefType()), run, target, values, barrier)
