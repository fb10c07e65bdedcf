"""Arrays of which every layer has its own, for a kernel that loops over the layers.

Operands of a kernel can't be indexed by a number that is known at run time only. So a block begins with writing their
addresses to a table in shared memory, and what it reads is found there. The layers' arrays need not be copied into one,
and may differ in shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import copies
from jaxsvd.kernels.gpu.shape import SPAN


def load(ref: Any, layout: Any) -> jax.Array:
    """Read a reference into registers in a layout; from global memory too, where rows may be narrow."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg] (jax 0.10 wants an index)


def table(entries: int) -> Any:
    """Shared memory for the addresses of so many arrays."""
    return plgpu.SMEM((entries, 2), jnp.int32)


@dataclass(frozen=True)
class PerLayer:
    """References to one array of each layer, bfloat16; `table` holds their addresses from entry `first` on.

    Without a table, in Pallas' interpreter, which knows no addresses, the layers are told apart one by one.
    """

    refs: Sequence[Any]
    layer: jax.Array
    table: Any
    first: int

    def _place(self, index: Sequence[Any]) -> tuple[jax.Array, list[int]]:
        """Where a region begins, in elements, and its strides; `index` are integers and `pl.ds` slices."""
        shape, offset, strides = self.refs[0].shape, jnp.int32(0), []
        stride = 1
        for size, at in reversed(list(zip(shape, index, strict=True))):
            slice_ = isinstance(at, pl.Slice)
            offset += (at.start if slice_ else at) * stride
            if slice_:
                strides.insert(0, stride)
            stride *= size
        return offset, strides

    def _each(self, use: Callable[[Any], None]) -> None:
        for i, ref in enumerate(self.refs):
            pl.when(self.layer == i)(lambda ref=ref: use(ref))

    def load(self, index: Sequence[Any], layout: Any) -> jax.Array:
        """The region of this layer's array, all layers having the same shape: in the interpreter only."""
        found = load(self.refs[0].at[tuple(index)], layout)
        for i, ref in enumerate(self.refs[1:], 1):
            found = jnp.where(self.layer == i, load(ref.at[tuple(index)], layout), found)
        return found

    def store(self, index: Sequence[Any], values: jax.Array, layout: Any) -> None:
        """Write a region, all layers having the same shape."""
        if self.table is not None:
            offset, strides = self._place(index)
            copies.store(self.table, self.first + self.layer, offset, strides, values, layout)
            return

        def write(ref: Any) -> None:
            ref.at[tuple(index)][...] = values

        self._each(write)

    def fetch(self, row: jax.Array, column: jax.Array, width: Any, target: Any, full: Any, slot: jax.Array) -> None:
        """Start to copy SPAN columns of rows into `target` (rows, SPAN or more), a slot of a ring in shared memory.

        The array is (n, `width`), which may be that of this layer only, and the copy ends at its edge. `full` are the
        ring's barriers: see `ptx`; in the interpreter Pallas' own.
        """
        if self.table is not None:
            size = jnp.minimum(SPAN, width - column)
            copies.fetch(self.table, self.first + self.layer, row * width + column, width, size, target, full, slot)
            return
        # Here the copy reads zeros behind the edge.
        region = pl.ds(row, target.shape[0]), pl.ds(column, SPAN)
        self._each(lambda ref: plgpu.copy_gmem_to_smem(ref.at[region], target, full.at[slot]))

    def fetch_with(self, other: "PerLayer", start: jax.Array, size: int, slot: Any, full: Any, number: Any) -> None:
        """Start to copy elements of this layer's array and the same ones of another's: see `copies.fetch_all`."""
        entries = [each.first + self.layer for each in (self, other)]
        copies.fetch_all(self.table, entries, start, size, slot, full, number)
