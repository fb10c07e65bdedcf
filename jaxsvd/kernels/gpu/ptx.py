"""What Pallas has no word for, as PTX in Mosaic's MLIR. None of it runs in Pallas' interpreter."""

import math
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

from jaxsvd.kernels.gpu.regions import offset
from jaxsvd.kernels.gpu.shape import SPAN, WARPS

NUMBER = plgpu.Layout.WG_SPLAT(())  # how a warpgroup holds ()
# Sums that are independent of each other: one mma takes 33 cycles, and the next may not wait for it. An even number, as
# every other instruction has its results in the other half of the rows: see `multiply`.
CHAINS = 4


def thread() -> Any:
    """The number of a thread in its warpgroup."""
    return arith.remui(utils.thread_idx(), arith.constant(ir.IntegerType.get_signless(32), utils.WARPGROUP_SIZE))


def mma(a: Sequence[Any], b: Sequence[Any], c: Sequence[Any]) -> list[Any]:
    """A·B + C, (16, 8) float32, of bfloat16 (16, 16) and (16, 8)."""
    f32 = ir.F32Type.get()
    places = iter(f"${i}" for i in range(4 + len(a) + len(b) + 4))
    d, *given = ("{" + ", ".join(next(places) for _ in range(n)) + "}" for n in (4, len(a), len(b), 4))
    made: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*a, *b, *c],
        f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {', '.join([d, *given])};",
        ",".join(["=f"] * 4 + ["r"] * (len(a) + len(b)) + ["f"] * 4),
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, made, [i]) for i in range(4)]


