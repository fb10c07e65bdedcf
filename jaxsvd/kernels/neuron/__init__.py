"""The Neuron backend: a group of projections is one fused kernel, y = (x·U)·V, whose strip x·U never leaves the chip.

It is the engine's side of the kernels in this folder; `bridge` calls them. Nothing here imports AWS's packages or a
kernel before one is called, so that the backend can be chosen, emulated and lowered where they are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxsvd.errors import JaxsvdError, UsageError
from jaxsvd.kernels import Matrix, MatrixShape
from jaxsvd.kernels.neuron import bridge
from jaxsvd.kernels.xla import XLA, GroupPlan, Stored

# What a kernel may differ from XLA by, as a relative Frobenius error. Both round the strip and the result to the dtype,
# each up to 2.3e-3 in bfloat16, and sum in float32; one element of 4096 left out of a sum makes 1.6e-2.
TOLERANCES = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-4}
# Kernels are checked at one row, as in decoding, and at a number that no tile divides; an emulated row is dear.
CHECKED_ROWS: dict[bridge.How, tuple[int, ...]] = {"device": (1, 130), "emulated": (1, 5), "lowered": ()}


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
    _checked: set[tuple[GroupPlan, str]] = field(default_factory=set, compare=False, repr=False)

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
        first, *rest = arrays
        second = iter(rest)
        factors = [next(second) if stored else None for stored in plan.second]
        rows = x.reshape(-1, plan.first.inputs)
        ys = bridge.project(bridge.Call(self.how, self.target, plan.widths), rows, first, factors)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]

    def attend(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """As XLA does: there is no kernel for it."""
        return _XLA.attend(x, table)

    def check(self, plan: GroupPlan, arrays: Sequence[jax.Array]) -> None:
        """Run the kernel and XLA on these arrays, once for each plan, and compare.

        Kernels that silently return zeros have shipped in this field. Raises JaxsvdError where the two disagree,
        or where the kernel can't be run.
        """
        key = plan, arrays[0].dtype.name
        if key in self._checked:
            return
        try:
            self._compare(plan, arrays)
        except jax.errors.JaxRuntimeError as error:  # its last line says why
            reason = str(error).strip().splitlines()[-1]
            raise JaxsvdError(f"the kernel of backend {self.name} can't be run ({reason}): use backend xla") from error
        self._checked.add(key)

    def _compare(self, plan: GroupPlan, arrays: Sequence[jax.Array]) -> None:
        dtype, rng = arrays[0].dtype, np.random.default_rng(0)
        xs = [
            rng.standard_normal((rows, plan.first.inputs), np.float32).astype(dtype) for rows in CHECKED_ROWS[self.how]
        ]

        @jax.jit  # one compilation for all
        def both(xs: list[jax.Array], arrays: Sequence[jax.Array]) -> list[tuple[list[jax.Array], list[jax.Array]]]:
            return [(self.project(plan, x, arrays), _XLA.project(plan, x, arrays)) for x in xs]

        for x, (found, wanted) in zip(xs, both(xs, arrays), strict=True):
            off = max(map(_distance, found, wanted), key=lambda distance: (np.isnan(distance), distance))
            if not off <= TOLERANCES[dtype.name]:
                shapes = " and ".join(map(str, plan.array_shapes))
                raise JaxsvdError(
                    f"the kernel of backend {self.name} differs from XLA by {off:.2g} of the result where "
                    f"{TOLERANCES[dtype.name]:.2g} is allowed, at {len(x)} rows through {shapes} in {dtype.name}: "
                    "it can't be used, take backend xla"
                )


_XLA = XLA("neuron")


def _distance(found: jax.Array, wanted: jax.Array) -> float:
    """The relative Frobenius error, NaN where something is not a number."""
    exact = np.asarray(wanted, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / (np.linalg.norm(exact) or 1.0))
