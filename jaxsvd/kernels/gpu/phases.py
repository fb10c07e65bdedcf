"""What a layer's products are made of: what they read, which rows of which weights, and what becomes of their sums."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import jax

from jaxsvd.kernels.gpu.regions import Rows
from jaxsvd.kernels.gpu.shape import ROWS, SPAN, roomy, slots


@dataclass(frozen=True)
class X:
    """Something that products read: elements [start, start + width) of each row of `ref` (height, n), bfloat16.

    Where the width is known at run time only, it is at most `most`. What the ring held before lies behind the edge of a
    slot, against zeros of x: all weights, keys and values are to be finite. It may be on its way: see `present`.
    """

    ref: Any
    start: Any
    width: Any
    most: int


@dataclass(frozen=True)
class Norm:
    """RMSNorm of what products read, but for its weights, which x has been multiplied with: the sums are scaled.

    Those elements of `squares` (height, n) float32 from `start` on that `squares` counts add up to the squares of
    the `width` elements of each row.
    """

    squares: Any
    start: Any
    width: int
    eps: float


@dataclass(frozen=True)
class Streamed:
    """Rows of a weight (n, inputs) from `row` on, and where what they are multiplied with lies in shared memory."""

    weight: Any  # PerLayer
    inputs: Any
    row: Any = 0
    x: int = 0

    @property
    def slots(self) -> Any:
        """How many a tile takes."""
        return slots(self.inputs)


@dataclass(frozen=True)
class Tiles:
    """`rows` rows of each member, ROWS to a tile.

    `store(rows, sums, early(rows))` is what becomes of the sums of four tiles, (4, height, ROWS) or (4, ROWS). `early`
    may be called before what the products read is there, to load what the block itself has stored.
    """

    rows: Any
    members: Sequence[Streamed]
    store: Callable[[Rows, list[jax.Array], Any], None]
    early: Callable[[Rows], Any] = lambda rows: None

    @property
    def count(self) -> Any:
        """How many tiles of all blocks."""
        return self.rows >> (ROWS.bit_length() - 1)  # a shift, as for `slots`


@dataclass(frozen=True)
class Phase:
    """Products that need no meeting of the blocks between them, and what they read.

    Each x begins in shared memory behind the whole slots of the one before, and zeros follow it there: what a slot
    holds behind the edge of its weight is left from another. All x together may be wider than what is held: they are
    then brought in turns, and so are the inputs of all tiles. If it is `fixed`, a block has the same tiles in all
    layers and other such phases: nobody else need know what it keeps for them.
    """

    x: Sequence[X]
    tiles: Sequence[Tiles]
    norm: Norm | None = None
    fixed: bool = False

    @property
    def spans(self) -> list[tuple[X, int]]:
        """What goes with a slot each, in shared memory one behind the other: of which x, and from which element on."""
        return [(x, start) for x in self.x for start in range(0, roomy(x.most), SPAN)]

    def sweeps(self, tiles: Tiles) -> list[tuple[range, list[int]]]:
        """For each x that some tiles read, the numbers of its spans, and of the members that read it."""
        starts = list(accumulate((roomy(x.most) // SPAN for x in self.x), initial=0))
        ranges = [range(*ends) for ends in pairwise(starts)]
        readers = [[i for i, one in enumerate(tiles.members) if one.x // SPAN == spans.start] for spans in ranges]
        return [(spans, members) for spans, members in zip(ranges, readers, strict=True) if members]
