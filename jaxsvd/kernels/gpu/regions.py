"""What the four warps of a warpgroup have of a buffer in global memory, each a part of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from jaxsvd.kernels.gpu.shape import WARPS


def offset(ref: Any, index: Sequence[Any]) -> Any:
    """How many elements behind the beginning of a reference an element of it is: 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    at = arith.constant(i32, 0)
    for number, stride in zip(index, ir.MemRefType(ref.type).get_strides_and_offset()[0], strict=True):
        at = arith.addi(at, arith.muli(arith.index_cast(i32, number), arith.constant(i32, stride)))
    return at


@dataclass(frozen=True)
class Parts(ABC):
    """What `ref` has of each of the four warps."""

    ref: Any

    @property
    def dtype(self) -> Any:
        """As an array."""
        return self.ref.dtype

    @property
    def numbers(self) -> tuple[jax.Array, ...]:
        """What `place` is given besides."""
        return ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """As an array."""

    @property
    @abstractmethod
    def parts(self) -> list[tuple[Any, Any]]:
        """Those of the four warps, as references, and whether each is real."""

    @abstractmethod
    def place(self, ref: Any, index: Sequence[Any], *numbers: Any) -> tuple[Any, Any]:
        """In Mosaic's MLIR, how many elements behind the beginning of `ref` an element is, and whether it is real."""


@dataclass(frozen=True)
class Piece(Parts):
    """Elements [at, at + width) of each of four parts of a vector, from part `first` on, there being `count` of them.

    This is (4, width). A warp without one reads the last of them, and stores nothing. `ref` is the vector.
    """

    count: int
    first: int
    at: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """As an array."""
        return WARPS, self.width

    @property
    def parts(self) -> list[tuple[Any, Any]]:
        """See `Parts`."""
        size, each = self.ref.shape[0] // self.count, range(self.first, self.first + WARPS)
        numbers = [min(i, self.count - 1) for i in each]
        return [
            (self.ref.at[pl.ds(n * size + self.at, self.width)], i < self.count)
            for i, n in zip(each, numbers, strict=True)
        ]

    def place(self, ref: Any, index: Sequence[Any], *numbers: Any) -> tuple[Any, Any]:
        """See `Parts`."""
        i32 = ir.IntegerType.get_signless(32)
        size = self.ref.shape[0] // self.count
        part, column = (arith.index_cast(i32, number) for number in index)
        part = arith.addi(part, arith.constant(i32, self.first))
        real = arith.cmpi(arith.CmpIPredicate.ult, part, arith.constant(i32, self.count))
        part = arith.minui(part, arith.constant(i32, self.count - 1))
        start = arith.addi(arith.muli(part, arith.constant(i32, size)), arith.constant(i32, self.at))
        return arith.addi(start, column), real


@dataclass(frozen=True)
class Four(Parts):
    """`view(i)` for i = 0…3, each `apart` elements behind the one before, of which `count` () are real: (4, …).

    A warp without one reads the last of them, and stores nothing. `ref` is the first.
    """

    view: Callable[[Any], Any]
    apart: int
    count: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array."""
        return WARPS, *self.ref.shape

    @property
    def numbers(self) -> tuple[jax.Array]:
        """What `place` is given besides."""
        return (self.count,)

    @property
    def parts(self) -> list[tuple[Any, Any]]:
        """See `Parts`."""
        return [(self.view(jnp.minimum(i, jnp.maximum(self.count - 1, 0))), i < self.count) for i in range(WARPS)]

    def place(self, ref: Any, index: Sequence[Any], *numbers: Any) -> tuple[Any, Any]:
        """See `Parts`."""
        (count,) = numbers
        i32 = ir.IntegerType.get_signless(32)
        first, *others = index
        first = arith.index_cast(i32, first)
        real = arith.cmpi(arith.CmpIPredicate.slt, first, count)
        last = arith.maxsi(arith.subi(count, arith.constant(i32, 1)), arith.constant(i32, 0))
        start = arith.muli(arith.minsi(first, last), arith.constant(i32, self.apart))
        return arith.addi(start, offset(ref, others)), real


@dataclass(frozen=True)
class Rows:
    """The rows of weights of four tiles, one to a warp: from `first` on, and `apart` further. `count` () are real."""

    first: jax.Array
    apart: int
    count: jax.Array

    def of(self, view: Callable[[Any], Any], rows: int = 1) -> Four:
        """What belongs to them: `view(row)` is what belongs to the tile that begins there, an element to so many."""
        return self.first_of(view, self.count, rows)

    def first_of(self, view: Callable[[Any], Any], count: Any, rows: int = 1) -> Four:
        """The same, only `count` () of them."""
        count = jnp.asarray(count, jnp.int32)
        return Four(view(self.first), lambda i: view(self.first + i * self.apart), self.apart // rows, count)
