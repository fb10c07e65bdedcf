"""Projections: the one place where a model's matrices reach a kernel."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxsvd.kernels import Backend, shape_of
from jaxsvd.weights import Weights


def parameter(value: Any, place: Callable[[Any], jax.Array] = jax.device_put) -> nnx.Param:
    """An `nnx.Param` on the default device; a `jax.ShapeDtypeStruct` stays one."""
    return nnx.Param(value if isinstance(value, jax.ShapeDtypeStruct) else place(value))


class Projections(nnx.Module):
    """A group: projections of one x, each dense or low-rank of its own rank, with or without bias.

    The members are packed for the backend here, one group at a time, and the originals dropped, so that no weight is
    ever held twice.

    Args:
        weights: where the matrices come from.
        backend: who multiplies them.
        parent: the HF path of the module that they belong to, e.g. `model.layers.0.self_attn`.
        inputs: the width of x.
        outputs: the width of each member by its name, e.g. `{"q_proj": 2048, "k_proj": 512, "v_proj": 512}`.
        bias: whether the members have biases.
        check: whether to compare the backend's kernel with XLA now: not where the whole of which it is a part does.
    """

    def __init__(
        self,
        weights: Weights,
        backend: Backend,
        parent: str,
        inputs: int,
        outputs: Mapping[str, int],
        bias: bool = False,
        check: bool = True,
    ) -> None:
        loaded = [weights.matrix(f"{parent}.{name}", inputs, width, bias) for name, width in outputs.items()]
        group = [matrix for matrix, _ in loaded]
        self.backend = backend
        self.plan: Any = backend.plan(tuple(shape_of(matrix) for matrix in group))
        self.abstract = isinstance(group[0][0], jax.ShapeDtypeStruct)
        if self.abstract:
            arrays = [jax.ShapeDtypeStruct(shape, weights.dtype) for shape in self.plan.array_shapes]
        else:
            arrays = backend.pack(self.plan, group)
        self.arrays = nnx.List([parameter(array, weights.place) for array in arrays])
        self.biases = nnx.List([parameter(offset) for _, offset in loaded if offset is not None])
        if check and not self.abstract:
            self.check()

    @property
    def values(self) -> list[jax.Array]:
        """The packed arrays."""
        return [array[...] for array in self.arrays]

    def check(self) -> None:
        """Compare the backend's kernel with XLA on these arrays. Raises JaxsvdError where the two disagree."""
        self.backend.check(self.plan, self.values)

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """x (…, inputs) to one (…, outputs) per member, in x's dtype."""
        ys = self.backend.project(self.plan, x, self.values)
        return [y + offset[...] for y, offset in zip(ys, self.biases, strict=True)] if self.biases else ys


class GatedMLP(nnx.Module):
    """down(silu(gate(x))·up(x)): gate and up are one group, and the backend may take both groups together.

    Args:
        weights, backend, bias: see `Projections`.
        parent: the HF path, e.g. `model.layers.0.mlp`.
        hidden: the width of x and of the result.
        inner: the width between.
    """

    def __init__(self, weights: Weights, backend: Backend, parent: str, hidden: int, inner: int, bias: bool) -> None:
        outputs = {"gate_proj": inner, "up_proj": inner}
        self.gate_up = Projections(weights, backend, parent, hidden, outputs, bias, check=False)
        self.down = Projections(weights, backend, parent, inner, {"down_proj": hidden}, bias, check=False)
        if not self.down.abstract:
            self.check()

    @property
    def together(self) -> bool:
        """Whether the backend takes both groups as one: where neither has biases."""
        return not self.gate_up.biases and not self.down.biases

    def check(self) -> None:
        """As `Projections.check`: the two groups together, or apart, as they run."""
        first, second = self.gate_up, self.down
        if self.together:
            first.backend.check_mlp(first.plan, second.plan, first.values, second.values)
        else:
            first.check()
            second.check()

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (…, hidden) to the same shape."""
        if self.together:
            first, second = self.gate_up, self.down
            return first.backend.mlp(first.plan, second.plan, x, first.values, second.values)
        gate, up = self.gate_up(x)
        (y,) = self.down(jax.nn.silu(gate) * up)
        return y
