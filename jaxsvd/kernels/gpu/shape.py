"""What is static about a stack of layers, and how wide its buffers are."""

from dataclasses import dataclass

SPAN = 1024  # inputs in a slot of the ring of weights; buffers of vectors have room for whole ones
NORMED = 512  # elements that a norm reads at once, of x and of its weights
WIDEST = 24 * SPAN  # what fits into shared memory beside the ring
TOKENS = 32  # of the cache that a block attends to at once


def slots(width: int) -> int:
    """How many slots a tile of this many inputs takes."""
    return -(-width // SPAN)


def whole(width: int, unit: int) -> int:
    """The next multiple."""
    return -(-width // unit) * unit


def roomy(width: int) -> int:
    """The width of a buffer that is read a whole slot at a time."""
    return whole(width, SPAN)


@dataclass(frozen=True)
class Group:
    """Matrices that read the same x, as a kernel sees them: outputs, and padded ranks (None where dense)."""

    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int | None, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """What each member adds to the group's first product."""
        return tuple(rank or outputs for rank, outputs in zip(self.ranks, self.outputs, strict=True))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each member begins in the first product."""
        return tuple(sum(self.widths[:i]) for i in range(len(self.widths)))

    @property
    def low_rank(self) -> list[int]:
        """The members that have a second product."""
        return [i for i, rank in enumerate(self.ranks) if rank is not None]

    @property
    def strip(self) -> tuple[int, int]:
        """From where to where in the first product's result its low-rank members lie."""
        first, last = (self.low_rank or [0])[0], (self.low_rank or [0])[-1]
        return self.starts[first], self.starts[last] + self.widths[last]


@dataclass(frozen=True)
class LayerShape:
    """Everything static about a layer. `head_norms`: whether the heads of q and k are normed, as in Qwen3."""

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

    def obstacle(self, capacity: int) -> str | None:
        """Why the kernel can't run such layers with a cache for so many tokens, or None."""
        sizes = [size for group in self.groups for size in (group.inputs, *group.widths, *group.outputs)]
        odd = [size for size in sizes if size % 64]
        widest = max(max(group.inputs, sum(group.widths)) for group in self.groups)
        if odd:
            return f"widths must be multiples of 64, which {odd[0]} is not"
        if self.head_dim not in (64, 128):
            return f"heads must be 64 or 128 wide, not {self.head_dim}"
        if widest > WIDEST:
            return f"a multiprocessor has room for vectors of {WIDEST} elements, not {widest}"
        if capacity % TOKENS:
            return f"the cache must have room for a multiple of {TOKENS} tokens, not {capacity}"
        return None
