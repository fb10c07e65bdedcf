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

NUMBER = plgpu.Layout.WG_SPLAT(())  # how a warpgroup holds ()
# Sums that are independent of each other: one mma takes 33 cycles, and the next may not wait for it. An even number, as
# every other instruction has its results in the other half of the rows: see `multiply`.
CHAINS = 4


def thread() -> Any:
    """The number of a thread in its warpgroup."""
    return arith.remui(utils.thread_idx(), arith.constant(ir.IntegerType.get_signless(32), utils.WARPGROUP_SIZE))


def warp_and_lane() -> tuple[Any, Any]:
    """The number of a thread's warp in its warpgroup, and its own in the warp."""
    size = arith.constant(ir.IntegerType.get_signless(32), utils.WARP_SIZE)
    return arith.divui(thread(), size), arith.remui(thread(), size)


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


# Barriers, (slots, 2) int32 in shared memory, as Pallas does not show the address of its own. A phase of one of the
# ring, or of that of what is handed over, ends when the thread that announced some bytes has arrived, and the bytes
# have; of the others, when each warp has told, and the bytes that were announced are there.


def barrier_of(barriers: Any, slot: Any) -> Any:
    """One of them."""
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
        barrier_of(barriers, slot.registers.item()).wait_parity(arith.trunci(i1, parity.registers.item()))

    inline((plgpu.RefType(), NUMBER, NUMBER), run, barriers, slot, parity)


def tell(barriers: Any, number: Any, real: Any = 1) -> None:
    """Arrive at a barrier: a thread of each warp, for what all of it has done; none if it is not `real`, 0."""

    def run(_: Any, barriers: Any, number: Any, real: Any) -> None:
        barrier = shared(barrier_of(barriers, number.registers.item()).get_ptr())
        perform("bar.warp.sync 0xffffffff;")
        _, lane = warp_and_lane()
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, real.registers.item())):
            perform("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [$0]; }", "r", barrier)

    numbers = (jnp.asarray(each, jnp.int32) for each in (number, real))
    inline((plgpu.RefType(), NUMBER, NUMBER), run, barriers, *numbers)


def expect(barrier: Any, size: int) -> None:
    """Arrive at a barrier of one arrival, which ends its phase when so many bytes are there, too."""

    def run(_: Any, barrier: Any) -> None:
        first = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        i32 = ir.IntegerType.get_signless(32)
        barrier_of(barrier, arith.constant(i32, 0)).arrive_expect_tx(arith.constant(i32, size), predicate=first)

    inline((plgpu.RefType(),), run, barrier)


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
