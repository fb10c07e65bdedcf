"""What is measured: a model of a folder, or one of random weights that has the shape of a named model."""

import dataclasses
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxsvd import api, kernels
from jaxsvd.compression.plan import Shape, uniform_plan
from jaxsvd.config import ModelConfig, read_json
from jaxsvd.engine import Engine, lengths_of
from jaxsvd.errors import UsageError
from jaxsvd.models import build
from jaxsvd.models.check import check
from jaxsvd.named import CONFIGS
from jaxsvd.weights import AbstractWeights, Ranks


class Contender(NamedTuple):
    """A model that takes part.

    `role` is "model", or "compare" for what it is compared with; `model` is as it was given. `keep` is what is left of
    its projections' parameters, the padding of the backend's layout counted: 1 of a dense model's.
    """

    role: str
    model: str
    backend: str
    engine: Engine
    keep: float
    load_seconds: float

    @property
    def name(self) -> str:
        """How it is told from the others, in few words."""
        return f"{Path(self.model).name} ({self.backend})"

    @property
    def weight_bytes(self) -> int:
        """Of all its arrays, as they lie on the device."""
        return sum(leaf.nbytes for leaf in self.engine.leaves)

    @property
    def matrix_parameters(self) -> int:
        """What its projections multiply each token with: no table of tokens, no norm."""
        return sum(array.size for array in self.engine.model.matrices)

    def dense_step_bytes(self, cached: int) -> int:
        """`Engine.step_bytes` of the dense model of this shape."""
        more = dense_parameters(self.engine.config) - self.matrix_parameters
        return self.engine.step_bytes(cached) + more * self.engine.dtype.itemsize


def backends_of(backend: str, dtype: Any = None) -> list[str]:
    """Who is measured where `backend` is asked for and weights of `dtype`: it, and XLA beside it if it is another one.

    Without XLA's own figures, a kernel's gain could not be told from that of low rank.
    """
    chosen = kernels.choose(backend, dtype=api.dtype_of(dtype)).name
    return [chosen] if chosen == "xla" else [chosen, "xla"]


def load(role: str, model: str | os.PathLike[str], backend: str, **options: Any) -> Contender:
    """The model of a folder (or a registry name, or a Hub id). Options are those of `api.load`; raises as it does."""
    loaded = api.load(model, backend=backend, **options)
    found = Contender(role, str(model), backend, loaded.engine, 1.0, loaded.load_seconds)
    return found._replace(keep=found.matrix_parameters / dense_parameters(loaded.config))


def random(
    role: str,
    model: str,
    keep: float | None,
    multiple: int,
    backend: str,
    dtype: Any = None,
    buckets: str | None = None,
    max_length: int | None = None,
) -> Contender:
    """A model of random weights.

    Args:
        role: see `Contender`.
        model: whose shape it has: one of `named.CONFIGS`, a Hub id that ends in one, or a folder with a config.json.
        keep: the part of the projections' parameters that it has, at ranks as the compressor's uniform plan gives
            them, those of attention too; None for a dense model.
        multiple: ranks are multiples of it.
        backend: who multiplies.
        dtype, buckets, max_length: as in `api.load`.

    Raises UsageError for a model whose shape is not known, and a keep that no rank gives.
    """
    start = time.perf_counter()
    config, chosen = config_of(model), api.dtype_of(dtype)
    kernel = kernels.choose(backend, dtype=chosen)
    lengths = lengths_of(config, chosen, buckets, max_length)
    weights = AbstractWeights(chosen, ranks_of(config, keep, multiple) if keep else None)
    graph, state = nnx.split(build(config, weights, kernel))
    leaves, tree = jax.tree.flatten(state)
    values = [_draw(i, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    built = nnx.merge(graph, tree.unflatten(values))
    for layer in built.layers:  # as loading does, which these values did not go through
        for part in (layer.self_attn.qkv, layer.self_attn.o, layer.mlp):
            part.check()
    check(built)
    engine = Engine(built, lengths, api.default_steps())
    jax.block_until_ready(engine.leaves)
    name = f"{model}, random" + (f", keep {keep:g}" if keep else "")
    found = Contender(role, name, backend, engine, 1.0, time.perf_counter() - start)
    return found._replace(keep=found.matrix_parameters / dense_parameters(config))


def config_of(model: str) -> ModelConfig:
    """The architecture of a named model, or of a folder's config.json. Raises UsageError where it is neither."""
    file = Path(model).expanduser() / "config.json"
    if file.exists():
        config = ModelConfig.from_hf(read_json(file))
        return dataclasses.replace(config, tied=bool(config.tied), mlp_widths=())
    name = model.lower().rpartition("/")[2]
    if name not in CONFIGS:
        raise UsageError(
            f"the shape of {model!r} is not known: give a folder with a config.json, or one of {', '.join(CONFIGS)}"
        )
    return CONFIGS[name]


def dense_parameters(config: ModelConfig) -> int:
    """Of all projections of the dense model, MLPs not narrowed."""
    return sum(map(math.prod, projections(config).values()))


def projections(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every projection of the dense model by its path, MLPs not narrowed."""
    found: dict[str, Shape] = {}

    def note(path: str, inputs: int, outputs: int) -> None:
        found[path] = Shape(inputs, outputs)

    build(dataclasses.replace(config, mlp_widths=()), AbstractWeights(ranks=note), kernels.choose("xla"))
    return found


def ranks_of(config: ModelConfig, keep: float, multiple: int) -> Ranks:
    """As the compressor's uniform plan has them. Raises UsageError for a keep that no rank gives."""
    if not 0 < keep < 1:
        raise UsageError(f"keep is {keep}: expected a number between 0 and 1")
    if multiple < 1:
        raise UsageError(f"the rank multiple is {multiple}: expected at least 1")
    plan = uniform_plan(projections(config), keep, multiple)
    if not plan.ranks:
        raise UsageError(
            f"at keep {keep:g} no rank that is a multiple of {multiple} is below break-even in this shape: "
            "lower --keep or --rank-multiple"
        )
    return lambda path, inputs, outputs: plan.ranks.get(path)


@partial(jax.jit, static_argnums=(1, 2))
def _draw(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random values, made on the device: uniform, of a scale that lets no activation grow.

    A matrix has variance 1/√(in·out), whichever way round a backend stores it, so that neither the two factors of a
    pair nor layers behind each other blow up or vanish; a vector (a norm, a bias) is ones. The numbers are hashes of
    their places (the finaliser of MurmurHash3, public domain): a real generator takes ten times as long on a CPU.
    """
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    bits = lax.iota(jnp.uint32, math.prod(shape)) + jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1
    return (uniform * (3**0.5 * math.prod(shape) ** -0.25)).astype(dtype).reshape(shape)
