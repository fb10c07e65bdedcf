"""What is to be made, checked."""

from dataclasses import dataclass

from jaxsvd.compression.methods import METHODS
from jaxsvd.compression.plan import Cost, parameters
from jaxsvd.errors import UsageError

PARTS = {"all": (".self_attn.", ".mlp."), "attention": (".self_attn.",), "mlp": (".mlp.",)}
ALLOCATIONS = ("global", "uniform")


@dataclass(frozen=True)
class Options:
    """The arguments of `jaxsvd.compress` that decide what the target holds. Raises UsageError for what can't be."""

    keep: float
    method: str
    allocate: str
    refit: bool
    width: bool
    only: str
    dense_layers: tuple[int, ...]
    rank_multiple: int
    cost: Cost = parameters

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UsageError(f"keep is {self.keep}: expected a fraction between 0 and 1, such as 0.8")
        for name, value, known in (
            ("method", self.method, METHODS),
            ("allocate", self.allocate, ALLOCATIONS),
            ("only", self.only, PARTS),
        ):
            if value not in known:
                raise UsageError(f"{name} is {value!r}: expected one of {', '.join(known)}")
        if self.rank_multiple < 1:
            raise UsageError(f"rank_multiple is {self.rank_multiple}: expected at least 1")
        if self.width and self.allocate != "global":
            raise UsageError("width needs the global plan: it is one of its choices; leave out allocate='uniform'")
        if self.width and self.only == "attention":
            raise UsageError("width narrows MLPs, and only='attention' leaves them as they are: choose one")

    @property
    def predicts(self) -> bool:
        """Whether losses are predicted."""
        return self.allocate == "global"

    @property
    def needs(self) -> frozenset[str]:
        """What must be measured: inputs, gradients, fisher."""
        predicting = {"inputs", "gradients"} if self.predicts else set()
        return METHODS[self.method].needs | predicting | ({"inputs"} if self.refit else set())

    def selects(self, path: str) -> bool:
        """Whether a projection may be compressed."""
        return any(part in path for part in PARTS[self.only]) and int(path.split(".")[2]) not in self.dense_layers
