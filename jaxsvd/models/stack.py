"""Layers that are alike, held as one."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsvd.lowrank import parameter


class Stack(nnx.Module):
    """Layers of the same kind and shapes, each array of theirs stacked over all: what a kernel that runs them takes.

    Index and iterate it as a list of layers.

    Args:
        layers: at least one, and `alike`. The list is emptied, so that no weight is ever held twice but those of the
            array that is being stacked.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.count = len(layers)
        graph, state = nnx.split(layers[0])
        self.graph, self.tree = nnx.static(graph), nnx.static(jax.tree.structure(state))
        del state
        rows: list[list[Any]] = [jax.tree.leaves(nnx.split(layer)[1]) for layer in layers]
        layers.clear()
        stacked = []
        for i in range(len(rows[0])):
            stacked.append(_stack([row[i] for row in rows]))
            for row in rows:
                row[i] = None
        self.arrays = nnx.List([parameter(array, lambda array: array) for array in stacked])

    @property
    def leaves(self) -> list[Any]:
        """The stacked arrays."""
        return [array.get_value() for array in self.arrays]

    def merge(self, leaves: list[Any]) -> Any:
        """The layer of other leaves, one of each."""
        return nnx.merge(self.graph, self.tree.unflatten(leaves))

    @property
    def whole(self) -> Any:
        """A layer whose every array has a leading axis, over the layers. It can be read, not called."""
        return self.merge(self.leaves)

    def __getitem__(self, i: int) -> Any:
        """Layer i: slices of the arrays."""
        return self.merge([_slice(leaf, i) for leaf in self.leaves])

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.count))


def alike(layers: list[Any]) -> bool:
    """Whether layers differ in nothing but the values of their arrays, or can be made so, which is then done."""

    def kind(layer: Any) -> tuple[Any, ...]:
        graph, state = nnx.split(layer)
        leaves, tree = jax.tree.flatten(state)
        return graph, tree, [(leaf.shape, leaf.dtype) for leaf in leaves]

    groups = list(zip(*(layer.groups for layer in layers), strict=True))
    common = [members[0].backend.fused.common([member.plan for member in members]) for members in groups]
    if None in common:
        return False
    for members, plan in zip(groups, common, strict=True):
        for member in members:
            if member.plan != plan:
                member.widen(plan)
    return all(kind(layer) == kind(layers[0]) for layer in layers)


def _stack(arrays: list[Any]) -> Any:
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
    return jnp.stack(arrays)


def _slice(array: Any, i: int) -> Any:
    return jax.ShapeDtypeStruct(array.shape[1:], array.dtype) if isinstance(array, jax.ShapeDtypeStruct) else array[i]
