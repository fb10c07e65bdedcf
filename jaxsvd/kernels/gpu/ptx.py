"""What Pallas has no word for, as PTX in Mosaic's MLIR. None of it runs in Pallas' interpreter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
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

    _inline((plgpu.RefType(), plgpu.Layout.WG_SPLAT(())), run, counter, target)
