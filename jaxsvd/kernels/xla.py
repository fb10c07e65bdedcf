"""The XLA backend: plain dots that the compiler tiles itself. It runs everywhere and is the oracle of the others.

One first dot serves the group: the U of every low-rank member and the whole of every dense one, side by side. Each
low-rank member then has a dot with its V. What is chosen here is the storage order, because a decode step is a
matrix-vector product per matrix and its speed is that of the walk through memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsvd.kernels import Dense, Factored, Fused, Matrix, MatrixShape

MANY = 64  # rows of x, of prompts: here arithmetic is the limit, not the way through memory
RANK_MULTIPLE = 16  # ranks are padded to it with zeros, which is exact: odd widths cost more than the zeros do


@dataclass(frozen=True)
class Stored:
    """One array: a matrix (inputs, outputs), stored as (outputs, inputs) where `transposed`.

    `rounds` is whether products with MANY rows round their results themselves. XLA's on a GPU otherwise write them in
    float32, though they are rounded at once, by a kernel of its own (docs/performance.md).

    `parts` is how many pieces a matrix-vector product is cut into, so that several cores share it. XLA's CPU runtime
    gives a single core to any product of less than 2 MiB, as most of a low-rank model's are; the members of a batched
    product it does run side by side. Cutting along the slower axis keeps each piece contiguous.
    """

    inputs: int
    outputs: int
    transposed: bool
    parts: int = 1
    rounds: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape in memory."""
        return (self.outputs, self.inputs) if self.transposed else (self.inputs, self.outputs)

    def store(self, blocks: Sequence[np.ndarray], widths: Sequence[int]) -> np.ndarray:
        """Put (inputs, n) blocks side by side, each padded to its width and to the inputs, in this storage order."""
        if len(blocks) == 1 and blocks[0].shape == (self.inputs, self.outputs):
            return np.ascontiguousarray(blocks[0].T if self.transposed else blocks[0])  # often no copy
        array = np.zeros(self.shape, blocks[0].dtype)
        view = array.T if self.transposed else array
        for block, start in zip(blocks, np.cumsum([0, *widths]), strict=False):
            view[: block.shape[0], start : start + block.shape[1]] = block
        return array

    def dot(self, x: jax.Array, array: jax.Array, dtype: Any = None) -> jax.Array:
        """(…, inputs) to (…, outputs) in `dtype` (default: x's), accumulated in float32."""
        parts, rows = self.parts, x.size // self.inputs
        rounds = self.rounds and rows >= MANY
        dot = partial(lax.dot_general, preferred_element_type=(dtype or x.dtype) if rounds else jnp.float32)
        if rounds:
            # Else XLA takes what is before, a norm's weights, into a kernel of its own that it then does not use.
            x = lax.optimization_barrier(x)
        if rows > 1 or parts == 1:
            y = dot(x, array, (((x.ndim - 1,), (1 if self.transposed else 0,)), ((), ())))
        elif self.transposed:
            copies = jnp.broadcast_to(x.reshape(self.inputs), (parts, self.inputs))
            y = dot(copies, array.reshape(parts, -1, self.inputs), (((1,), (2,)), ((0,), (0,))))
        else:
            pieces = x.reshape(parts, 1, -1)
            y = dot(pieces, array.reshape(parts, -1, self.outputs), (((2,), (1,)), ((0,), (0,)))).sum(0)
        return y.reshape(*x.shape[:-1], self.outputs).astype(dtype or x.dtype)


@dataclass(frozen=True)
class GroupPlan:
    """`first` serves every member; `second[i]` is the V of member i, None where it is dense."""

    first: Stored
    widths: tuple[int, ...]
    second: tuple[Stored | None, ...]

    @property
    def array_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The first array, then the V of each low-rank member."""
        return (self.first.shape, *(stored.shape for stored in self.second if stored))

    @property
    def outputs(self) -> tuple[int, ...]:
        """The width of each member's result."""
        return tuple(v.outputs if v else width for v, width in zip(self.second, self.widths, strict=True))


@dataclass(frozen=True)
class XLA:
    """See the module's docstring. `cores` is how many of them share a matrix-vector product on a CPU."""

    platform: str
    cores: int = 1
    name: str = "xla"

    @property
    def fused(self) -> Fused | None:
        """Nothing: XLA runs a layer after the other."""
        return None

    def plan(self, shapes: tuple[MatrixShape, ...]) -> GroupPlan:
        """Choose the storage order of the group's arrays."""
        factored = any(shape.rank is not None for shape in shapes)
        ranks = [None if shape.rank is None else -(-shape.rank // RANK_MULTIPLE) * RANK_MULTIPLE for shape in shapes]
        widths = tuple(rank or shape.outputs for rank, shape in zip(ranks, shapes, strict=True))
        first = self._stored(shapes[0].inputs, sum(widths), factored)
        second = tuple(
            self._stored(rank, shape.outputs, factored) if rank else None
            for rank, shape in zip(ranks, shapes, strict=True)
        )
        return GroupPlan(first, widths, second)

    def _stored(self, inputs: int, outputs: int, factored: bool) -> Stored:
        if self.platform == "cpu":
            # A core walks long rows fastest: the longer axis is the contiguous one (benchmarks/decode_cpu.py).
            return Stored(inputs, outputs, inputs > outputs, self._parts(min(inputs, outputs)))
        # On a GPU, XLA's matrix-vector kernels want factors (out, in) and dense matrices (in, out): on an H200
        # 3.39 ms a token against 7.24 for Qwen3-4B at keep 0.8, and 3.01 against 3.61 for the dense model.
        return Stored(inputs, outputs, transposed=factored, rounds=self.platform == "gpu")

    def _parts(self, length: int) -> int:
        return max(parts for parts in range(1, self.cores + 1) if length % parts == 0)

    def pack(self, plan: GroupPlan, group: Sequence[Matrix]) -> list[np.ndarray]:
        """The first factors (or dense matrices) side by side, then each V."""
        blocks = [member.w if isinstance(member, Dense) else member.u for member in group]
        second = [
            stored.store([member.v], [stored.outputs])
            for stored, member in zip(plan.second, group, strict=True)
            if stored and isinstance(member, Factored)
        ]
        return [plan.first.store(blocks, plan.widths), *second]

    def project(self, plan: GroupPlan, x: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """One dot for the group, then one per low-rank member."""
        first, *rest = arrays
        strips = jnp.split(plan.first.dot(x, first), np.cumsum(plan.widths)[:-1].tolist(), axis=-1)
        second = iter(rest)
        return [
            stored.dot(strip, next(second)) if stored else strip
            for strip, stored in zip(strips, plan.second, strict=True)
        ]

    def mlp(
        self,
        gate_up: GroupPlan,
        down: GroupPlan,
        x: jax.Array,
        first: Sequence[jax.Array],
        second: Sequence[jax.Array],
    ) -> jax.Array:
        """The two groups, one after the other."""
        gate, up = self.project(gate_up, x, first)
        (y,) = self.project(down, jax.nn.silu(gate) * up, second)
        return y

    def attend(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """One dot with the table as it lies."""
        vocab, width = table.shape
        parts = self._parts(vocab) if self.platform == "cpu" else 1
        return Stored(width, vocab, transposed=True, parts=parts).dot(x, table, jnp.float32)

    def check(self, plan: GroupPlan, arrays: Sequence[jax.Array]) -> None:
        """Nothing: it is the oracle."""

    def check_mlp(
        self, gate_up: GroupPlan, down: GroupPlan, first: Sequence[jax.Array], second: Sequence[jax.Array]
    ) -> None:
        """Nothing."""
