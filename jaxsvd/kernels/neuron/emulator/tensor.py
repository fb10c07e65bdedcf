"""Tensors: views of a storage, with the rules of the partition dimension."""

from dataclasses import dataclass
from itertools import pairwise
from types import EllipsisType
from typing import Any, NoReturn

import numpy as np

from jaxsvd.kernels.neuron.emulator.errors import not_modelled, refuse
from jaxsvd.kernels.neuron.emulator.memory import MAX_DIMS, MemoryRegion, Storage


@dataclass(frozen=True)
class DynamicSlice:
    """`nl.ds(start, size)`."""

    start: int
    size: int


Index = int | slice | DynamicSlice | EllipsisType


class Tensor:
    """A strided view: element (i, j, …) lies at `offset` + Σ strides·index of its storage, in elements."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
        self.storage, self.shape, self.strides, self.offset = storage, shape, strides, offset

    @property
    def dtype(self) -> str:
        """The name of the dtype."""
        return self.storage.dtype

    @property
    def buffer(self) -> MemoryRegion:
        """Where it lives."""
        return self.storage.buffer

    @property
    def name(self) -> str:
        """The name of its storage."""
        return self.storage.name

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.shape[0] * self.per_row()

    def per_row(self) -> int:
        """Elements along all but dim 0: on chip, those of a partition."""
        shape = self.shape
        if len(shape) == 2:
            return shape[1]
        size = 1
        for length in shape[1:]:
            size *= length
        return size

    def partition(self) -> int:
        """The partition that it starts at, on chip."""
        return self.offset // self.storage.row

    def of(self, flat: np.ndarray) -> np.ndarray:
        """This view of one of the storage's flat arrays, writable."""
        size = flat.itemsize
        return np.ndarray(self.shape, flat.dtype, flat, self.offset * size, [stride * size for stride in self.strides])

    def run(self) -> int:
        """How many elements lie next to each other, in the order of the view; on chip within a partition."""
        run = 1
        first = 1 if self.storage.on_chip else 0
        for length, stride in zip(self.shape[:first:-1], self.strides[:first:-1], strict=True):
            if length > 1 and stride != run:
                return run
            run *= length
        if self.shape[first] > 1 and self.strides[first] != run:
            return run
        return run * self.shape[first]

    def is_contiguous(self) -> bool:
        """Whether the elements (on chip: those of each partition) lie densely, in row-major order."""
        return self.run() == (self.per_row() if self.storage.on_chip else self.size)

    def get_pattern(self) -> list[list[int]]:
        """[[stride, count], …] of the dimensions."""
        return [[stride, count] for stride, count in zip(self.strides, self.shape, strict=True)]

    def __getitem__(self, key: Index | tuple[Index, ...]) -> "Tensor":
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) != len(self.shape) or ... in keys:
            keys = _expanded(keys, len(self.shape))
        on_chip = self.storage.on_chip
        offset, shape, strides = self.offset, [], []
        for dim, (item, length, stride) in enumerate(zip(keys, self.shape, self.strides, strict=True)):
            if type(item) is int:
                if not -length <= item < length:
                    refuse("index-range", f"an index below {length} in dim {dim} of {self!r}", item)
                offset += (item + length if item < 0 else item) * stride
                if dim == 0 and on_chip:
                    shape.append(1)
                    strides.append(stride)
            else:
                start, count, step = _range(item, length, dim, self)
                if step != 1 and dim == 0 and on_chip:
                    not_modelled("a step along the partitions")
                offset += start * stride
                shape.append(count)
                strides.append(stride * step)
        least = 2 if on_chip else 1
        while len(shape) < least:  # the last dimension that was indexed away stays, of size 1
            shape.append(1)
            strides.append(1)
        return Tensor(self.storage, tuple(shape), tuple(strides), offset)

    def __setitem__(self, key: Any, value: Any) -> None:
        not_modelled("assignment to a tensor's elements: write with an instruction")

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> "Tensor":
        """Elements start to end of one dimension."""
        return self[(*(slice(None),) * self._dim(dim), slice(start, end, step))]

    def select(self, dim: int, index: int) -> "Tensor":
        """One element of a dimension, which goes away."""
        return self[(*(slice(None),) * self._dim(dim), index)]

    def permute(self, dims: tuple[int, ...]) -> "Tensor":
        """The dimensions in another order."""
        if sorted(dims) != list(range(self.ndim)):
            refuse("view-permute", f"a permutation of the {self.ndim} dimensions", dims)
        if self.storage.on_chip and dims[0] != 0:
            refuse("view-partition", "dim 0, the partitions, to stay first", dims)
        return self._view([self.shape[dim] for dim in dims], [self.strides[dim] for dim in dims])

    def broadcast(self, dim: int, size: int) -> "Tensor":
        """A dimension of size 1 repeated `size` times."""
        dim = self._free(dim)
        if self.shape[dim] != 1:
            refuse("view-broadcast", f"size 1 in dim {dim}", self)
        return self._view(
            [*self.shape[:dim], size, *self.shape[dim + 1 :]], [*self.strides[:dim], 0, *self.strides[dim + 1 :]]
        )

    def expand_dim(self, dim: int) -> "Tensor":
        """A new dimension of size 1 before `dim`."""
        if not 0 <= dim <= self.ndim or (dim == 0 and self.storage.on_chip):
            refuse("view-partition", "a position after the partitions", dim)
        return self._view([*self.shape[:dim], 1, *self.shape[dim:]], [*self.strides[:dim], 1, *self.strides[dim:]])

    def squeeze_dim(self, dim: int) -> "Tensor":
        """Without a dimension of size 1."""
        dim = self._free(dim)
        if self.shape[dim] != 1 or self.ndim == (2 if self.storage.on_chip else 1):
            refuse("view-squeeze", f"size 1 in dim {dim}, and dimensions left", self)
        return self._view([*self.shape[:dim], *self.shape[dim + 1 :]], [*self.strides[:dim], *self.strides[dim + 1 :]])

    def reshape_dim(self, dim: int, shape: tuple[int, ...]) -> "Tensor":
        """One dimension split into several; one of them may be -1."""
        dim = self._free(dim)
        length, known = self.shape[dim], int(np.prod([size for size in shape if size != -1]))
        sizes = [length // max(known, 1) if size == -1 else size for size in shape]
        if sum(size == -1 for size in shape) > 1 or min(sizes) < 1 or int(np.prod(sizes)) != length:
            refuse("view-reshape", f"sizes with the product {length}", shape)
        strides = [stride * self.strides[dim] for stride in _dense(sizes)]
        return self._view(
            [*self.shape[:dim], *sizes, *self.shape[dim + 1 :]],
            [*self.strides[:dim], *strides, *self.strides[dim + 1 :]],
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> "Tensor":
        """Neighbouring dimensions, both ends included, as one."""
        start, end = self._free(start_dim), self._dim(end_dim)
        parts = list(zip(self.shape, self.strides, strict=True))[start : end + 1]
        if not parts or any(outer != inner * size for (_, outer), (size, inner) in pairwise(parts)):
            refuse("view-flatten", f"dims {start} to {end} next to each other in memory", self)
        size = int(np.prod([length for length, _ in parts]))
        return self._view(
            [*self.shape[:start], size, *self.shape[end + 1 :]],
            [*self.strides[:start], parts[-1][1], *self.strides[end + 1 :]],
        )

    def reshape(self, shape: tuple[int, ...]) -> "Tensor":
        """Another shape of as many elements of a contiguous view; on chip dim 0 stays as it is."""
        shape = tuple(shape)
        if not all(type(size) is int and size > 0 for size in shape) or int(np.prod(shape)) != self.size:
            refuse("view-reshape", f"{self.size} elements", shape)
        if not self.is_contiguous():
            refuse("view-reshape", "a contiguous view", self)
        if not self.storage.on_chip:
            return self._view(shape, _dense(shape))
        if len(shape) < 2 or shape[0] != self.shape[0]:
            refuse("view-partition", f"{self.shape[0]} partitions and at least 2 dimensions", shape)
        return self._view(shape, [self.strides[0], *_dense(shape[1:])])

    def _view(self, shape: Any, strides: Any) -> "Tensor":
        if len(shape) > MAX_DIMS:
            refuse("tensor-rank", f"at most {MAX_DIMS} dimensions", tuple(shape))
        return Tensor(self.storage, tuple(shape), tuple(strides), self.offset)

    def _dim(self, dim: int) -> int:
        if not -self.ndim <= dim < self.ndim:
            refuse("index-range", f"a dim of {self!r}", dim)
        return dim % self.ndim

    def _free(self, dim: int) -> int:
        dim = self._dim(dim)
        if dim == 0 and self.storage.on_chip:
            refuse("view-partition", "a free dimension, not the partitions", "dim 0")
        return dim

    def __repr__(self) -> str:
        return f"{self.name}{list(self.shape)} ({self.dtype}, {self.buffer.value})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        not_modelled(f"the tensor attribute {name}")

    def _no_value(self, *_: Any) -> NoReturn:
        not_modelled("arithmetic, comparisons of order or truth of tensors in Python: use nki.isa")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _no_value
    __iadd__ = __isub__ = __imul__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __iter__ = __len__ = _no_value


def whole(storage: Storage) -> Tensor:
    """The view of all of a storage."""
    return Tensor(storage, storage.shape, tuple(_dense(storage.shape)), 0)


def _dense(shape: Any) -> list[int]:
    strides, stride = [], 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= length
    return strides[::-1]


def _expanded(keys: tuple[Index, ...], ndim: int) -> tuple[Index, ...]:
    """One index per dimension."""
    at = next((i for i, key in enumerate(keys) if key is ...), len(keys))
    before, after = keys[:at], keys[at + 1 :]
    missing = ndim - len(before) - len(after)
    if missing < 0 or ... in after:
        refuse("index-rank", f"at most {ndim} indices and one ellipsis", keys)
    return (*before, *(slice(None),) * missing, *after)


def _range(item: Index, length: int, dim: int, tensor: Tensor) -> tuple[int, int, int]:
    """(start, count, step) of a slice that lies within the dimension."""
    if type(item) is slice:
        start, stop, step = item.start, item.stop, item.step
        if step is None:
            if type(start) is int and type(stop) is int and 0 <= start < stop <= length:
                return start, stop - start, 1  # nearly all slices
            step = 1
        start = 0 if start is None else start
        stop = length if stop is None else stop
    elif type(item) is DynamicSlice:
        start, stop, step = item.start, item.start + item.size, 1
    else:
        not_modelled(f"the index {item!r}")
    if not (type(start) is int and type(stop) is int and type(step) is int):
        not_modelled(f"the index {item!r}")
    start = start + length if start < 0 else start
    stop = stop + length if stop < 0 else stop
    if not 0 <= start < stop <= length or step < 1:
        refuse("slice-range", f"0 <= start < stop <= {length} and step >= 1 in dim {dim} of {tensor!r}", item)
    return start, -(-(stop - start) // step), step
