"""The shapes of layers, as their kernel sees them, and how wide its buffers are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from jax import lax

ROWS = 8  # outputs in a tile: the n of mma.m16n8k16
SPAN = 1024  # inputs in a slot of the ring of weights; buffers of vectors have room for whole ones
MANY = 6144  # outputs of a matrix: some 2.5 µs to add up from all blocks, or a meeting and what comes with it
TOKENS = 32  # of the cache that a block attends to at once
UNIT = 16  # widths are whole ones: 32 bytes, where copies and loads may begin

SHARED = 227 * 1024  # bytes of shared memory that a block may have on Hopper
RESERVED = 4 * 1024  # of them, for sums across warps, barriers and alignment
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


def by_rows(outputs: Sequence[int]) -> bool:
    """Whether the blocks share the V of such a group by rows, one output each, and not by ranks.

    By ranks U and V are one product: a block that has some ranks needs nobody else's. But all blocks then add to the
    same outputs, and where there are many that takes longer than another meeting.
    """
    return sum(outputs) > MANY * len(outputs)


def _div(a: Any, b: Any) -> Any:
    """Their quotient, cut off."""
    known = isinstance(a, int) and isinstance(b, int)
    return a // b if known else lax.div(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))


@dataclass(frozen=True)
class Group:
    """Matrices that read the same x, as a kernel sees them: outputs, and padded ranks.

    A rank is None where a matrix is dense in all layers, and 0 where it is dense in this one and low-rank in others.
    It may be known at run time only. `deepest` are the greatest ranks in any layer, and `dense` the members that are
    dense in some.
    """

    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[Any, ...]
    deepest: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[Any, ...]:
        """What each member adds to the group's first array: its rank, or all its outputs."""
        return tuple(self.either(i, *pair) for i, pair in enumerate(zip(self.ranks, self.outputs, strict=True)))

    @property
    def by_rows(self) -> bool:
        """Whether each block has rows of V, not ranks of U with their rows of V."""
        return by_rows(self.outputs)

    @property
    def costs(self) -> tuple[Any, ...]:
        """What each row of that takes, in units: itself, and the row of V that goes with it."""
        alone = self.inputs // UNIT
        behind = (0 if self.by_rows else outputs // UNIT for outputs in self.outputs)
        return tuple(alone + self.either(i, more, 0) for i, more in enumerate(behind))

    def either(self, i: int, low: Any, dense: Any) -> Any:
        """`low` where member i is low-rank, and `dense` where it is not: two numbers."""
        rank = self.ranks[i]
        if rank is None or isinstance(rank, int):
            return low if rank else dense
        return jnp.where(rank == 0, dense, low) if i in self.dense else low

    @property
    def starts(self) -> tuple[Any, ...]:
        """Where each member begins in the first array."""
        return tuple(sum(self.widths[:i]) for i in range(len(self.widths)))

    @property
    def low_rank(self) -> list[int]:
        """The members that have a V, in some layer at least."""
        return [i for i, rank in enumerate(self.ranks) if rank is not None]

    @property
    def seconds(self) -> tuple[list[Any], list[Any]]:
        """By rows: how many outputs each member has that is low-rank, and what each of them takes."""
        outputs = [self.either(i, self.outputs[i], 0) for i in self.low_rank]
        return outputs, [self.either(i, self.ranks[i], UNIT) >> (UNIT.bit_length() - 1) for i in self.low_rank]

    def strip(self, blocks: int) -> int:
        """By ranks: the most results of U that a block may have of a member."""
        if self.by_rows:
            return 0
        pairs = list(zip(self.widths, self.costs, strict=True))
        total = sum(width * cost for width, cost in pairs)
        return max(min(width, total // (blocks * cost) + 2) for width, cost in pairs)

    @property
    def strips(self) -> list[int]:
        """By rows: the room for all results of U of each low-rank member."""
        return [roomy(self.deepest[i]) for i in self.low_rank] if self.by_rows else []

    @property
    def held(self) -> int:
        """The elements in shared memory for what its products read."""
        return max(roomy(self.inputs), sum(self.strips))


def shares(widths: Sequence[Any], costs: Sequence[Any], block: Any, blocks: int) -> list[tuple[Any, Any]]:
    """What a block has of things of which there are so many, of such costs: of each the first, and one behind the last.

    Each block gets the same, give or take one. Numbers stay below 2³¹, though products of the total would not.
    """
    sums = [width * cost for width, cost in zip(widths, costs, strict=True)]
    *befores, total = accumulate(sums, initial=0)
    even = _div(total, blocks)

    def edges(block: Any) -> list[Any]:
        at = block * even + _div(block * (total - even * blocks), blocks)
        each = zip(widths, costs, befores, strict=True)
        return [jnp.clip(_div(at - before, cost), 0, width) for width, cost, before in each]

    return list(zip(edges(block), edges(block + 1), strict=True))


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
    def arrays(self) -> int:
        """How many a layer has that are found by their address: those of its groups, keys and values."""
        return sum(1 + len(group.low_rank) for group in self.groups) + 2

    @property
    def held(self) -> int:
        """The elements of a phase's x in shared memory, at most."""
        return max(group.held for group in self.groups)

    @property
    def sides(self) -> int:
        """The bytes in shared memory in which the four warps of a block put together what they have attended to."""
        return 4 * 4 * self.heads // self.kv_heads * (self.head_dim + 2)

    def strip(self, blocks: int) -> int:
        """What U gives to V in a block, elements: in whole tiles."""
        return max(whole(group.strip(blocks), ROWS) for group in self.groups)

    def obstacle(self, layers: int, capacity: int) -> str | None:
        """Why the kernel can't run so many layers of this shape with a cache for so many tokens, or None."""
        sizes = [size for group in self.groups for size in (group.inputs, *group.widths, *group.outputs)]
        odd = [size for size in sizes if size % UNIT]
        if odd:
            return f"widths must be multiples of {UNIT}, which {odd[0]} is not"
        if self.head_dim not in (64, 128):
            return f"heads must be 64 or 128 wide, not {self.head_dim}"
        if ring(self, layers) < FEWEST:
            return f"a multiprocessor has no room for {self.held} elements and the addresses of {layers} layers"
        if capacity % TOKENS:
            return f"the cache must have room for a multiple of {TOKENS} tokens, not {capacity}"
        return None


def ring(shape: LayerShape, layers: int) -> int:
    """The slots for which shared memory has room, beside addresses, the greatest x, and what attention needs."""
    taken = RESERVED + 2 * shape.held + 8 * layers * shape.arrays + shape.sides
    return min(SLOTS, (SHARED - taken) // (2 * ROWS * SPAN))


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
    members = list(zip(*(group.ranks for group in groups), strict=True))
    deepest = tuple(max(rank or 0 for rank in ranks) for ranks in members)
    dense = tuple(i for i, ranks in enumerate(members) if None in ranks)
    return [
        replace(
            group,
            ranks=tuple((rank or 0) if deep else None for rank, deep in zip(group.ranks, deepest, strict=True)),
            deepest=deepest,
            dense=dense,
        )
        for group in groups
    ]
