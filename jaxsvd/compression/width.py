"""Narrowing an MLP: neurons are left out, and the down projection of the others repaired by least squares.

Optimal brain surgery on down's inputs z (Hassibi and Stork 1993; MoDeGPT's type I, ICLR 2025). The narrower MLP stays
dense and needs no second product.
"""

import numpy as np
from scipy import linalg
from scipy.linalg.blas import dgemm  # type: ignore[attr-defined]

from jaxsvd.compression.methods import Metric, Moment

# So much of the mean power is added to the moment of z, which is near-singular where neurons are alike: to find the
# order, and more for the repair, which is to serve text that was not seen.
RIDGE, REPAIR_RIDGE = 1e-2, 1e-1
# Neurons that leave together: one at a time is a thousand passes over a matrix that does not fit the cache.
STEPS = 128


def removal_order(weight: np.ndarray, metric: Metric, inputs: Moment) -> tuple[np.ndarray, np.ndarray]:
    """In which order neurons should leave, each time those whose loss can best be repaired by the others.

    Args:
        weight: the down projection (hidden, width).
        metric: of its errors; only its left side is used.
        inputs: the second moment of z (width, width).

    Returns:
        The order, int64 (width,), and `losses`, float64 (width+1,): what keeping k neurons loses.
    """
    width = len(inputs.matrix)
    scaled = metric.times_left(weight.astype(np.float64))
    inverse = np.asfortranarray(linalg.cho_solve(linalg.cho_factor(ridged(inputs.matrix)), np.eye(width)))
    alive, gone = np.arange(width), np.zeros(width, bool)
    order, losses = [], np.zeros(width + 1)
    batch = max(1, width // STEPS)
    while len(order) < width:
        cost = np.where(gone, np.inf, np.square(scaled).sum(axis=0) / np.diag(inverse).clip(1e-300))
        leaving = np.argsort(cost, kind="stable")[: min(batch, width - len(order))]
        # Their part of the outputs is handed to the others; what can't be handed over is lost.
        block = linalg.cho_factor(inverse[np.ix_(leaving, leaving)])
        handed = linalg.cho_solve(block, inverse[leaving])
        lost = np.vdot(scaled[:, leaving], linalg.cho_solve(block, scaled[:, leaving].T).T)
        left_over = width - len(order) - len(leaving)
        losses[left_over : left_over + len(leaving)] = losses[left_over + len(leaving)] + lost * np.linspace(
            1, 1 / len(leaving), len(leaving)
        )
        order.extend(alive[leaving])
        scaled -= scaled[:, leaving] @ handed
        inverse = dgemm(-1.0, inverse[:, leaving], handed, 1.0, inverse, overwrite_c=1)  # in place
        gone[leaving] = True
        if gone.mean() > 0.1:  # now and then, as the update is all traffic
            stay = np.flatnonzero(~gone)
            scaled, inverse = scaled[:, stay], np.asfortranarray(inverse[np.ix_(stay, stay)])
            alive, gone = alive[stay], gone[stay]
    return np.array(order), losses


def kept_neurons(order: np.ndarray, width: int) -> np.ndarray:
    """The `width` neurons that leave last, in the order of the model."""
    return np.sort(order[len(order) - width :])


def repaired(weight: np.ndarray, inputs: Moment, kept: np.ndarray, ridge: float = REPAIR_RIDGE) -> np.ndarray:
    """The down projection (hidden, k) of the kept neurons that comes nearest to the whole one's outputs."""
    moment = ridged(inputs.matrix, ridge)
    cross = weight.astype(np.float64) @ moment[:, kept]
    return linalg.solve(moment[np.ix_(kept, kept)], cross.T, assume_a="pos").T


def ridged(moment: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """A moment of which no direction is empty."""
    return moment + ridge * np.trace(moment) / len(moment) * np.eye(len(moment))
