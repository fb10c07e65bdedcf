"""Ways of factoring one matrix, each a closed form: truncate T·W·S, where T weighs outputs and S weighs inputs.

What a method is, is which weights it takes from what calibration has seen. A new one is a new row of `METHODS`.
Weights W are (out, in) here, as checkpoints store them, and W ≈ up·down.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import linalg


class Moment:
    """A second moment C = mean of x·xᵀ, float64 (n, n), or its diagonal (n,). Projections of one x share it."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal is known."""
        return self.matrix.ndim == 1

    @cached_property
    def _root(self) -> np.ndarray:
        if self.diagonal:
            return np.sqrt(self.matrix)
        values, vectors = np.linalg.eigh(self.matrix)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    def times(self, matrix: np.ndarray) -> np.ndarray:
        """matrix (m, n)·C."""
        return matrix * self.matrix if self.diagonal else matrix @ self.matrix

    def times_root(self, matrix: np.ndarray) -> np.ndarray:
        """matrix (m, n)·S, S the symmetric root of C."""
        return matrix * self._root if self.diagonal else matrix @ self._root

    def shrunk(self, share: float) -> "Moment":
        """C with `share` of it replaced by its mean power in every direction (Ledoit and Wolf 2004)."""
        if self.diagonal:
            return Moment((1 - share) * self.matrix + share * self.matrix.mean())
        mean = np.trace(self.matrix) / len(self.matrix)
        return Moment((1 - share) * self.matrix + share * mean * np.eye(len(self.matrix)))


@dataclass
class Evidence:
    """What calibration tells of one matrix (out, in). What no method asked for is None.

    Attributes:
        inputs: the second moment of its inputs x.
        magnitudes: the mean of |x|, float64 (in,).
        gradients: the second moment of the loss's gradients at its outputs; of wide matrices the diagonal.
        fisher: of each row of W, the mean square of its gradient over windows, float64 (out,).
    """

    inputs: Moment | None = None
    magnitudes: np.ndarray | None = None
    gradients: Moment | None = None
    fisher: np.ndarray | None = None

    @cached_property
    def loss_metric(self) -> "Metric":
        """The K-FAC estimate of the loss: ΔW costs tr(G·ΔW·C·ΔWᵀ) (Martens and Grosse 2015).

        Both moments are shrunk (Ledoit and Wolf 2004), as what was not seen may still come. How much is a trade
        between text like the calibration's and other text (docs/compression.md).
        """
        assert self.inputs is not None and self.gradients is not None
        gradients = self.gradients.shrunk(GRADIENT_SHRINKAGE)
        left = np.sqrt(gradients.matrix) if gradients.diagonal else np.linalg.cholesky(gradients.matrix).T
        return Metric(left, self.inputs.shrunk(INPUT_SHRINKAGE))


INPUT_SHRINKAGE, GRADIENT_SHRINKAGE = 0.05, 0.03


class Metric(NamedTuple):
    """How errors are weighed: ‖T·ΔW·S‖². `left` is T, upper triangular (out, out) or its diagonal (out,); `right` is
    the moment S·Sᵀ (in, in). None is the identity.
    """

    left: np.ndarray | None = None
    right: Moment | None = None

    def times_left(self, matrix: np.ndarray) -> np.ndarray:
        """T·matrix (out, n)."""
        if self.left is None:
            return matrix
        return self.left[:, None] * matrix if self.left.ndim == 1 else self.left @ matrix

    def solve_left(self, matrix: np.ndarray) -> np.ndarray:
        """T⁻¹·matrix (out, n)."""
        if self.left is None:
            return matrix
        return matrix / self.left[:, None] if self.left.ndim == 1 else linalg.solve_triangular(self.left, matrix)

    def times_right(self, matrix: np.ndarray) -> np.ndarray:
        """matrix (n, in)·S·Sᵀ."""
        return self.right.times(matrix) if self.right else matrix


class Factors(NamedTuple):
    """Nested factors: the first r columns of `up` (out, k) and rows of `down` (k, in) are those of rank r. float64.

    `energies` (min(out, in),) are the squared singular values of T·W·S, descending: what rank r leaves out is the
    sum of those behind r.
    """

    up: np.ndarray
    down: np.ndarray
    energies: np.ndarray


