"""What Pallas has no word for, as PTX in Mosaic's MLIR. None of it runs in Pallas' interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
NUMBER = plgpu.Layout.WG_SPLAT(())  # how a warpgroup holds ()
CHAINS = 4  # sums that are independent of each other: one mma takes 33 cycles, and the next may not wait for it


def multiply(sums: jax.Array, weights: jax.Array, x: jax.Array, layouts: tuple[Any, Any, Any]) -> jax.Array:
    """Add weights (8, n) times x (n,), both bfloat16, to the sums (4, 8) of the four warps, float32, on tensor cores.

    x is the A of m16n8k16: one row, which all eight groups of lanes hold alike, so that each gets the result. The
    weights are B. A thread's eight neighbours are the inputs of two instructions: which input goes with which k does
    not matter, as long as x and weights agree.
    """

    result = plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=layouts[0])

    def run(_: Any, sums: Any, weights: Any, x: Any) -> Any:
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        words, quad = ir.VectorType.get((4,), i32), llvm.StructType.get_literal([f32] * 4)
        zero, none = arith.constant(i32, 0), arith.constant(f32, 0.0)
        (held,) = sums.registers.flat
        chains = [[_element(held, 0), _element(held, 1), none, none], *([none] * 4 for _ in range(CHAINS - 1))]
        turn = 0
        for b, a in zip(weights.registers.flat, x.registers.flat, strict=True):
            b, a = vector.bitcast(words, b), vector.bitcast(words, a)
            for i in (0, 2):
                # Rows 8 to 15 of A are nothing.
                given = [_element(a, i), zero, _element(a, i + 1), zero, _element(b, i), _element(b, i + 1)]
                made: Any = llvm.inline_asm(
                    quad,
                    [*given, *chains[turn]],
                    MMA,
                    ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4),
                    has_side_effects=False,
                )
                chains[turn] = [llvm.extractvalue(f32, made, [j]) for j in range(4)]
                turn = (turn + 1) % CHAINS
        totals = []
        for i in range(2):
            first, second, third, fourth = (chain[i] for chain in chains)
            totals.append(arith.addf(arith.addf(first, second), arith.addf(third, fourth)))
        registers = np.empty(sums.registers.shape, dtype=object)
        registers.flat[0] = vector.from_elements(ir.VectorType.get((2,), f32), totals)
        return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)

    return _inline(layouts, run, sums, weights, x, result=result)


def _inline(types: tuple[Any, ...], run: Callable[..., Any], *args: Any, result: Any = None) -> Any:
    """Put what `run(context, *args)` builds into the kernel."""
    inlined: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)(run)
    return inlined(*args)


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def meet(counter: Any, target: jax.Array) -> None:
    """Add one to `counter` (1,) int32 in global memory and wait until it has reached `target` (): for a warpgroup.

    What any thread of a warpgroup stored before is seen by all threads of those that come out.
    """

    def run(_: Any, counter: Any, target: Any) -> None:
        utils.warpgroup_barrier()
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [utils.memref_ptr(counter), target.registers.item()],
                """{
                .reg .pred met;
                .reg .b32 seen;
                red.release.gpu.global.add.u32 [$0], 1;
                again:
                ld.acquire.gpu.global.u32 seen, [$0];
                setp.ge.s32 met, seen, $1;
                @!met bra again;
                }""",
                "l,r,~{memory}",
                has_side_effects=True,
            )
        utils.warpgroup_barrier()

    _inline((plgpu.RefType(), NUMBER), run, counter, target)


def publish(table: Any, refs: Sequence[Any]) -> None:
    """Write the addresses of arrays in global memory to `table` (n, 2) int32 in shared memory: for one warpgroup."""

    def run(_: Any, table: Any, *refs: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        start = utils.memref_ptr(table)
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            for i, ref in enumerate(refs):
                llvm.store(llvm.ptrtoint(i64, utils.memref_ptr(ref)), utils.getelementptr(start, [i], i64))
        utils.warpgroup_barrier()

    _inline((plgpu.RefType(),) * (1 + len(refs)), run, table, *refs)


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


def load(
    table: Any, entry: jax.Array, offset: jax.Array, sizes: Sequence[int], strides: Sequence[int], layout: Any
) -> jax.Array:
    """A region, bfloat16, of the array whose address is an entry of a table: from element `offset` on."""

    def run(_: Any, table: Any, entry: Any, offset: Any) -> Any:
        region = _region(table, entry, offset, sizes, strides)
        return mgpu.FragmentedArray.load_untiled(region, layout=layout.to_mgpu(), optimized=False)

    result = plgpu.ShapeDtypeStruct(tuple(sizes), jnp.bfloat16, layout=layout)
    return _inline((plgpu.RefType(), NUMBER, NUMBER), run, table, entry, offset, result=result)


def store(
    table: Any, entry: jax.Array, offset: jax.Array, strides: Sequence[int], values: jax.Array, layout: Any
) -> None:
    """Write such a region."""
    sizes = values.shape

    def run(_: Any, table: Any, entry: Any, offset: Any, values: Any) -> None:
        values.store_untiled(_region(table, entry, offset, sizes, strides), optimized=False)

    _inline((plgpu.RefType(), NUMBER, NUMBER, layout), run, table, entry, offset, values)


# Barriers of a ring, (slots, 2) int32 in shared memory, as Pallas does not show the address of its own. A phase ends
# when the thread that announced some bytes has arrived, and the bytes have.


def _barrier(barriers: Any, slot: Any) -> Any:
    return utils.BarrierRef(utils.memref_ptr(barriers), slot.registers.item(), None, 1)  # type: ignore[arg-type] (no phases)


def prepare(barriers: Any) -> None:
    """Make them barriers: for one warpgroup, before any other uses them."""

    def run(_: Any, barriers: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        start = utils.memref_ptr(barriers)
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            for i in range(ir.MemRefType(barriers.type).shape[0]):
                nvvm.mbarrier_init(utils.getelementptr(start, [i], i64), arith.constant(i32, 1))
            nvvm.fence_mbarrier_init()
        utils.warpgroup_barrier()

    _inline((plgpu.RefType(),), run, barriers)


def wait(barriers: Any, slot: jax.Array, parity: jax.Array) -> None:
    """Wait for the end of a slot's phase: of its first one, third one, … with parity 0, of the others with 1."""

    def run(_: Any, barriers: Any, slot: Any, parity: Any) -> None:
        i1 = ir.IntegerType.get_signless(1)
        _barrier(barriers, slot).wait_parity(arith.trunci(i1, parity.registers.item()))

    _inline((plgpu.RefType(), NUMBER, NUMBER), run, barriers, slot, parity)


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
        i32 = ir.IntegerType.get_signless(32)
        entry, start, stride, size = (value.registers.item() for value in numbers)
        kind = ir.MemRefType(target.type)
        rows, pitch, two = kind.shape[0], kind.get_strides_and_offset()[0][0], arith.constant(i32, 2)
        size, barrier = arith.muli(size, two), _barrier(barriers, slot)
        # One thread for each row, in all warps alike: those of a warp copy one after the other.
        thread = arith.remui(utils.thread_idx(), arith.constant(i32, utils.WARPGROUP_SIZE))
        warp, lane = (op(thread, arith.constant(i32, utils.WARP_SIZE)) for op in (arith.divui, arith.remui))
        each = arith.constant(i32, rows * utils.WARP_SIZE // utils.WARPGROUP_SIZE)
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, each)):
            first = arith.cmpi(arith.CmpIPredicate.eq, thread, arith.constant(i32, 0))
            barrier.arrive_expect_tx(arith.muli(size, arith.constant(i32, rows)), predicate=first)
            at = arith.addi(arith.muli(warp, each), lane)
            source = _found(table, entry, arith.addi(start, arith.muli(at, stride)))
            row = arith.addi(_shared(utils.memref_ptr(target)), arith.muli(at, arith.constant(i32, 2 * pitch)))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [row, source, size, _shared(barrier.get_ptr())],
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
                "r,l,r,r,~{memory}",
                has_side_effects=True,
            )

    types = (plgpu.RefType(),) * 3 + (NUMBER,) * 5
    _inline(types, run, target, table, barriers, slot, entry, start, jnp.asarray(stride, jnp.int32), size)


def _shared(pointer: Any) -> Any:
    """An address in shared memory, 32 bits."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    return arith.trunci(i32, llvm.ptrtoint(i64, pointer))
