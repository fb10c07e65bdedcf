"""Refitting layer after layer to what the compressed layers before really hand on (AA-SVD, 2026).

With x a matrix's inputs in the dense model and x' those in the compressed one, the best dense replacement of W is
W* = (W·E[x·x'ᵀ] + λ·W)·(E[x'·x'ᵀ] + λ)⁻¹; its best factors are those in the metric of x'. The ridge λ pulls towards W,
as few tokens would overfit. For the same reason a matrix that stays dense stays as it is where most is kept: W* would
cost nothing, but was worse on text that it had not seen. Where little is kept, x' is so far from x that W* with a
stronger ridge is better there too, but among narrowed MLPs (docs/compression.md).
"""

from collections.abc import Mapping

import numpy as np
from scipy import linalg

from jaxsvd.compression.analysis import Analysis
from jaxsvd.compression.methods import METHODS, Evidence, Moment, factor
from jaxsvd.compression.plan import Plan
from jaxsvd.compression.width import kept_neurons
from jaxsvd.compression.workspace import Arrays

RIDGE = 1e-2  # of the mean power of x'
DENSE_BELOW = 0.7  # where less is kept of what was selected, matrices that stay dense are refitted too
DENSE_RIDGE = 5e-2


class Refit:
    """Refits layers in their order. Hidden states are carried twice: the dense model's and the compressed one's."""

    def __init__(self, analysis: Analysis, plan: Plan) -> None:
        self._analysis, self._passes, self._plan = analysis, analysis.passes, plan

    def first(self) -> Arrays:
        """The carry before the first layer."""
        x = self._passes.embed(self._analysis.windows)
        return {"dense": x, "compressed": x}

    def step(self, index: int, carry: Arrays) -> tuple[Arrays, Arrays]:
        """Refit a layer: the carry behind it, and `{path}.up` and `.down`, or `{path}.weight`, of what changed."""
        evidence = self._analysis.evidence(index)
        dense = self._passes.load(index)
        kept = self._kept(index)
        result: Arrays = {}
        products: dict[str, np.ndarray] = {}
        for group, members in enumerate(self._passes.groups(index)):
            compressed = self._passes.load(index, products) if products else dense
            crossed, squared = self._passes.cross_moments(dense, carry["dense"], compressed, carry["compressed"], group)
            for path in members:
                found, products[path] = self._matrix(path, crossed, squared, evidence[path], kept)
                result |= {f"{path}.{name}": array for name, array in found.items()}
        compressed = self._passes.load(index, products)
        return {
            "dense": self._passes.forward(dense, carry["dense"]),
            "compressed": self._passes.forward(compressed, carry["compressed"]),
        }, result

    def _kept(self, index: int) -> np.ndarray | None:
        """The neurons that a narrowed MLP keeps."""
        width = self._plan.widths.get(f"model.layers.{index}.mlp")
        return None if width is None else kept_neurons(self._analysis.layer(index, "order")["order"], width)

    def _matrix(
        self, path: str, crossed: np.ndarray, squared: np.ndarray, known: Evidence, kept: np.ndarray | None
    ) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
        """What changes of a matrix, and the dense matrix (out, in) that it then stands for."""
        stored = self._analysis.weight(path)
        weight, product = stored.astype(np.float64), np.zeros_like(stored)
        if kept is not None and path.endswith((".gate_proj", ".up_proj")):
            product[kept] = stored[kept]
            return {"weight": stored[kept]}, product
        if kept is not None and path.endswith(".down_proj"):
            smaller = _refitted(weight, crossed[:, kept], squared[np.ix_(kept, kept)], kept).astype(stored.dtype)
            product[:, kept] = smaller
            return {"weight": smaller}, product
        if path not in self._plan.ranks:
            little_is_kept = self._plan.cost < DENSE_BELOW * self._plan.dense_cost
            if not little_is_kept or self._plan.widths or not self._analysis.options.selects(path):
                return {}, stored
            moved = _refitted(weight, crossed, squared, ridge=DENSE_RIDGE).astype(stored.dtype)
            return {"weight": moved}, moved
        known.inputs = Moment(squared)
        metric = METHODS[self._analysis.options.method].metric(known)
        found = factor(_refitted(weight, crossed, squared), metric, self._plan.ranks[path])
        up, down = found.up.astype(stored.dtype), found.down.astype(stored.dtype)
        return {"up": up, "down": down}, up.astype(np.float32) @ down.astype(np.float32)


def _refitted(
    weight: np.ndarray, crossed: np.ndarray, squared: np.ndarray, kept: np.ndarray | None = None, ridge: float = RIDGE
) -> np.ndarray:
    """W*, of all inputs or of the kept ones."""
    ridge = ridge * np.trace(squared) / len(squared)
    target = weight @ crossed + ridge * (weight if kept is None else weight[:, kept])
    return linalg.solve(squared + ridge * np.eye(len(squared)), target.T, assume_a="pos").T
