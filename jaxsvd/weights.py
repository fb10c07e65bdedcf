"""Where a model's constructor gets its arrays from. A constructor names each tensor by its HF path, once; what answers
may read a checkpoint (`jaxsvd.checkpoint`), describe shapes only (`AbstractWeights`) or draw numbers (`RandomWeights`).
"""

import zlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from jaxsvd.kernels import Dense, Factored, Matrix

# (path, inputs, outputs) -> the rank to use, or None for a dense matrix.
Ranks = Callable[[str, int, int], int | None]


def break_even(inputs: int, outputs: int) -> float:
    """The rank from which a factored matrix has as many parameters as the dense one: in·out/(in+out)."""
    return inputs * outputs / (inputs + outputs)


def uniform_ranks(keep: float, multiple: int = 1) -> Ranks:
    """Ranks that keep the fraction `keep` of every matrix, rounded to `multiple`; dense from break-even on."""

    def rank(path: str, inputs: int, outputs: int) -> int | None:
        limit = break_even(inputs, outputs)
        chosen = max(multiple, round(keep * limit / multiple) * multiple)
        return chosen if chosen < limit else None

    return rank


class Weights(Protocol):
    """What a model's constructor asks for its arrays. Arrays may be `jax.ShapeDtypeStruct`s."""

    dtype: np.dtype

    def array(self, name: str, *shape: int) -> Any:
        """The tensor `name` (an embedding, a norm) of that shape, in the model's dtype."""
        ...

    def matrix(self, path: str, inputs: int, outputs: int, bias: bool) -> tuple[Matrix, Any | None]:
        """The projection `path`, dense or factored, and its bias (outputs,) where it has one."""
        ...

    def place(self, array: np.ndarray) -> jax.Array:
        """Put an array of packed matrices on the device; arrays of equal content may become one."""
        ...


class AbstractWeights:
    """Shapes and dtypes without values, dense or at given ranks: to lower, count or check a model."""

    def __init__(self, dtype: Any = np.float32, ranks: Ranks | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._ranks = ranks or (lambda path, inputs, outputs: None)

    def make(self, name: str, *shape: int) -> Any:
        """An array of this kind; subclasses give it values."""
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def array(self, name: str, *shape: int) -> Any:
        """See `Weights.array`."""
        return self.make(name, *shape)

    def matrix(self, path: str, inputs: int, outputs: int, bias: bool) -> tuple[Matrix, Any | None]:
        """See `Weights.matrix`."""
        rank = self._ranks(path, inputs, outputs)
        offset = self.make(path + ".bias", outputs) if bias else None
        if rank is None:
            return Dense(self.make(path, inputs, outputs)), offset
        return Factored(self.make(path + ".u", inputs, rank), self.make(path + ".v", rank, outputs)), offset

    def place(self, array: np.ndarray) -> jax.Array:
        """See `Weights.place`."""
        return jax.device_put(array)


class RandomWeights(AbstractWeights):
    """Random values of a scale that keeps activations near one; a tensor's depend on its name and the seed alone."""

    def __init__(self, dtype: Any = np.float32, ranks: Ranks | None = None, seed: int = 0) -> None:
        super().__init__(dtype, ranks)
        self._seed = seed

    def make(self, name: str, *shape: int) -> np.ndarray:
        """Normal values, variance 1/inputs for a matrix."""
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            return (1 + 0.1 * values).astype(self.dtype)
        return (values / np.sqrt(shape[0] if "embed" not in name else shape[1])).astype(self.dtype)
