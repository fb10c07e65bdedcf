"""What is static about a layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Matrices that read the same x, as a layer multiplies with them: outputs, and ranks (None where dense)."""

    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int | None, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """What each member adds to the group's first product."""
        return tuple(rank or outputs for rank, outputs in zip(self.ranks, self.outputs, strict=True))


@dataclass(frozen=True)
class LayerShape:
    """Everything static about a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    head_norms: bool
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
