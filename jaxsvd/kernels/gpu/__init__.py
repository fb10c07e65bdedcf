"""The backend for NVIDIA's Hopper GPUs: XLA for many tokens at once, one kernel for a step of one row.

Low rank makes a decode step a chain of some thousand small kernels, and each costs more to begin and to end than to
run. Here all layers are one launch (`jaxsvd.kernels.gpu.layers`). Everything else, prefill and batches, is XLA's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxsvd.kernels import Fused, Heads, MatrixShape
from jaxsvd.kernels.gpu.shape import Group, LayerShape
from jaxsvd.kernels.xla import XLA, GroupPlan, Stored

CAPABILITY = "9.0"  # Hopper: TMA, and as much shared memory as the ring of weights takes
JAX = (0, 11)  # the first jax whose Mosaic dialect the kernel is written in
WASTE = 1.3  # how much larger a group may become so that it is like those of the other layers


def obstacle(device: Any) -> str | None:
    """Why the kernel can't run on a device, or None."""
    capability = getattr(device, "compute_capability", None)
    if capability != CAPABILITY:
        return f"the kernel is for GPUs of compute capability {CAPABILITY}, and this is {device.device_kind}"
    if jax.__version_info__ < JAX:
        return f"the kernel needs jax {'.'.join(map(str, JAX))} or later, and this is {jax.__version__}"
    return None


def _pad(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jnp.pad(array, [(0, size - old) for size, old in zip(shape, array.shape, strict=True)])


@dataclass(frozen=True)
class GPU(XLA):
    """See the module's docstring. `cores` is the number of multiprocessors, `interpret` Pallas' interpreter."""

    platform: str = "gpu"
    cores: int = 132
    name: str = "gpu"
    rank_multiple: ClassVar[int] = 64  # whole rows of a tile in shared memory
    interpret: Any = None

    @property
    def fused(self) -> Fused:
        """It has a kernel for all layers."""
        return self

    def _stored(self, inputs: int, outputs: int, factored: bool) -> Stored:
        # The kernel reads rows of one output each, whether they are of a factor or of a dense matrix.
        return Stored(inputs, outputs, transposed=True)

    def common(self, plans: Sequence[GroupPlan]) -> GroupPlan | None:
        """See `Fused.common`: the widest ranks, as rows and columns of zeros change nothing."""
        kinds = {(plan.first.inputs, plan.outputs, tuple(v is None for v in plan.second)) for plan in plans}
        if len(kinds) > 1:
            return None
        ((inputs, outputs, dense),) = kinds
        widths = map(max, zip(*(plan.widths for plan in plans), strict=True))
        ranks = (None if alone else width for alone, width in zip(dense, widths, strict=True))
        found = self.plan(tuple(MatrixShape(inputs, *shape) for shape in zip(outputs, ranks, strict=True)))
        size = sum(plan.size for plan in plans)
        return found if found.size * len(plans) <= WASTE * size else None

    def widen(self, plan: GroupPlan, arrays: Sequence[Any], wider: GroupPlan) -> list[Any]:
        """See `Fused.widen`."""
        if isinstance(arrays[0], jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in wider.array_shapes]
        first, *second = arrays
        parts = zip(plan.split(first, axis=0), wider.widths, strict=True)
        blocks = [_pad(block, (width, first.shape[1])) for block, width in parts]
        return [jnp.concatenate(blocks), *map(_pad, second, wider.array_shapes[1:])]

    def decoder(
        self, heads: Heads, plans: Sequence[GroupPlan], layers: int, capacity: int
    ) -> Callable[..., jax.Array] | None:
        """See `Fused.decoder`."""
        # Here, as the backend can be chosen, and refused, where jax is too old for the kernel.
        from jaxsvd.kernels.gpu.layers import make_layers

        groups = [
            Group(plan.first.inputs, plan.outputs, tuple(v.inputs if v else None for v in plan.second))
            for plan in plans
        ]
        shape = LayerShape(*heads, *groups)
        if shape.obstacle(capacity):
            return None
        return make_layers(shape, layers, self.cores, self.interpret)
