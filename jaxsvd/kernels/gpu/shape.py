"""The shapes of layers, as their kernel sees them, and how wide its buffers are."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

WARPS = 4  # of a warpgroup
ROWS = 8  # outputs in a tile: the n of mma.m16n8k16
SIZES = 1, 8, 16  # rows of x that kernels are made for: one, half of its m, or all
SPAN = 1024  # inputs in a slot of the ring of weights; buffers of vectors have room for whole ones
WIDEST = {1: sys.maxsize, 8: 4096, 16: 2048}  # inputs that are held at once of so many rows of x
APART = 32  # elements between rows in shared memory, lest all begin in the same bank
TOKENS = 32  # in a tile of the cache: keys and values of heads of 128 fill a slot
HEADS = 8  # of queries that attend to it at once: half of mma's rows, or its columns
UNITS = 128  # parts of the cache that are attended to side by side, of all heads of keys: some one to a block
SPLITS = 16  # of them per head of keys, at most
UNIT = 16  # widths are whole ones: 32 bytes, where copies and loads may begin

SHARED = 227 * 1024  # bytes of shared memory that a block may have on Hopper
ALIGNED = 1024  # where Pallas begins each thing there
SLOTS = 10  # in the ring; more were not faster
FEWEST = 4  # slots with which it is still a ring


def slots(width: Any) -> Any:
    """How many slots a tile of this many inputs takes. A shift, as the width may be known at run time only."""
    return (width + SPAN - 1) >> (SPAN.bit_length() - 1)


def whole(width: int, unit: int) -> int:
    """The next multiple."""
    return -(-width // unit) * unit


def roomy(width: int) -> int:
    """The width of a buffer that is read a whole slot at a time."""
    return whole(width, SPAN)


def tiles(outputs: int, blocks: int) -> int:
    """How many tiles a block has of these, at most."""
    return -(-outputs // (ROWS * blocks))


def widest(batch: int) -> int:
    """The inputs of x that are held at once, at most: of one row all."""
    return WIDEST[height(batch)]


def height(batch: int) -> int:
    """The rows of a buffer for so many rows of x: of these some may be nothing."""
    return next(size for size in SIZES if size >= batch)


def pitch(batch: int) -> int:
    """The elements from one row of a slot to the next. Beside several rows of x there is no room to set them apart."""
    return SPAN + (APART if batch == 1 else 0)


def splits(kv_heads: int) -> int:
    """Into how many parts the cache of a head of keys is cut, there being so many of all rows."""
    return min(SPLITS, max(1, UNITS // kv_heads))


@dataclass(frozen=True)
class Group:
    """Matrices that read the same x, as a kernel sees them: outputs, and padded ranks.

    A rank is None where a matrix is dense in all layers, and 0 where it is dense in this one and low-rank in others.
    It may be known at run time only. `most` are the greatest `widths` in any layer, and `deepest` the ranks; `dense`
    are the members that are dense in some layer.
    """

    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[Any, ...]
    most: tuple[int, ...] = ()
    deepest: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()

    def unless_dense(self, i: int, then: Any, other: Any) -> Any:
        """`then`, or `other` in a layer in which member i is dense: two numbers."""
        rank = self.ranks[i]
        if rank is None or isinstance(rank, int):
            return then if rank else other
        return jnp.where(rank == 0, other, then) if i in self.dense else then

    @property
    def widths(self) -> tuple[Any, ...]:
        """What each member adds to the group's first product."""
        pairs = zip(self.ranks, self.outputs, strict=True)
        return tuple(self.unless_dense(i, rank, outputs) for i, (rank, outputs) in enumerate(pairs))

    @property
    def starts(self) -> tuple[Any, ...]:
        """Where each member begins in the first product."""
        return tuple(sum(self.widths[:i]) for i in range(len(self.widths)))

    @property
    def low_rank(self) -> list[int]:
        """The members that have a second product, in some layer at least."""
        return [i for i, rank in enumerate(self.ranks) if rank is not None]

    def held(self, widest: int) -> int:
        """The elements in shared memory of a row of what its products read, x or what V read: at most `widest`."""
        return min(widest, max(roomy(self.inputs), self.strips))

    @property
    def strips(self) -> int:
        """What V read, each in whole slots."""
        return sum(roomy(self.deepest[i]) for i in self.low_rank)


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer. `head_norms`: whether the heads of q and k are normed, as in Qwen3."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    head_norms: bool
    qkv: Group
    o: Group
    gate_up: Group
    down: Group

    @property
    def groups(self) -> tuple[Group, ...]:
        """In the order of their use."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def ranks(self) -> tuple[Any, ...]:
        """Of the low-rank members of all groups."""
        return tuple(group.ranks[i] for group in self.groups for i in group.low_rank)

    def of(self, ranks: Sequence[Any]) -> "LayerShape":
        """A layer of other ranks, of the same members."""
        left = iter(ranks)
        return self.with_groups(
            replace(group, ranks=tuple(None if rank is None else next(left) for rank in group.ranks))
            for group in self.groups
        )

    def with_groups(self, groups: Iterable[Group]) -> "LayerShape":
        """The same with other groups."""
        return replace(self, **dict(zip(("qkv", "o", "gate_up", "down"), groups, strict=True)))

    @property
    def matrices(self) -> list[int]:
        """How many arrays each group has."""
        return [1 + len(group.low_rank) for group in self.groups]

    def held(self, batch: int) -> tuple[int, int]:
        """The shape of a phase's x in shared memory, at most."""
        return height(batch), max(group.held(widest(batch)) for group in self.groups) + (APART if batch > 1 else 0)

    def swept(self, batch: int, blocks: int) -> int:
        """The tiles whose sums a block holds at once: four, or more if x comes in turns, all. Of pairs twice that."""
        found, limit = [], widest(batch)

        def add(inputs: int, outputs: int, members: int) -> None:
            found.append(members * (max(WARPS, tiles(outputs, blocks)) if inputs > limit else WARPS))

        for group in self.groups:
            pair = 2 if group is self.gate_up else 1  # of tiles
            lone = pair > 1 and not group.low_rank  # its only product is of pairs
            add(roomy(group.inputs), max(group.outputs) if lone else sum(group.most), pair if lone else 1)
            add(group.strips, max(group.outputs), pair)
        return max(found)

    @property
    def together(self) -> int:
        """Heads of queries to a head of keys, in whole HEADS."""
        return whole(self.heads // self.kv_heads, HEADS)

    @property
    def sides(self) -> list[tuple[int, ...]]:
        """What attention has in shared memory: these heads, bfloat16, and what each of four warps gives, float32."""
        heads, width = self.together, self.head_dim
        return [(heads, width), (WARPS, heads), (WARPS, heads), (WARPS, heads, width)]

    def handed(self, batch: int, blocks: int) -> tuple[int, ...] | None:
        """The shape of what a block hands the first of its pair there, float32, if they have the two parts of a head.

        So it is where the cache of each head has two parts, and each block has one of them, at most.
        """
        units = 2 * batch * self.kv_heads
        if batch == 1 or splits(batch * self.kv_heads) != 2 or units > blocks:
            return None
        return 4, whole(self.heads // self.kv_heads, WARPS), self.head_dim // 2

    def obstacle(self, layers: int, batch: int, capacity: int, blocks: int) -> str | None:
        """Why the kernel can't run so many layers of this shape with a cache for so many tokens a row, or None.

        There are so many blocks.
        """
        sizes = [size for group in self.groups for size in (group.inputs, *group.widths, *group.outputs)]
        odd = [size for size in sizes if size % UNIT]
        if odd:
            return f"widths must be multiples of {UNIT}, which {odd[0]} is not"
        if self.head_dim not in (64, 128):
            return f"heads must be 64 or 128 wide, not {self.head_dim}"
        if ring(self, layers, batch, used(blocks, batch)) < FEWEST:
            rows, width = self.held(batch)
            return f"a multiprocessor has no room for {rows}·{width} elements and the addresses of {layers} layers"
        if capacity % TOKENS:
            return f"the cache must have room for a multiple of {TOKENS} tokens, not {capacity}"
        if batch * self.kv_heads * capacity * self.head_dim >= 2**31:
            return f"the keys of a layer must have less than 2^31 elements: {batch} rows of {capacity} tokens have more"
        return None


def used(blocks: int, batch: int) -> int:
    """How many of the blocks: of several rows they go in pairs; a lone one is the interpreter's."""
    return blocks if batch == 1 or blocks == 1 else blocks - blocks % 2


def ring(shape: LayerShape, layers: int, batch: int, blocks: int) -> int:
    """The slots for which shared memory has room, beside addresses, the greatest x, sums, and what attention needs."""
    rows, width = shape.held(batch)
    table = 8 * layers * (sum(shape.matrices) + 2)  # keys and values too
    queries, *warps = map(math.prod, shape.sides)
    attending = sum(whole(size, ALIGNED) for size in (2 * queries, *(4 * size for size in warps)))
    handed = shape.handed(batch, blocks)
    pair = (4 * math.prod(handed), 8) if handed else ()
    barriers = 8 * SLOTS, 8 * SLOTS, 8 * (2 * (width // SPAN) + 1)
    sums = 4 * WARPS * rows * ROWS * shape.swept(batch, blocks)
    sizes = 2 * rows * width, 4 * rows, *barriers, table, *pair, max(sums, attending)  # one in the place of the other
    taken = ALIGNED + sum(whole(size, ALIGNED) for size in sizes)  # Pallas has barriers of its own
    return min(SLOTS, (SHARED - taken) // (2 * ROWS * pitch(batch)))


def aligned(shapes: Sequence[LayerShape]) -> list[LayerShape] | None:
    """The shapes of several layers that differ in their ranks, each with room for all; None if they differ in more.

    Where a matrix is low-rank in one layer, it is of rank 0 in those in which it is dense.
    """
    columns = [_aligned(column) for column in zip(*(shape.groups for shape in shapes), strict=True)]
    if None in columns:
        return None
    return [shape.with_groups(groups) for shape, groups in zip(shapes, zip(*columns, strict=True), strict=True)]


def _aligned(groups: Sequence[Group]) -> list[Group] | None:
    """The same of one group of every layer."""
    if len({(group.inputs, group.outputs) for group in groups}) > 1:
        return None
    most = tuple(map(max, zip(*(group.widths for group in groups), strict=True)))
    members = list(zip(*(group.ranks for group in groups), strict=True))
    deepest = tuple(max(rank or 0 for rank in ranks) for ranks in members)
    dense = tuple(i for i, ranks in enumerate(members) if None in ranks)
    return [
        replace(
            group,
            ranks=tuple((rank or 0) if deep else None for rank, deep in zip(group.ranks, deepest, strict=True)),
            most=most,
            deepest=deepest,
            dense=dense,
        )
        for group in groups
    ]
