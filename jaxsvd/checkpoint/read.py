"""From a folder to a model: strict, tensor by tensor, never two copies of a weight."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxsvd.checkpoint.families import Findings, Stored, advice, find, listing, sharing
from jaxsvd.checkpoint.files import TensorFiles, Tensors
from jaxsvd.config import ModelConfig, read_json
from jaxsvd.errors import ModelError
from jaxsvd.kernels import Backend, Dense, Factored, Matrix
from jaxsvd.models import build
from jaxsvd.weights import AbstractWeights, break_even

if TYPE_CHECKING:
    from jaxsvd.models.llama import Llama

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Kept(NamedTuple):
    """The fractions kept of a dense model: of the parameters of all projections, of all parameters, of all bytes."""

    linears: float
    parameters: float
    bytes: float


class Checkpoint:
    """A model folder whose files are known to hold exactly the model that config.json describes.

    Opening reads headers only, and tensors that are stored twice. The converter gives `files` and `raw`, the config.

    Raises ModelError that lists all missing, unexpected, mis-shaped and duplicate tensors.
    """

    def __init__(self, folder: str | Path, files: Tensors | None = None, raw: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.raw = unwrapped(raw or read_json(self.folder / "config.json"))
        self.files = files or TensorFiles(self.folder)
        entries = self.files.entries
        config = ModelConfig.from_hf(self.raw)
        tied = config.tied if config.tied is not None else _HEAD not in entries
        self.config = dataclasses.replace(config, tied=tied)
        if config.num_layers > len(entries):  # a guard: what follows names every tensor of every layer
            raise ModelError(
                f"{self.folder} has {len(entries)} tensors: too few for the {config.num_layers} layers "
                "(num_hidden_layers) of its config.json"
            )
        self.matrices: dict[str, Stored] = {}
        problems, known = [*self.files.problems], set()
        expected = _expectations(self.config)
        for name, shape in expected.arrays.items():
            known.add(name)
            if name not in entries:
                problems.append(f"missing: {name} {shape}")
            elif entries[name].shape != shape:
                problems.append(f"mis-shaped: {name} is {entries[name].shape}, expected {shape}")
        self.arrays = tuple(expected.arrays)
        self.shapes = {path: (inputs, outputs) for path, (inputs, outputs, _) in expected.matrices.items()}
        partners, wrong = sharing(self.raw, expected.matrices)
        problems += wrong
        for path, demand in expected.matrices.items():
            found = find(entries, path, *demand, self.raw, partners.get(path, ()))
            known |= found.names
            problems += found.problems + self._ungrouped(path, demand[1], found)
            if found.stored:
                self.matrices[path] = found.stored
        problems += self._head_problems() + self._copy_problems()
        problems += [
            f"unexpected: {name} {entries[name].shape}{advice(name)}"
            for name in entries
            if not self._is_known(name, known)
        ]
        problems += self._descriptor_problems()
        if problems:
            raise listing(self.folder, problems)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every factored matrix by its path."""
        return {path: stored.rank for path, stored in self.matrices.items() if stored.rank is not None}

    @property
    def shared(self) -> dict[str, str]:
        """Path → the path that holds its down factor, for every matrix whose factor another one holds."""
        owners: dict[str | None, str] = {}
        for path, stored in self.matrices.items():
            owners.setdefault(stored.down, path)
        return {
            path: owners[stored.down]
            for path, stored in self.matrices.items()
            if stored.down and owners[stored.down] != path
        }

    @property
    def dense_shapes(self) -> dict[str, tuple[int, int]]:
        """The (inputs, outputs) of every projection before MLPs were narrowed; `shapes` has those that they have."""
        expected = _expectations(dataclasses.replace(self.config, mlp_widths=()))
        return {path: (inputs, outputs) for path, (inputs, outputs, _) in expected.matrices.items()}

    @property
    def keep(self) -> Kept:
        """What is kept of the dense model of this config, a shared factor counted once.

        A dense matrix is taken to be of the dtype that this one is stored in.
        """
        dense_shapes = self.dense_shapes
        rest, kept, dense, shared = self._size(*self.arrays), np.zeros(2, int), np.zeros(2, int), self.shared
        for path, stored in self.matrices.items():
            inputs, outputs = dense_shapes[path]
            kept += self._size(stored.weight, stored.up, None if path in shared else stored.down)
            rest += self._size(stored.bias)
            dense += inputs * outputs * np.array([1, self.files.itemsize(stored.weight or stored.up or "")])
        parameters, nbytes = (rest + kept) / (rest + dense)
        return Kept(float(kept[0] / dense[0]), float(parameters), float(nbytes))

    def _size(self, *names: str | None) -> np.ndarray:
        """The elements and the bytes of tensors."""
        counts = [(math.prod(self.files.entries[name].shape), self.files.itemsize(name)) for name in names if name]
        return np.array([sum(count for count, _ in counts), sum(count * size for count, size in counts)])

    def _ungrouped(self, path: str, outputs: int, found: Findings) -> list[str]:
        """Compressors that know no grouped queries give keys and values as many heads as the queries have."""
        every = self.config.num_heads * self.config.head_dim
        if not found.problems or outputs == every or not path.endswith((".k_proj", ".v_proj")):
            return []
        if not any(problem.startswith("mis-shaped") and f"is ({every}, " in problem for problem in found.problems):
            return []
        return [
            f"{path} has the outputs of {self.config.num_heads} heads, config.json has {self.config.num_kv_heads} "
            "(num_key_value_heads): it was compressed as if each head had its own keys and values, and can't be used"
        ]

    def _copy_problems(self) -> list[str]:
        """A shared factor may be stored under several names; it must then be the same each time."""
        sets = {(stored.down, stored.copies): path for path, stored in self.matrices.items() if stored.copies}
        problems = []
        for (down, copies), path in sets.items():
            assert down
            factor = self.files.read(down)
            problems += [
                f"unexpected: {copy} differs from {down}, but config.json says that {path} shares that factor"
                for copy in copies
                if not np.array_equal(factor, self.files.read(copy))
            ]
        return problems

    def _is_known(self, name: str, known: set[str]) -> bool:
        # Old Llama files carry the rotary frequencies, which follow from the config.
        return name in known or name.endswith(".rotary_emb.inv_freq") or (name == _HEAD and self.config.tied is True)

    def _head_problems(self) -> list[str]:
        """Some tied checkpoints store the head as well; it must then be the embedding."""
        entries = self.files.entries
        if not self.config.tied or _HEAD not in entries or _EMBEDDING not in entries:
            return []
        if np.array_equal(self.files.read(_HEAD), self.files.read(_EMBEDDING)):
            return []
        return [f"unexpected: {_HEAD} differs from {_EMBEDDING}, but config.json ties them (tie_word_embeddings)"]

    def _descriptor_problems(self) -> list[str]:
        """config.json may say which matrices are factored; the tensors decide, and it must agree."""
        descriptor = self.raw.get("low_rank")
        if descriptor is None:
            return []
        stated = descriptor.get("ranks") if isinstance(descriptor, dict) else None
        if not isinstance(stated, dict):
            return ["config.json: low_rank has no `ranks` of matrix paths to ranks"]
        found = self.ranks
        return [
            f"config.json: low_rank says that {path} has rank {stated.get(path, 'none: dense')}, "
            f"the tensors have {found.get(path, 'none: dense')}"
            for path in sorted(stated.keys() | found.keys())
            if stated.get(path) != found.get(path)
        ]

    def load(self, backend: Backend, dtype: Any, progress: Callable[[int], object] | None = None) -> "Llama":
        """Build the model on the default device in `dtype`; `progress` is told of the bytes of each tensor read."""
        return build(self.config, CheckpointWeights(self, dtype, progress), backend)

    def describe(self, backend: Backend, dtype: Any) -> "Llama":
        """The model that `load` builds, of `jax.ShapeDtypeStruct`s: no weights are read."""
        ranks = self.ranks

        def rank(path: str, inputs: int, outputs: int) -> int | None:
            found = ranks.get(path)
            return None if found is None or found >= break_even(inputs, outputs) else found

        return build(self.config, AbstractWeights(dtype, rank), backend)


