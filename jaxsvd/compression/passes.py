"""Passes over text through the dense model, one layer in memory at a time, in float32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsvd.checkpoint.read import Checkpoint, CheckpointWeights
from jaxsvd.kernels import Dense, Matrix
from jaxsvd.kernels.xla import XLA, GroupPlan
from jaxsvd.layers import Embedding, RMSNorm, rope_angles
from jaxsvd.models import architecture
from jaxsvd.models.llama import Step

BATCH_TOKENS = {"cpu": 2048}  # what goes through a layer at once; elsewhere:
ACCELERATOR_BATCH_TOKENS = 16384
# Wider outputs keep the diagonal of their gradients' moment only: the whole would be as large as the layer.
FULL_GRADIENTS = 4096


@dataclass(frozen=True, eq=False)
class Tap(XLA):
    """The XLA backend with a tap at every group: its inputs can be read, and its outputs shifted.

    While a layer is traced, `inputs` collects each group's x, and the outputs are those of the layer plus `shifts`,
    whose gradients are hence the gradients at the outputs.
    """

    inputs: list[jax.Array] = field(default_factory=list)
    shifts: list[jax.Array] = field(default_factory=list)

    def project(self, plan: GroupPlan, x: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """As XLA does."""
        self.inputs.append(x)
        ys = super().project(plan, x, arrays)
        return [y + self.shifts.pop(0) for y in ys] if self.shifts else ys


class _Replaced(CheckpointWeights):
    """A checkpoint's weights with other matrices (out, in) in the place of some."""

    def __init__(self, checkpoint: Checkpoint, matrices: Mapping[str, np.ndarray]) -> None:
        super().__init__(checkpoint, np.float32)
        self._matrices = matrices

    def matrix(self, path: str, inputs: int, outputs: int, bias: bool) -> tuple[Matrix, np.ndarray | None]:
        if path not in self._matrices:
            return super().matrix(path, inputs, outputs, bias)
        return Dense(self._matrices[path].astype(np.float32).T), self.bias(path)