def arrange(x: jax.Array, layout: Any, zero: jax.Array, beside: bool = False) -> jax.Array:
    """x (16, n), (8, n) or (n,), bfloat16, in the order in which `multiply` wants it in registers, or attention.

    What moves the words there uses `zero` (), an int32 0 that the compiler does not know. If it saw that they are only
    moved, it would move them before every product instead. Of eight rows two registers `beside` each other may take the
    places of two rows: see `flash`.
    """

    height = x.shape[0] if x.ndim > 1 else 1

    def run(_: Any, x: Any, zero: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        four, kind = ir.VectorType.get((4,), i32), x.registers.flat[0].type
        selector = arith.addi(arith.constant(i32, 0x3210), zero.registers.item())

        def moved(word: Any) -> Any:
            return llvm.inline_asm(i32, [word, selector], "prmt.b32 $0, $1, $1, $2;", "=r,r,r", has_side_effects=True)

        quads = []
        pairs = x.registers.reshape(-1, 2) if beside else x.registers.reshape(height // 8 or 1, -1).T
        for pair in pairs:  # a thread's row, or its two, with the same inputs
            given = [words(one, 4) for one in pair]
            if len(given) == 1:
                quads += [[given[0][i] for i in (0, 2, 1, 3)]]
            else:
                quads += [[given[k][i] for i in half for k in (0, 1)] for half in ((0, 1), (2, 3))]
        registers = np.empty(len(quads), dtype=object)
        registers[:] = [vector.bitcast(kind, vector.from_elements(four, list(map(moved, quad)))) for quad in quads]
        return mgpu.FragmentedArray(_registers=registers.reshape(x.registers.shape), _layout=x.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    return inline((layout, NUMBER), run, x, zero, result=result)


def multiply(sums: jax.Array, weights: jax.Array, x: jax.Array, layouts: tuple[Any, Any, Any]) -> jax.Array:
    """Add weights (8, n) times x, both bfloat16, to the sums of the four warps, float32, on tensor cores.

    x is the A of m16n8k16, and the weights are B: sixteen rows (16, n), and the sums (4, 16, 8); or eight, and the sums
    (4, 8, 8); or one (n,), which all eight groups of lanes hold alike, so that each gets the result, and the sums
    (4, 8). A thread's eight neighbours are the inputs of two instructions: which input goes with which k does not
    matter, as long as x and weights agree. Where A has room for twice the rows, these are the same ones with the inputs
    of the other instruction, and of each only the half is looked at that makes sense, so that both have the same A.
    x is as `arrange` gives it.
    """
    result = plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=layouts[0])

    def run(_: Any, sums: Any, weights: Any, x: Any) -> Any:
        f32 = ir.F32Type.get()
        none = arith.constant(f32, 0.0)
        held = [element(register, i) for register in sums.registers.flat for i in range(2)]
        chains = [[*held, none, none][:4], *([none] * 4 for _ in range(CHAINS - 1))]
        quads = [words(one, 4) for one in x.registers.flat]
        four = (words(one, 4) for one in weights.registers.flat)
        pairs = [pair for a, b, c, d in four for pair in ((a, b), (c, d))]
        for i, pair in enumerate(pairs):
            chains[i % CHAINS] = mma(quads[i * len(quads) // len(pairs)], pair, chains[i % CHAINS])
        if len(held) < 4:
            chains = [chain[i % 2 * 2 :] for i, chain in enumerate(chains)]
        totals = []
        for i in range(len(held)):
            first, second, third, fourth = (chain[i] for chain in chains)
            totals.append(arith.addf(arith.addf(first, second), arith.addf(third, fourth)))
        registers = np.empty(sums.registers.shape, dtype=object)
        registers.flat[:] = [
            vector.from_elements(ir.VectorType.get((2,), f32), totals[i : i + 2]) for i in range(0, len(totals), 2)
        ]
        return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)

    return inline(layouts, run, sums, weights, x, result=result)


def inline(types: tuple[Any, ...], run: Callable[..., Any], *args: Any, result: Any = None) -> Any:
    """Put what `run(context, *args)` builds into the kernel."""
    inlined: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)(run)
    return inlined(*args)


def element(register: Any, i: int) -> Any:
    """One of the numbers in a register of an array."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def words(register: Any, count: int) -> list[Any]:
    """The bits of a register in an array, 32 to each of `count`."""
    whole = vector.bitcast(ir.VectorType.get((count,), ir.IntegerType.get_signless(32)), register)
    return [element(whole, i) for i in range(count)]


def perform(code: str, constraints: str = "", *operands: Any) -> None:
    """Instructions that give nothing, on operands of Mosaic: within `inline`."""
    constraints = ",".join(filter(None, (constraints, "~{memory}")))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, code, constraints, has_side_effects=True)


def together() -> None:
    """What any thread of a warpgroup has stored in shared memory before is seen by all behind it."""
    inline((), lambda _: utils.warpgroup_barrier())


def announce(counter: Any, fenced: bool) -> None:
    """Add one to `counter` (1,), any 32 bits in global memory that are a number: for a warpgroup.

    If it is `fenced`, what any thread of the warpgroup stored before is seen by all threads that have `met` by it, if
    not, it is on its way: see `present`.
    """

    def run(_: Any, counter: Any) -> None:
        utils.warpgroup_barrier()
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            perform(
                f"red.{'release' if fenced else 'relaxed'}.gpu.global.add.u32 [$0], 1;",
                "l",
                utils.memref_ptr(counter),
            )

    inline((plgpu.RefType(),), run, counter)


def meet(counter: Any, target: jax.Array, fenced: bool) -> None:
    """Wait until all have announced themselves, so that `counter` is at `target` (): for a warpgroup."""

    def run(_: Any, counter: Any, target: Any) -> None:
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            perform(
                f"""{{
                .reg .pred met;
                .reg .b32 seen;
                again:
                ld.{"acquire" if fenced else "relaxed"}.gpu.global.u32 seen, [$0];
                setp.ge.s32 met, seen, $1;
                @!met bra again;
                }}""",
                "l,r",
                utils.memref_ptr(counter),
                target.registers.item(),
            )
        utils.warpgroup_barrier()

    inline((plgpu.RefType(), NUMBER), run, counter, target)


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


# Barriers, (slots, 2) int32 in shared memory, as Pallas does not show the address of its own. A phase of one of the
# ring ends when the thread that announced some bytes has arrived, and the bytes have; of the others, when each warp has
# told, and the bytes that were announced are there.


def _barrier(barriers: Any, slot: Any) -> Any:
    return utils.BarrierRef(utils.memref_ptr(barriers), slot, None, 1)  # type: ignore[arg-type] (no phases)


def prepare(barriers: Any, arrivals: int) -> None:
    """Make them barriers for so many arrivals: for one warpgroup, before any other uses them."""

    def run(_: Any, barriers: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        start = utils.memref_ptr(barriers)
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            for i in range(ir.MemRefType(barriers.type).shape[0]):
                nvvm.mbarrier_init(utils.getelementptr(start, [i], i64), arith.constant(i32, arrivals))
            nvvm.fence_mbarrier_init()
        utils.warpgroup_barrier()

    inline((plgpu.RefType(),), run, barriers)


def wait(barriers: Any, slot: jax.Array, parity: jax.Array) -> None:
    """Wait for the end of a slot's phase: of its first one, third one, … with parity 0, of the others with 1."""

    def run(_: Any, barriers: Any, slot: Any, parity: Any) -> None:
        i1 = ir.IntegerType.get_signless(1)
        _barrier(barriers, slot.registers.item()).wait_parity(arith.trunci(i1, parity.registers.item()))

    inline((plgpu.RefType(), NUMBER, NUMBER), run, barriers, slot, parity)


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
        _copy(rows, source, size, target, pitch, _barrier(barriers, slot.registers.item()))

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
        _copy(len(entries), source, arith.constant(i32, size), target, pitch, _barrier(barriers, slot.registers.item()))

    types = (plgpu.RefType(),) * 3 + (NUMBER,) * (2 + len(entries))
    inline(types, run, target, table, barriers, slot, start, *entries)


def _bulk(priority: str, both: bool = False) -> str:
    """A copy in bulk of $2 bytes at $1 to shared memory at $0, of `both` blocks of a pair, which tells the barrier $3.

    `priority` is what the second-level cache does with them: "evict_first" or "evict_last".
    """
    to, mask = (".multicast::cluster", ", both") if both else ("", "")
    return (
        "{ .reg .b16 both; .reg .b64 kept; mov.b16 both, 3; "
        f"createpolicy.fractional.L2::{priority}.b64 kept, 1.0; "
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{to}.L2::cache_hint "
        f"[$0], [$1], $2, [$3]{mask}, kept; }}"
    )


def _copy(rows: int, source: Callable[[Any], Any], size: Any, target: Any, pitch: int, barrier: Any) -> None:
    """`size` elements from the source of each row to shared memory, `pitch` elements apart."""
    i32 = ir.IntegerType.get_signless(32)
    # One thread for each row, in all warps alike: those of a warp copy one after the other.
    warp, lane = (op(thread(), arith.constant(i32, utils.WARP_SIZE)) for op in (arith.divui, arith.remui))
    at = arith.addi(arith.muli(lane, arith.constant(i32, utils.WARPGROUP_SIZE // utils.WARP_SIZE)), warp)
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
        barrier = shared(_barrier(barriers, constant(number)).get_ptr())
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
        warp, lane = (op(thread(), constant(utils.WARP_SIZE)) for op in (arith.divui, arith.remui))
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


def tell(barriers: Any, number: Any, real: Any = 1) -> None:
    """Arrive at a barrier: a thread of each warp, for what all of it has done; none if it is not `real`, 0."""

    def run(_: Any, barriers: Any, number: Any, real: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        barrier = shared(_barrier(barriers, number.registers.item()).get_ptr())
        perform("bar.warp.sync 0xffffffff;")
        lane = arith.remui(thread(), arith.constant(i32, utils.WARP_SIZE))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, real.registers.item())):
            perform("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [$0]; }", "r", barrier)

    numbers = (jnp.asarray(each, jnp.int32) for each in (number, real))
    inline((plgpu.RefType(), NUMBER, NUMBER), run, barriers, *numbers)


def hand(target: Any, values: jax.Array, layout: Any, barrier: Any) -> None:
    """Store values where the first block of a pair has `target`, in its shared memory, and tell its barrier of them."""

    def run(_: Any, target: Any, values: Any, barrier: Any) -> None:
        own = shared(_barrier(barrier, arith.constant(ir.IntegerType.get_signless(32), 0)).get_ptr())
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


def expect(barrier: Any, size: int) -> None:
    """Arrive at a barrier of one arrival, which ends its phase when so many bytes are there, too."""

    def run(_: Any, barrier: Any) -> None:
        first = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        i32 = ir.IntegerType.get_signless(32)
        _barrier(barrier, arith.constant(i32, 0)).arrive_expect_tx(arith.constant(i32, size), predicate=first)

    inline((plgpu.RefType(),), run, barrier)


def cut() -> None:
    """Tell what was begun by `bring` since the last time from what follows, so that it can be waited for alone."""
    instruct("cp.async.commit_group;")


def fence() -> None:
    """What a thread has stored before is where all see it, for those that hear of it later."""
    instruct("fence.acq_rel.gpu;")


def instruct(code: str) -> None:
    """An instruction that takes and gives nothing."""

    def run(_: Any) -> None:
        perform(code)

    inline((), run)


def pointer(ref: Any, at: Any) -> Any:
    """The pointer to an element of a reference, `at` (32 bits) elements behind its beginning."""
    at = arith.extsi(ir.IntegerType.get_signless(64), at)
    return utils.getelementptr(utils.memref_ptr(ref), [at], ir.MemRefType(ref.type).element_type)


def shared(pointer: Any) -> Any:
    """An address in shared memory, 32 bits."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    return arith.trunci(i32, llvm.ptrtoint(i64, pointer))
