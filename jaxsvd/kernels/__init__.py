"""The seam between the models and whatever multiplies their matrices.

A *group* is a list of matrices that read the same x; each is `Dense` or `Factored`. A backend answers three questions
about a group: how its arrays are laid out (`plan`, in Python, from shapes alone), how the matrices become those arrays
(`pack`, once, at load), and how x goes through them (`project`, inside `jax.jit`); and checks its kernels against XLA's
dots (`check`, at load). This package knows arrays only.
"""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd.errors import UsageError

logger = logging.getLogger("jaxsvd")


class Dense(NamedTuple):
    """A matrix as it is: `y = x·w`, w (in, out)."""

    w: np.ndarray


class Factored(NamedTuple):
    """A low-rank matrix: `y = (x·u)·v`, u (in, r), v (r, out)."""

    u: np.ndarray
    v: np.ndarray


Matrix = Dense | Factored


class MatrixShape(NamedTuple):
    """What a plan needs to know of a matrix; `rank` is None where it is dense."""

    inputs: int
    outputs: int
    rank: int | None = None


def shape_of(matrix: Matrix) -> MatrixShape:
    """The shape of a matrix, from its arrays (or from `jax.ShapeDtypeStruct`s)."""
    if isinstance(matrix, Dense):
        return MatrixShape(*matrix.w.shape)
    return MatrixShape(matrix.u.shape[0], matrix.v.shape[1], matrix.u.shape[1])


class Heads(NamedTuple):
    """The attention of a layer. `normed`: whether the heads of q and k have norms; `eps` is that of all its norms."""

    queries: int
    keys: int
    width: int
    eps: float
    normed: bool


class Backend(Protocol):
    """One way of multiplying groups. Frozen and hashable: models keep it as a static attribute."""

    @property
    def name(self) -> str:
        """What `backend=` calls it."""
        ...

    @property
    def fused(self) -> "Fused | None":
        """What it can do besides, if it has a kernel for a whole model."""
        ...

    def plan(self, shapes: tuple[MatrixShape, ...]) -> Any:
        """Choose the layout of a group from the shapes of its matrices, which share `inputs`.

        The plan is static under `jax.jit`, hence hashable; its `array_shapes` are those of what `pack` makes.
        """
        ...

    def pack(self, plan: Any, group: Sequence[Matrix]) -> list[np.ndarray]:
        """Lay host arrays out as `plan` says: once per model, in the dtype that they come in."""
        ...

    def project(self, plan: Any, x: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Multiply x (…, in) with every matrix of the group: [(…, out), …] in x's dtype, sums in float32."""
        ...

    def mlp(
        self, gate_up: Any, down: Any, x: jax.Array, first: Sequence[jax.Array], second: Sequence[jax.Array]
    ) -> jax.Array:
        """down(silu(gate(x))·up(x)) of x (…, in), where no projection has a bias.

        `gate_up` and `down` are the plans of the two groups, `first` and `second` their arrays.
        """
        ...

    def attend(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Float32 logits (…, vocab) of x (…, width) against a table of token vectors (vocab, width)."""
        ...

    def check(self, plan: Any, arrays: Sequence[jax.Array]) -> None:
        """Compare `project` with XLA on a group's real arrays, at load. Raises JaxsvdError where the two disagree."""
        ...

    def check_mlp(self, gate_up: Any, down: Any, first: Sequence[jax.Array], second: Sequence[jax.Array]) -> None:
        """The same of `mlp`."""
        ...


class Fused(Protocol):
    """What a backend has that runs all layers in one kernel: a step of a few rows.

    `plans` are, for each layer, those of q, k and v, of o, of gate and up, and of down.
    """

    @property
    def sizes(self) -> tuple[int, ...]:
        """Up to how many rows it goes about a step in one way, in order: the last is the most that it takes."""
        ...

    def obstacle(self, heads: Heads, plans: Sequence[Sequence[Any]], batch: int, capacity: int) -> str | None:
        """Why it can't take such layers, with so many rows and a cache for `capacity` tokens each; or None."""
        ...

    def decoder(self, heads: Heads, plans: Sequence[Sequence[Any]], batch: int) -> Callable[..., jax.Array]:
        """The kernel that takes one token of each row through such layers.

        It is called with x (batch, hidden), the positions (batch,) int32; cosines and sines, float32 (batch, width/2);
        the weights of the two norms (layers, hidden) and of those of heads (layers, width); and, for each layer, the
        arrays of its groups in their order, and references to keys and to values (batch·keys, capacity, width), which
        get the new tokens. It returns x (batch, hidden), float32.
        """
        ...


BACKENDS = ("auto", "xla", "gpu", "neuron", "neuron-emulated")


def choose(backend: str = "auto", platform: str | None = None, dtype: Any = jnp.bfloat16) -> Backend:
    """The backend of that name, for a platform (default: JAX's own). XLA is the oracle of every other one.

    "auto" is Neuron's kernels on platform neuron where they can be called; on a GPU the kernel for all layers where it
    runs and the model's `dtype` is its own; and XLA everywhere else. "neuron-emulated" runs Neuron's kernels in NumPy,
    slowly, on any platform but that. Raises UsageError for a name that there is no backend for, and where "gpu" or
    "neuron" is asked for and can't be had.
    """
    if backend not in BACKENDS:
        raise UsageError(f"there is no backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    platform = platform or jax.default_backend()
    if backend.startswith("neuron") or (backend == "auto" and platform == "neuron"):
        from jaxsvd.kernels.neuron import Neuron, packages

        if backend == "neuron-emulated":
            return Neuron("emulated", packages.emulated_target(platform))
        obstacle = packages.obstacle(platform)
        if obstacle is None:
            return Neuron("device")
        if backend == "neuron":
            raise UsageError(obstacle)
        logger.warning("XLA multiplies, not the kernels for Neuron: %s", obstacle)
    if backend == "gpu" or (backend == "auto" and platform == "gpu" and dtype == jnp.bfloat16):
        from jaxsvd.kernels.gpu import GPU, obstacle

        device = jax.local_devices()[0]
        found = obstacle(device)
        if found is None:
            return GPU(cores=device.core_count)
        if backend == "gpu":
            raise UsageError(found)
        logger.info("XLA decodes: %s", found)
    from jaxsvd.kernels.xla import XLA

    return XLA(platform, len(os.sched_getaffinity(0)))
