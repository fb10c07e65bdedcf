"""`nki.language`: allocation, dtypes, buffers, ranges, slices and operators."""

from types import SimpleNamespace
from typing import Any

from jaxsvd.kernels.neuron.emulator.dtypes import NUMPY, UNMODELLED
from jaxsvd.kernels.neuron.emulator.errors import not_modelled, refuse
from jaxsvd.kernels.neuron.emulator.isa_vector import memset
from jaxsvd.kernels.neuron.emulator.machine import current
from jaxsvd.kernels.neuron.emulator.memory import ON_CHIP, MemoryRegion
from jaxsvd.kernels.neuron.emulator.ops import ACTIVATIONS, ARITHMETIC
from jaxsvd.kernels.neuron.emulator.targets import BANK_BYTES, PARTITIONS, PSUM_BANKS, STATIONARY_MAX
from jaxsvd.kernels.neuron.emulator.tensor import DynamicSlice, Tensor


def ndarray(
    shape: Any,
    dtype: Any,
    buffer: Any = MemoryRegion.sbuf,
    name: str = "",
    address: Any = None,
    **unknown: Any,
) -> Tensor:
    """An uninitialised tensor."""
    if unknown or address is not None:
        not_modelled(f"these arguments of nl.ndarray: {', '.join(unknown) or 'address'}")
    return current().allocate(shape, dtype, buffer, name)


def full(
    shape: Any, fill_value: Any, dtype: Any, buffer: Any = MemoryRegion.sbuf, name: str = "", **unknown: Any
) -> Tensor:
    """A tensor on chip, filled by a memset."""
    tensor = ndarray(shape, dtype, buffer, name, **unknown)
    if tensor.buffer not in ON_CHIP:
        not_modelled("filled tensors in HBM")
    memset(tensor, fill_value)
    return tensor


def zeros(shape: Any, dtype: Any, buffer: Any = MemoryRegion.sbuf, name: str = "", **unknown: Any) -> Tensor:
    """A tensor of zeros on chip."""
    return full(shape, 0.0, dtype, buffer, name, **unknown)


def ones(shape: Any, dtype: Any, buffer: Any = MemoryRegion.sbuf, name: str = "", **unknown: Any) -> Tensor:
    """A tensor of ones on chip."""
    return full(shape, 1.0, dtype, buffer, name, **unknown)


def ds(start: int, size: int) -> DynamicSlice:
    """The slice from `start` of `size` elements."""
    if type(size) is not int or size < 1:
        refuse("slice-range", "a positive size in nl.ds", size)
    return DynamicSlice(start, size)


class TileSize(SimpleNamespace):
    """`nl.tile_size`: limits of tiles; those whose values the documentation does not print are not modelled."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        not_modelled(f"nl.tile_size.{name}")


SURFACE: dict[str, Any] = {
    **{name: name for name in (*NUMPY, *UNMODELLED)},
    **{op.name: op for op in (*ACTIVATIONS, *ARITHMETIC)},
    **MemoryRegion.__members__,
    "hbm": MemoryRegion.private_hbm,
    "MemoryRegion": MemoryRegion,
    "NkiTensor": Tensor,
    "tile_size": TileSize(
        pmax=PARTITIONS,
        psum_fmax=BANK_BYTES // 4,
        psum_bank_fmax=BANK_BYTES // 4,
        psum_bank_fmax_bytes=BANK_BYTES,
        psum_num_banks=PSUM_BANKS,
        gemm_stationary_fmax=STATIONARY_MAX,
        gemm_moving_fmax=512,
    ),
    **{name: range for name in ("affine_range", "sequential_range", "static_range")},
    "ds": ds,
    "ndarray": ndarray,
    "full": full,
    "zeros": zeros,
    "ones": ones,
}
