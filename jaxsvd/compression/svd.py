"""Factoring one matrix."""

from functools import cached_property

import numpy as np


class Moment:
    """The second moment of a projection's inputs, C = mean of x·xᵀ, float64 (in, in). Projections of one x share it."""

    def __init__(self, total: np.ndarray, tokens: int) -> None:
        self.matrix = total / tokens

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of C."""
        values, vectors = np.linalg.eigh(self.matrix)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def whitened_factors(weight: np.ndarray, moment: Moment, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank-r product up·down nearest to `weight` on inputs of that moment: min E‖W·x - up·down·x‖².

    SVD-LLM's optimum (Wang et al., ICLR 2025) in the form that needs no inverse (Swift-SVD): with P the leading left
    singular vectors of W·C^½, up = P and down = Pᵀ·W, so a singular C (few tokens, dead channels) does no harm.

    Args:
        weight: (out, in), as checkpoints store it.
        moment: of the inputs (in, in).
        rank: r.

    Returns:
        up (out, r) and down (r, in), float64, of balanced scale.
    """
    wide = weight.astype(np.float64)
    outputs, inputs = wide.shape
    if outputs <= inputs:
        leading = _leading(wide @ moment.matrix @ wide.T, rank)
    else:  # the same vectors from the smaller eigenproblem
        scaled = wide @ moment.root
        leading = np.linalg.qr(scaled @ _leading(scaled.T @ scaled, rank))[0]
    down = leading.T @ wide
    balance = np.sqrt(np.linalg.norm(down, axis=1).clip(1e-30))
    return leading * balance, down / balance[:, None]


def _leading(symmetric: np.ndarray, rank: int) -> np.ndarray:
    """The eigenvectors of the largest eigenvalues, in columns."""
    return np.linalg.eigh(symmetric)[1][:, ::-1][:, :rank]