def factor(weight: np.ndarray, metric: Metric, rank: int) -> Factors:
    """The nearest products up·down of every rank up to `rank`, in a metric.

    With P the leading left singular vectors of A·S, A = T·W, the optimum is up = T⁻¹·P, down = Pᵀ·A (the form of
    Swift-SVD): no inverse of S is needed, so singular moments (few tokens, dead channels) do no harm.

    Args:
        weight: (out, in).
        metric: see `Metric`.
        rank: the highest rank of interest, k.
    """
    scaled = metric.times_left(weight.astype(np.float64))
    outputs, inputs = scaled.shape
    if outputs <= inputs:
        energies, leading = _descending(metric.times_right(scaled) @ scaled.T)
        leading = leading[:, :rank]
    else:  # the same vectors from the smaller eigenproblem
        whitened = metric.right.times_root(scaled) if metric.right else scaled
        energies, vectors = _descending(whitened.T @ whitened)
        leading = np.linalg.qr(whitened @ vectors[:, :rank])[0]
    up, down = metric.solve_left(leading), leading.T @ scaled
    # Balanced, as T⁻¹ spreads scales over orders of magnitude that 16 bits would not survive.
    balance = np.sqrt(np.linalg.norm(down, axis=1) / np.linalg.norm(up, axis=0).clip(1e-30)).clip(1e-30)
    return Factors(up * balance, down / balance[:, None], np.maximum(energies, 0))


def losses(weight: np.ndarray, factors: Factors, metric: Metric) -> np.ndarray:
    """What every rank 0…k costs in a metric that need not be the factors' own: float64 (k+1,).

    ‖M - A_r·B_r‖² for M = T·W·S, A = T·up, B = down·S, from inner products, for all r at once.
    """
    a = metric.times_left(factors.up)
    weighed = metric.times_right(factors.down)
    scaled = metric.times_left(weight.astype(np.float64))
    total = np.vdot(metric.times_right(scaled), scaled)
    cross = np.einsum("ok,ok->k", a, scaled @ weighed.T)
    gram = (a.T @ a) * (factors.down @ weighed.T)
    squares = np.cumsum(2 * np.tril(gram, -1).sum(axis=1) + np.diag(gram))
    return np.maximum(total + np.concatenate([[0], squares - 2 * np.cumsum(cross)]), 0)


def tails(energies: np.ndarray, rank: int) -> np.ndarray:
    """The sums of the energies behind every rank 0…`rank`: float64 (rank+1,)."""
    return np.append(np.cumsum(energies[::-1])[::-1], 0)[: rank + 1]


class Method(NamedTuple):
    """A way of weighing errors, and what it needs to be measured: any of inputs, gradients, fisher."""

    metric: Callable[[Evidence], Metric]
    needs: frozenset[str]


def _svd(evidence: Evidence) -> Metric:
    """No weights (Eckart and Young 1936); what SVD-Flash's own code does."""
    return Metric()


def _fwsvd(evidence: Evidence) -> Metric:
    """Rows by the root of their Fisher information (Hsu et al., ICLR 2022)."""
    assert evidence.fisher is not None
    return Metric(left=np.sqrt(evidence.fisher.clip(1e-12 * evidence.fisher.max())))


def _asvd(evidence: Evidence) -> Metric:
    """Inputs by the root of their mean magnitude, α = ½ (Yuan et al. 2023): S = diag(|x|^½), so S·Sᵀ = diag(|x|)."""
    assert evidence.magnitudes is not None
    return Metric(right=Moment(evidence.magnitudes))


def _svd_llm(evidence: Evidence) -> Metric:
    """Inputs whitened: the least error of the outputs (Wang et al., ICLR 2025)."""
    return Metric(right=evidence.inputs)


def _kfac(evidence: Evidence) -> Metric:
    """Inputs and output gradients whitened: the least predicted loss (KFAC-SVD, ICML 2026)."""
    return evidence.loss_metric


METHODS = {
    "svd": Method(_svd, frozenset()),
    "fwsvd": Method(_fwsvd, frozenset({"fisher"})),
    "asvd": Method(_asvd, frozenset({"inputs"})),
    "svd-llm": Method(_svd_llm, frozenset({"inputs"})),
    "kfac": Method(_kfac, frozenset({"inputs", "gradients"})),
}


def _descending(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors, the largest first."""
    values, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
    return values[::-1], vectors[:, ::-1]
