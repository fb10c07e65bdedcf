"""Which projection is wrong: every one of a loaded model, apart from the others, against what its checkpoint says.

Logits alone do not tell. An error of 3 % in one projection of thirty layers often stays below the 1 or 2 % that logit
matching allows, and where it does not, it could be anywhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxsvd.checkpoint.read import Checkpoint, CheckpointWeights
from jaxsvd.engine import Engine
from jaxsvd.kernels import Dense
from jaxsvd.models.llama import Llama

PROJECTION_TOLERANCE = 0.02  # bfloat16 gives 0.005 at most: see test_accuracy.py
_ROWS = 8
_GATED = ("gate_proj", "up_proj")


class Deviation(NamedTuple):
    """|actual - expected| / |expected| of what projection `path` makes of normal random x, Frobenius norms.

    `model.layers.….mlp` is the three of an MLP together, as a kernel may run them.
    """

    path: str
    error: float


def deviations(engine: Engine, checkpoint: Checkpoint) -> list[Deviation]:
    """The deviation of every projection and of every MLP, the largest first; expected is float32 on the host."""
    rng = np.random.default_rng(0)
    widths = sorted({inputs for inputs, _ in checkpoint.shapes.values()})
    xs = {width: rng.standard_normal((_ROWS, width), np.float32).astype(engine.dtype) for width in widths}
    graph, state = nnx.split(engine.model)
    # All in one graph: alone, every rank would compile again.
    actual = jax.jit(lambda state, xs: _apart(nnx.merge(graph, state), checkpoint, xs))(state, xs)
    expected = _Expected(checkpoint, {width: x.astype(np.float32) for width, x in xs.items()})
    found = [Deviation(path, _distance(np.asarray(y), expected(path))) for path, y in actual.items()]
    return sorted(found, key=lambda deviation: -deviation.error)


def suspects(found: Sequence[Deviation], tolerance: float) -> list[Deviation]:
    """Those above the tolerance, and an MLP only where none of its three projections alone is."""
    above = [deviation for deviation in found if not deviation.error <= tolerance]
    blamed = {deviation.path.rpartition(".")[0] for deviation in above}
    return [deviation for deviation in above if deviation.path not in blamed]


def _apart(model: Llama, checkpoint: Checkpoint, xs: dict[int, Any]) -> dict[str, jax.Array]:
    """What every projection and MLP makes of the x of its width, by path."""
    found = {}
    for i, layer in enumerate(model.layers):
        for module, group, names in (
            ("self_attn", layer.self_attn.qkv, ("q_proj", "k_proj", "v_proj")),
            ("self_attn", layer.self_attn.o, ("o_proj",)),
            ("mlp", layer.mlp.gate_up, ("gate_proj", "up_proj")),
            ("mlp", layer.mlp.down, ("down_proj",)),
        ):
            paths = [f"model.layers.{i}.{module}.{name}" for name in names]
            found |= zip(paths, group(xs[checkpoint.shapes[paths[0]][0]]), strict=True)
        found[f"model.layers.{i}.mlp"] = layer.mlp(xs[model.config.hidden_size])
    return found


class _Expected:
    """What a checkpoint's weights make of the x of each width, float32."""

    def __init__(self, checkpoint: Checkpoint, xs: dict[int, np.ndarray]) -> None:
        self._shapes, self._weights, self._xs = checkpoint.shapes, CheckpointWeights(checkpoint, np.float32), xs

    def __call__(self, path: str) -> np.ndarray:
        if not path.endswith(".mlp"):
            return self._project(path, self._xs[self._shapes[path][0]])
        gate, up = (self._project(f"{path}.{name}", self._xs[self._shapes[f"{path}.{name}"][0]]) for name in _GATED)
        with np.errstate(over="ignore"):  # silu of what is very negative is 0
            return self._project(f"{path}.down_proj", gate / (1 + np.exp(-gate)) * up)

    def _project(self, path: str, x: np.ndarray) -> np.ndarray:
        matrix, bias = self._weights.matrix(path, *self._shapes[path], False)
        y = x @ matrix.w if isinstance(matrix, Dense) else x @ matrix.u @ matrix.v
        return y if bias is None else y + bias


def _distance(actual: np.ndarray, expected: np.ndarray) -> float:
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual.astype(np.float32) - expected)) / norm if norm else float(actual.any())
