"""The Neuron backend: a group of projections is one fused kernel, y = (x·U)·V, whose strip x·U never leaves the chip.

It is the engine's side of the kernels in this folder; `bridge` calls them. Nothing here imports AWS's packages or a
kernel before one is called, so that the backend can be chosen, emulated and lowered where they are not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxsvd.errors import JaxsvdError, UsageError
from jaxsvd.kernels import Matrix, MatrixShape
from jaxsvd.kernels.neuron import bridge
from jaxsvd.kernels.xla import XLA, GroupPlan, Stored

# What a kernel may differ from XLA by, as a relative Frobenius error. Both round the strip and the result to the dtype,
# each up to 2.4e-3 in bfloat16, and sum in float32; one feature of 9728 left out of a sum makes 1e-2. No single number
# may be off by more than `SINGLE` of that tolerance, in units of their root mean square: a lost row or column would be.
TOLERANCES = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-4}
SINGLE = 40
PARTITIONS = 128  # of the layout "tiles" in which two kernels hand activations on
# Kernels are checked at one row, as in decoding, at a number that no tile divides, and at the most that they are called
# with: nki compiles each anew for each number of rows. Emulated rows are dear, and the emulator has tests of its own.
CHECKED_ROWS: dict[bridge.How, tuple[int, ...]] = {
    "device": (1, 130, bridge.TOKENS),
    "emulated": (1, 130),
    "lowered": (),
}


@dataclass(frozen=True)
class Neuron:
    """See the module's docstring.

    Args:
        how: "device": the kernels themselves; "emulated": the same files in NumPy, through a callback of the host;
            "lowered": their custom calls without kernels in them, which can be lowered and linted but not run.
        target: which chip is emulated: trn1, trn2 or trn3.
    """

    how: bridge.How = "device"
    target: str = "trn2"
    _checked: set[tuple[tuple[GroupPlan, ...], str]] = field(default_factory=set, compare=False, repr=False)

    @property
    def fused(self) -> None:
        """Nothing: a kernel takes a group or an MLP."""

    @property
    def name(self) -> str:
        """What `backend=` calls it."""
        return "neuron" if self.how == "device" else f"neuron-{self.how}"

    def plan(self, shapes: tuple[MatrixShape, ...]) -> GroupPlan:
        """Every array row-major as `MatrixShape` has it, unpadded: the kernel takes any size.

        Raises UsageError for more matrices than the kernel takes.
        """
        if len(shapes) > bridge.MEMBERS:
            raise UsageError(
                f"the backend {self.name} takes groups of up to {bridge.MEMBERS} matrices, found {len(shapes)}: "
                "use backend xla"
            )
        widths = tuple(shape.rank or shape.outputs for shape in shapes)
        second = tuple(Stored(shape.rank, shape.outputs, False) if shape.rank else None for shape in shapes)
        return GroupPlan(Stored(shapes[0].inputs, sum(widths), False), widths, second)

    def pack(self, plan: GroupPlan, group: Sequence[Matrix]) -> list[np.ndarray]:
        """The first factors (or dense matrices) side by side (in, sum of widths), then each V (rank, out)."""
        return _XLA.pack(plan, group)

    def project(self, plan: GroupPlan, x: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """One kernel for the group, called once for every `bridge.TOKENS` rows of x."""

        def run(rows: jax.Array) -> tuple[jax.Array, ...]:
            return self._group(plan, rows, arrays)

        ys = bridge.in_chunks(run, x.reshape(-1, plan.first.inputs))
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]

    def mlp(
        self,
        gate_up: GroupPlan,
        down: GroupPlan,
        x: jax.Array,
        first: Sequence[jax.Array],
        second: Sequence[jax.Array],
    ) -> jax.Array:
        """Two kernels: the product of gate and up leaves the first as the second takes it, without a transpose."""
        tiles = -(-down.first.inputs // PARTITIONS)

        def run(rows: jax.Array) -> tuple[jax.Array, ...]:
            outputs = [jax.ShapeDtypeStruct((PARTITIONS, tiles, len(rows)), x.dtype)]
            call = bridge.Call(self.how, self.target, "swiglu_xuv", gate_up.widths)
            (product,) = bridge.call(call, outputs, rows, *_operands(gate_up, first))
            return self._group(down, product, second, "tiles")

        (y,) = bridge.in_chunks(run, x.reshape(-1, gate_up.first.inputs))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _group(
        self, plan: GroupPlan, x: jax.Array, arrays: Sequence[jax.Array], layout: str = "rows"
    ) -> tuple[jax.Array, ...]:
        tokens = x.shape[0 if layout == "rows" else -1]
        widths = [stored.outputs if stored else width for stored, width in zip(plan.second, plan.widths, strict=True)]
        outputs = [jax.ShapeDtypeStruct((tokens, width), x.dtype) for width in widths]
        call = bridge.Call(self.how, self.target, "xuv_group", plan.widths, layout)
        return bridge.call(call, outputs, x, *_operands(plan, arrays))

    def attend(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """As XLA does: there is no kernel for it."""
        return _XLA.attend(x, table)

    def check(self, plan: GroupPlan, arrays: Sequence[jax.Array]) -> None:
        """Run the kernel and XLA on these arrays, once for each plan, and compare.

        Kernels that silently return zeros have shipped in this field. Raises JaxsvdError where the two disagree,
        or where the kernel can't be run.
        """

        def run(backend: "Neuron | XLA", x: jax.Array, arrays: Any) -> list[jax.Array]:
            return backend.project(plan, x, arrays)

        self._check_once((plan,), run, arrays)

    def check_mlp(
        self, gate_up: GroupPlan, down: GroupPlan, first: Sequence[jax.Array], second: Sequence[jax.Array]
    ) -> None:
        """The same of `mlp`."""

        def run(backend: "Neuron | XLA", x: jax.Array, arrays: Any) -> list[jax.Array]:
            return [backend.mlp(gate_up, down, x, *arrays)]

        self._check_once((gate_up, down), run, (first, second))

    def _check_once(self, plans: tuple[GroupPlan, ...], run: Callable[..., list[jax.Array]], arrays: Any) -> None:
        dtype = jax.tree.leaves(arrays)[0].dtype
        if (plans, dtype.name) in self._checked:
            return
        try:
            self._compare(plans, dtype, run, arrays)
        except JaxsvdError:
            raise
        except Exception as error:  # nki's own or XLA's, of any type; the last line says why
            reason = str(error).strip().splitlines()[-1]
            raise JaxsvdError(f"a kernel of backend {self.name} can't be run ({reason}): use backend xla") from error
        self._checked.add((plans, dtype.name))

    def _compare(
        self, plans: tuple[GroupPlan, ...], dtype: np.dtype, run: Callable[..., list[jax.Array]], arrays: Any
    ) -> None:
        rng, inputs = np.random.default_rng(0), plans[0].first.inputs
        xs = [rng.standard_normal((rows, inputs), np.float32).astype(dtype) for rows in CHECKED_ROWS[self.how]]

        @jax.jit  # one compilation for all
        def both(xs: list[jax.Array], arrays: Any) -> list[tuple[list[jax.Array], list[jax.Array]]]:
            return [(run(self, x, arrays), run(_XLA, x, arrays)) for x in xs]

        allowed = TOLERANCES[dtype.name] * len(plans)  # each rounds once more
        for x, (found, wanted) in zip(xs, both(xs, arrays), strict=True):
            off = max(map(_distance, found, wanted), key=lambda distance: (np.isnan(distance), distance))
            if not off <= allowed:
                shapes = " and ".join(str(shape) for plan in plans for shape in plan.array_shapes)
                raise JaxsvdError(
                    f"a kernel of backend {self.name} differs from XLA by {off:.2g} of the result where "
                    f"{allowed:.2g} is allowed, at {len(x)} rows through {shapes} in {dtype.name}: "
                    "it can't be used, take backend xla"
                )


_XLA = XLA("neuron")


def _operands(plan: GroupPlan, arrays: Sequence[jax.Array]) -> list[jax.Array | None]:
    """What a kernel takes behind x: the first array, and each member's V, None where it is dense."""
    first, *rest = arrays
    second = iter(rest)
    return [first, *(next(second) if stored else None for stored in plan.second)]


def _distance(found: jax.Array, wanted: jax.Array) -> float:
    """The relative Frobenius error, or that of the worst number over SINGLE; NaN where something is not a number."""
    exact = np.asarray(wanted, np.float64)
    wrong, scale = np.asarray(found, np.float64) - exact, np.sqrt(np.square(exact).mean()) or 1.0
    return float(max(np.sqrt(np.square(wrong).mean()), np.abs(wrong).max() / SINGLE) / scale)