class LayerPass:
    """Runs windows of tokens (n, window) through the model's layers, one at a time.

    Hidden states are float32 (n, window, hidden) on the host. A layer is compiled once: all have the same shapes.
    """

    def __init__(self, checkpoint: Checkpoint, window: int) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._tap = Tap(jax.default_backend())
        self._graph: Any = None
        self._tree: Any = None
        self._outputs: list[tuple[int, ...]] = []  # of each group, the widths of its projections
        positions = jnp.arange(window)[None]
        self._step = Step(jnp.int32(0), positions, *rope_angles(positions, self._config.rope, self._config.head_dim))
        tokens = BATCH_TOKENS.get(jax.default_backend(), ACCELERATOR_BATCH_TOKENS)
        self._rows = max(1, tokens // window)
        self._forward_step = jax.jit(self._forward)
        self._moments_step = jax.jit(self._moments)
        self._cross_step = jax.jit(self._cross, static_argnames="group")
        self._backward_step = jax.jit(self._backward, static_argnames="fisher")

    def paths(self, layer: int) -> list[str]:
        """The projections of a layer, in the order of the model."""
        return [path for path in self._checkpoint.matrices if path.startswith(f"model.layers.{layer}.")]

    def groups(self, layer: int) -> list[list[str]]:
        """The same, those of one x together. Known once a layer has been loaded."""
        left = iter(self.paths(layer))
        return [[next(left) for _ in outputs] for outputs in self._outputs]

    def load(self, layer: int, replaced: Mapping[str, np.ndarray] | None = None) -> list[jax.Array]:
        """The arrays of a layer on the device, some matrices replaced by others (out, in)."""
        weights = _Replaced(self._checkpoint, replaced or {})
        module = architecture(self._config).layer(self._config, weights, self._tap, f"model.layers.{layer}")
        if self._graph is None:
            attention, mlp = module.self_attn, module.mlp
            self._outputs = [part.plan.widths for part in (attention.qkv, attention.o, mlp.gate_up, mlp.down)]
        self._graph, state = nnx.split(module)
        leaves, self._tree = jax.tree.flatten(state)
        return leaves

    def embed(self, windows: np.ndarray) -> np.ndarray:
        """The hidden states that enter the first layer."""
        return self._checkpoint.files.read("model.embed_tokens.weight")[windows].astype(np.float32)

    def forward(self, leaves: list[jax.Array], x: np.ndarray) -> np.ndarray:
        """Hidden states through a layer."""
        return self._run(self._forward_step, leaves, x)[0]

    def moments(self, leaves: list[jax.Array], x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Hidden states through a layer, and of each group's inputs the mean of x·xᵀ and of |x|, float64."""
        y, sums = self._run(self._moments_step, leaves, x)
        means = [total / (x.shape[0] * x.shape[1]) for total in sums]
        return y, means[: len(means) // 2], means[len(means) // 2 :]

    def cross_moments(
        self, dense: list[jax.Array], x: np.ndarray, compressed: list[jax.Array], other: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """With x the inputs of one group of the dense layer, x' those of the compressed: the means of x·x'ᵀ, x'·x'ᵀ."""
        _, sums = self._run(partial(self._cross_step, group=group), (dense, compressed), x, other)
        crossed, squared = (total / (x.shape[0] * x.shape[1]) for total in sums)
        return crossed, squared

    def loss_gradient(self, x: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, float]:
        """The gradient of each window's summed loss at the last layer's outputs, and the mean loss, nats per token."""
        config, weights = self._config, CheckpointWeights(self._checkpoint, np.float32)
        norm = RMSNorm(weights, "model.norm", config.hidden_size, config.rms_norm_eps)
        table = "model.embed_tokens" if config.tied else "lm_head"
        head = Embedding(weights, XLA(self._tap.platform), table, config.vocab_size, config.hidden_size)
        graph, state = nnx.split((norm, head))
        gradient, (loss,) = self._run(jax.jit(partial(_head_gradient, graph)), state, x, windows)
        return gradient, float(loss) / (windows.size - len(windows))

    def backward(
        self, leaves: list[jax.Array], x: np.ndarray, dy: np.ndarray, fisher: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """The gradient at a layer's inputs, from that at its outputs and its inputs x.

        And of every projection, in their order, the second moment of the gradients g at its outputs over tokens (the
        diagonal where it is wider than FULL_GRADIENTS); and with `fisher`, of every row of its matrix the mean square
        of its gradient over windows. The edges of a window, an eighth on either side, and the outliers of g's norm
        are left out of the moments, as K-FAC's few heavy tokens would outvote the others.
        """
        dx, sums = self._run(partial(self._backward_step, fisher=fisher), leaves, x, dy)
        middle = len(range(*_middle(x.shape[1]).indices(x.shape[1])))
        count = len(sums) // 2 if fisher else len(sums)
        return dx, [total / (len(x) * middle) for total in sums[:count]], [total / len(x) for total in sums[count:]]

    def _run(self, step: Any, weights: Any, *arrays: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Run a step batch by batch: what it gives per row, and its sums, float32 in a batch and float64 over them."""
        rows, totals = [], []
        # By default a GPU multiplies float32 in 10 bits, which would lose the small eigenvalues that decide a rank.
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(arrays[0]), self._rows):
                row, sums = jax.device_get(step(weights, *(array[start : start + self._rows] for array in arrays)))
                rows.append(row)
                totals = totals or [np.zeros(np.shape(part)) for part in sums]
                for total, part in zip(totals, sums, strict=True):
                    total += part
        return np.concatenate(rows), totals

    # What is compiled.

    def _layer(self, leaves: list[jax.Array], x: jax.Array, shifts: Sequence[jax.Array] = ()) -> tuple[jax.Array, Any]:
        """The layer's outputs, and the inputs of its groups."""
        layer = nnx.merge(self._graph, self._tree.unflatten(leaves))
        self._tap.inputs.clear()
        self._tap.shifts[:] = shifts
        cache = jnp.zeros((len(x) * self._config.num_kv_heads, x.shape[1], self._config.head_dim))
        rows = self._step._replace(positions=jnp.broadcast_to(self._step.positions, x.shape[:2]))
        y, _, _ = layer(x, cache, cache, rows)
        return y, list(self._tap.inputs)

    def _forward(self, leaves: list[jax.Array], x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return self._layer(leaves, x)[0], []

    def _moments(self, leaves: list[jax.Array], x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        y, inputs = self._layer(leaves, x)
        flat = [group.reshape(-1, group.shape[-1]) for group in inputs]
        return y, [group.T @ group for group in flat] + [jnp.abs(group).sum(axis=0) for group in flat]

    def _cross(self, both: tuple, x: jax.Array, other: jax.Array, group: int) -> tuple[jax.Array, list[jax.Array]]:
        a, b = (self._layer(leaves, states)[1][group] for leaves, states in zip(both, (x, other), strict=True))
        a, b = (inputs.reshape(-1, inputs.shape[-1]) for inputs in (a, b))
        return jnp.zeros((len(x),)), [a.T @ b, b.T @ b]

    def _backward(
        self, leaves: list[jax.Array], x: jax.Array, dy: jax.Array, fisher: bool
    ) -> tuple[jax.Array, list[jax.Array]]:
        zeros = [jnp.zeros((*x.shape[:2], width)) for outputs in self._outputs for width in outputs]
        _, pull, inputs = jax.vjp(lambda x, shifts: self._layer(leaves, x, shifts), x, zeros, has_aux=True)
        dx, gradients = pull(dy)
        sources = [group for group, outputs in zip(inputs, self._outputs, strict=True) for _ in outputs]
        rows = [_row_squares(g, x) for g, x in zip(gradients, sources, strict=True)] if fisher else []
        return dx, [_second_moment(g) for g in gradients] + rows


def _middle(window: int) -> slice:
    return slice(window // 8, window - window // 8)


def _second_moment(gradients: jax.Array) -> jax.Array:
    """The sum of g·gᵀ over the middle tokens of (rows, window, width), norms clipped to ten times their median."""
    flat = gradients[:, _middle(gradients.shape[1])].reshape(-1, gradients.shape[-1])
    norms = jnp.linalg.norm(flat, axis=-1, keepdims=True)
    flat = flat * jnp.minimum(1, 10 * jnp.median(norms) / jnp.maximum(norms, 1e-30))
    return flat.T @ flat if flat.shape[-1] <= FULL_GRADIENTS else jnp.square(flat).sum(axis=0)


def _row_squares(gradients: jax.Array, x: jax.Array) -> jax.Array:
    """The sum over windows of each row's squared gradient, where that of the matrix is g·xᵀ summed over tokens."""
    squares = jax.lax.map(lambda pair: jnp.square(pair[0].T @ pair[1]).sum(axis=1), (gradients, x))
    return squares.sum(axis=0)


def _head_gradient(graph: Any, state: Any, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    norm, head = nnx.merge(graph, state)

    def loss(x: jax.Array, tokens: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(head.attend(norm(x[:-1])))
        return -jnp.take_along_axis(scores, tokens[1:, None], axis=1).sum()

    # One window at a time: logits are the largest arrays of all.
    losses, gradients = jax.lax.map(lambda pair: jax.value_and_grad(loss)(*pair), (x, tokens))
    return gradients, [losses.sum()]
