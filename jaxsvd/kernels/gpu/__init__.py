"""The backend for NVIDIA's Hopper GPUs: XLA for many tokens at once, one kernel for a step of one row.

Low rank makes a decode step a chain of some thousand small kernels, and each costs more to begin and to end than to
run. Here all layers are one launch (`jaxsvd.kernels.gpu.layers`). Everything else, prefill and batches, is XLA's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd.kernels import Fused, Heads
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


def outputs_of(plan: GroupPlan) -> tuple[int, ...]:
    """The width of each member's result."""
    return tuple(v.outputs if v else width for v, width in zip(plan.second, plan.widths, strict=True))


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
        kinds = {(plan.first.inputs, outputs_of(plan), tuple(v is None for v in plan.second)) for plan in plans}
        if len(kinds) > 1:
            return None
        widths = tuple(map(max, zip(*(plan.widths for plan in plans), strict=True)))
        second = tuple(
            stored and self._stored(width, stored.outputs, True)
            for stored, width in zip(plans[0].second, widths, strict=True)
        )
        found = GroupPlan(self._stored(plans[0].first.inputs, sum(widths), True), widths, second)
        size = sum(plan.size for plan in plans)
        return found if found.size * len(plans) <= WASTE * size else None

    def widen(self, plan: GroupPlan, arrays: Sequence[Any], wider: GroupPlan) -> list[Any]:
        """See `Fused.widen`."""
        if isinstance(arrays[0], jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in wider.array_shapes]
        first, *second = arrays
        blocks = jnp.split(first, np.cumsum(plan.widths)[:-1].tolist())
        blocks = [_pad(block, (width, first.shape[1])) for block, width in zip(blocks, wider.widths, strict=True)]
        return [jnp.concatenate(blocks), *map(_pad, second, wider.array_shapes[1:])]

    def decoder(
        self, heads: Heads, plans: Sequence[GroupPlan], layers: int, capacity: int
    ) -> Callable[..., jax.Array] | None:
        """See `Fused.decoder`."""
        # Here, as the backend can be chosen, and refused, where jax is too old for the kernel.
        from jaxsvd.kernels.gpu.layers import make_layers

        groups = [
            Group(plan.first.inputs, outputs_of(plan), tuple(v.inputs if v else None for v in plan.second))
            for plan in plans
        ]
        shape = LayerShape(*heads, *groups)
        if shape.obstacle(capacity):
            return None
        return make_layers(shape, layers, self.cores, self.interpret)
