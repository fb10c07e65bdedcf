"""The backend for NVIDIA's Hopper GPUs: XLA for many tokens at once, one kernel for a step of a few rows.

Low rank makes a decode step a chain of some thousand small kernels, and each costs more to begin and to end than to
run. Here all layers are one launch (`jaxsvd.kernels.gpu.layers`). Everything else, prefill and larger batches, is
XLA's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxsvd.kernels import Fused, Heads
from jaxsvd.kernels.gpu.shape import SIZES, Group, LayerShape, aligned
from jaxsvd.kernels.xla import XLA, GroupPlan, Stored

CAPABILITY = "9.0"  # Hopper: TMA, and as much shared memory as the ring of weights takes
JAX = (0, 11)  # the first jax whose Mosaic dialect the kernel is written in


def obstacle(device: Any) -> str | None:
    """Why the kernel can't run on a device, or None."""
    capability = getattr(device, "compute_capability", None)
    if capability != CAPABILITY:
        return f"the kernel is for GPUs of compute capability {CAPABILITY}, and this is {device.device_kind}"
    if jax.__version_info__ < JAX:
        return f"the kernel needs jax {'.'.join(map(str, JAX))} or later, and this is {jax.__version__}"
    return None


@dataclass(frozen=True)
class GPU(XLA):
    """See the module's docstring. `cores` is the number of multiprocessors, `interpret` Pallas' interpreter."""

    platform: str = "gpu"
    cores: int = 132
    name: str = "gpu"
    interpret: Any = None

    @property
    def fused(self) -> Fused:
        """It has a kernel for all layers."""
        return self

    def _stored(self, inputs: int, outputs: int, factored: bool) -> Stored:
        # The kernel reads rows of one output each, whether they are of a factor or of a dense matrix.
        return Stored(inputs, outputs, transposed=True, rounds=True)

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Fused.sizes`."""
        return SIZES

    def obstacle(self, heads: Heads, plans: Sequence[Sequence[GroupPlan]], batch: int, capacity: int) -> str | None:
        """See `Fused.obstacle`."""
        shapes = aligned(layer_shapes(heads, plans))
        if shapes is None:
            return "layers must not differ in more than their ranks"
        cores = GPU.cores if self.interpret else self.cores  # the interpreter has one block, and memory enough
        found = (shape.obstacle(len(shapes), batch, capacity, cores) for shape in shapes)
        return next(filter(None, found), None)

    def decoder(self, heads: Heads, plans: Sequence[Sequence[GroupPlan]], batch: int) -> Callable[..., jax.Array]:
        """See `Fused.decoder`."""
        # Here, as the backend can be chosen, and refused, where jax is too old for the kernel.
        from jaxsvd.kernels.gpu.layers import make_layers

        return make_layers(tuple(layer_shapes(heads, plans)), batch, self.cores, self.interpret)


def layer_shapes(heads: Heads, plans: Sequence[Sequence[GroupPlan]]) -> list[LayerShape]:
    """The layers of a model, as its kernel sees them: see `Fused`."""
    return [LayerShape(*heads, *map(_group, layer)) for layer in plans]


def _group(plan: GroupPlan) -> Group:
    ranks = tuple(v.inputs if v else None for v in plan.second)
    return Group(plan.first.inputs, plan.outputs, ranks)
