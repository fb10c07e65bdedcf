"""Storage: what `nl.ndarray` allocates, with the values, the bits beside them and the time it is needed."""

from enum import Enum

import numpy as np

from jaxsvd.kernels.neuron.emulator.dtypes import SIZES
from jaxsvd.kernels.neuron.emulator.errors import refuse
from jaxsvd.kernels.neuron.emulator.targets import BANK_BYTES, PARTITIONS, PSUM_BANKS, Target

MAX_DIMS = 5  # of an access pattern


class MemoryRegion(Enum):
    """Where a tensor lives."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"


ON_CHIP = (MemoryRegion.sbuf, MemoryRegion.psum)


class Lifetime:
    """What a tensor takes (bytes per partition of SBUF, or banks of PSUM) from its first write to its last use.

    Times are instructions in program order; `first` is -1 until something is written. It outlives the storage.
    """

    __slots__ = ("amount", "first", "last", "name")

    def __init__(self, name: str, amount: int) -> None:
        self.name, self.amount = name, amount
        self.first = self.last = -1


class Traffic:
    """What DMA moved from (`read`) and to (`written`) one HBM tensor: bytes; descriptors by their run in bytes."""

    __slots__ = ("read", "runs", "written")

    def __init__(self) -> None:
        self.read = self.written = 0
        self.runs: dict[int, int] = {}

    def below(self, limit: int) -> int:
        """Bytes that moved in runs shorter than `limit` bytes."""
        return sum(run * count for run, count in self.runs.items() if run < limit)


class Storage:
    """The memory of one tensor, row-major; on chip dim 0 counts partitions of `row` elements each.

    `values` (float32), `defined` and `by_matmul` (PSUM only: a matmul wrote it, so another may add to it) are flat
    and None without values. `complete` is set once everything is defined.
    """

    __slots__ = (
        *("buffer", "by_matmul", "complete", "defined", "dtype", "is_input", "itemsize", "life", "name", "on_chip"),
        *("row", "shape", "size", "traffic", "values"),
    )

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, buffer: MemoryRegion, *, keep: bool) -> None:
        self.name, self.shape, self.dtype, self.buffer = name, shape, dtype, buffer
        self.itemsize = SIZES[dtype]
        self.on_chip = buffer in ON_CHIP
        self.is_input = False
        self.size = 1
        for length in shape:
            self.size *= length
        self.row = self.size // shape[0]
        self.life = Lifetime(name, self._amount())
        self.traffic = None if self.on_chip else Traffic()
        self.complete = False
        self.values = np.full(self.size, np.nan, np.float32) if keep else None
        self.defined = np.zeros(self.size, np.bool_) if keep else None
        self.by_matmul = np.zeros(self.size, np.bool_) if keep and buffer is MemoryRegion.psum else None

    def _amount(self) -> int:
        row = self.row * self.itemsize
        return -(-row // BANK_BYTES) if self.buffer is MemoryRegion.psum else row

    def fill(self, values: np.ndarray) -> None:
        """Hold an input: everything is defined."""
        self.values = np.ascontiguousarray(values, np.float32).reshape(-1)
        self.complete = True


def check_shape(shape: object, buffer: MemoryRegion, dtype: str, target: Target) -> tuple[int, ...]:
    """The shape of a new tensor as a tuple; EmulationError where it can't be, or where no memory could hold it."""
    if isinstance(shape, list):
        shape = tuple(shape)
    if not isinstance(shape, tuple) or not all(type(length) is int and length > 0 for length in shape):
        refuse("tensor-shape", "a tuple of positive integers", shape)
    if not 1 <= len(shape) <= MAX_DIMS:
        refuse("tensor-rank", f"1 to {MAX_DIMS} dimensions", shape)
    if buffer in ON_CHIP:
        _check_on_chip(shape, buffer, dtype, target)
    return shape


def _check_on_chip(shape: tuple[int, ...], buffer: MemoryRegion, dtype: str, target: Target) -> None:
    if len(shape) < 2:
        refuse("tensor-rank", "at least 2 dimensions on chip, partitions first", shape)
    if shape[0] > PARTITIONS:
        refuse("partition-size", f"at most {PARTITIONS} partitions (dim 0)", shape)
    row = SIZES[dtype]
    for length in shape[1:]:
        row *= length
    limit = target.sbuf_usable if buffer is MemoryRegion.sbuf else PSUM_BANKS * BANK_BYTES
    if row > limit:
        refuse(f"{buffer.value}-capacity", f"at most {limit} bytes per partition on {target.name}", f"{row}: {shape}")
