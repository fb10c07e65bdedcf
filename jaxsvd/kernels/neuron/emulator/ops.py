"""The operators and activation functions that instructions take as `op`, in exact float32 arithmetic.

Hardware approximates activations by piecewise polynomials: compare with a tolerance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsvd.kernels.neuron.emulator.errors import not_modelled


@dataclass(frozen=True, repr=False)
class Op:
    """An operator: `unary` where activations take it, `binary` where the Vector Engine does, `reduce` along an axis.

    `valid` is the range of magnitudes that the Scalar Engine computes, `negative` whether it may be negative.
    """

    name: str
    unary: Callable[..., np.ndarray] | None = None
    binary: Callable[..., np.ndarray] | None = None
    reduce: Callable[..., np.ndarray] | None = field(default=None)
    valid: tuple[float, float] | None = None
    negative: bool = False

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Not modelled."""
        not_modelled(f"nl.{self.name} as a function: pass it as the op of an instruction of nki.isa")

    def __repr__(self) -> str:
        return f"nl.{self.name}"


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _erf(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float32)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = (
    Op("copy", np.copy),
    Op("square", np.square),
    Op("sigmoid", _sigmoid),
    Op("relu", lambda x: np.maximum(x, 0)),
    Op("silu", lambda x: x * _sigmoid(x)),
    Op("gelu", lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    Op("gelu_apprx_tanh", _gelu_tanh),
    Op("gelu_apprx_sigmoid", lambda x: x * _sigmoid(1.702 * x)),
    Op("tanh", np.tanh),
    Op("exp", np.exp),
    Op("abs", np.abs),
    Op("sign", np.sign),
    Op("log", np.log, valid=(2.0**-64, 2.0**64)),
    Op("sqrt", np.sqrt, valid=(2.0**-116, 2.0**118)),
    Op("rsqrt", lambda x: 1 / np.sqrt(x), valid=(2.0**-87, 2.0**97)),
    Op("reciprocal", lambda x: 1 / x, valid=(2.0**-42, 2.0**42), negative=True),
)
ARITHMETIC = (
    Op("add", binary=np.add, reduce=np.sum),
    Op("subtract", binary=np.subtract),
    Op("multiply", binary=np.multiply, reduce=np.prod),
    Op("maximum", binary=np.maximum, reduce=np.max),
    Op("minimum", binary=np.minimum, reduce=np.min),
)