def unwrapped(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of the model itself: KFAC-SVD puts it, whole, into another one."""
    inner = raw.get("base_config")
    if raw.get("model_type") != "low_rank_compressed" or not isinstance(inner, dict):
        return raw
    return {"model_type": raw.get("base_model_type")} | inner


class CheckpointWeights:
    """The `jaxsvd.weights.Weights` of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, dtype: Any, progress: Callable[[int], object] | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._checkpoint = checkpoint
        self._progress = progress or (lambda count: None)
        self._told: set[str] = set()
        self._placed: dict[Any, jax.Array] | None = {} if checkpoint.shared else None

    def place(self, array: np.ndarray) -> jax.Array:
        """See `Weights.place`. Where layers share factors, arrays of equal content become one."""
        if self._placed is None:
            return jax.device_put(array)
        content = np.ascontiguousarray(array)
        key = (content.shape, content.dtype.name, hashlib.blake2b(content.view(np.uint8).data).digest())
        if key not in self._placed:
            self._placed[key] = jax.device_put(array)
        return self._placed[key]

    def _read(self, name: str) -> np.ndarray:
        array = self._checkpoint.files.read(name)
        self._progress(0 if name in self._told else array.nbytes)  # a shared factor is read for each of its layers
        self._told.add(name)
        return array

    def _cast(self, array: np.ndarray, name: str) -> np.ndarray:
        if array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(self.dtype)
        if ml_dtypes.finfo(self.dtype).max < ml_dtypes.finfo(array.dtype).max and not np.isfinite(cast).all():
            raise ModelError(
                f"{name} of {self._checkpoint.folder} has values too large for {self.dtype}: "
                "load it as float32 or bfloat16"
            )
        return cast

    def array(self, name: str, *shape: int) -> np.ndarray:
        """See `Weights.array`."""
        return self._cast(self._read(name), name)

    def bias(self, path: str) -> np.ndarray | None:
        """The bias (outputs,) of a projection that has one."""
        stored = self._checkpoint.matrices[path].bias
        return self.array(stored) if stored else None

    def matrix(self, path: str, inputs: int, outputs: int, bias: bool) -> tuple[Matrix, np.ndarray | None]:
        """See `Weights.matrix`. From its break-even rank on, a factored matrix is multiplied out: dense is cheaper."""
        stored, offset = self._checkpoint.matrices[path], self.bias(path)
        if stored.weight:
            return Dense(self._cast(self._read(stored.weight), stored.weight).T), offset
        assert stored.down and stored.up and stored.rank
        down, up = self._read(stored.down), self._read(stored.up)
        if stored.rank >= break_even(inputs, outputs):
            with np.errstate(over="ignore", invalid="ignore"):
                product = up.astype(np.float32) @ down.astype(np.float32)
            if not np.isfinite(product).all():
                raise ModelError(f"the factors of {path} in {self._checkpoint.folder} overflow when multiplied")
            return Dense(self._cast(product, path).T), offset
        return Factored(self._cast(down, stored.down).T, self._cast(up, stored.up).T), offset


class _Expectations(AbstractWeights):
    """Writes down what a model's constructor asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.arrays: dict[str, tuple[int, ...]] = {}
        self.matrices: dict[str, tuple[int, int, bool]] = {}

    def array(self, name: str, *shape: int) -> Any:
        self.arrays[name] = shape
        return super().array(name, *shape)

    def matrix(self, path: str, inputs: int, outputs: int, bias: bool) -> tuple[Matrix, Any | None]:
        self.matrices[path] = (inputs, outputs, bias)
        return super().matrix(path, inputs, outputs, bias)


def _expectations(config: ModelConfig) -> _Expectations:
    from jaxsvd.kernels.xla import XLA

    expected = _Expectations()
    build(config, expected, XLA("cpu"))
    return expected
