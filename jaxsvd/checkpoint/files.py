"""The safetensors files of a folder: what is in them, and one tensor at a time."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxsvd.config import read_json
from jaxsvd.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The exponent bits: all ones in a NaN or an infinity.
_EXPONENT = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}


class Entry(NamedTuple):
    """Where a tensor is and what its header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """All tensors of a folder by name, from one file or from the shards that the index lists.

    Raises ModelError where the folder has no safetensors, a file is damaged, or index and shards disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.problems: list[str] = []  # for the one report of all that is wrong
        self._weight_map: dict[str, str] = {}
        self._files = {path: _open(path) for path in self._paths()}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in self.entries:
                    self.problems.append(f"duplicate: {name} is in {self.entries[name].file.name} and {path.name}")
                    continue
                piece = file.get_slice(name)
                self.entries[name] = Entry(path, piece.get_dtype(), tuple(piece.get_shape()))
        for name, shard in self._weight_map.items():
            found = self.entries[name].file.name if name in self.entries else "no shard"
            if found != shard:
                self.problems.append(f"misplaced: {name} is in {found}, the index says {shard}")

    @property
    def parameters(self) -> int:
        """The elements of all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors of the dtypes that can be read."""
        return sum(math.prod(entry.shape) * self.itemsize(name) for name, entry in self.entries.items())

    def itemsize(self, name: str) -> int:
        """The bytes of an element; 0 of a dtype that can't be read."""
        dtype = _DTYPES.get(self.entries[name].dtype)
        return dtype.itemsize if dtype else 0

    def _paths(self) -> list[Path]:
        if not (self.folder / INDEX).exists():
            if (self.folder / SINGLE).exists():
                return [self.folder / SINGLE]
            self._refuse()
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{self.folder / INDEX} has no weight_map of tensor names to file names: copy it again")
        shards = sorted(set(weight_map.values()))
        if outside := [name for name in shards if Path(name).name != name]:
            raise ModelError(f"{self.folder / INDEX} names files outside its folder ({outside[0]}): refused")
        if missing := [name for name in shards if not (self.folder / name).exists()]:
            raise ModelError(f"{self.folder} lacks {_some(missing)}, which its index lists: download the folder again")
        self._weight_map = weight_map
        self._weight_map = weight_map
        return [self.folder / name for name in shards]

    def _refuse(self) -> None:
        if pickles := [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)]:
            raise ModelError(
                f"{self.folder} holds pickled weights ({_some(pickles)}) and no safetensors: jaxsvd runs no pickle; "
                "get the safetensors version of the model, or convert it"
            )
        raise ModelError(f"{self.folder} has no {SINGLE} and no {INDEX}: it is not a model folder")

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype of the file. Raises ModelError where its numbers are not finite."""
        entry = self.entries[name]
        if entry.dtype not in _DTYPES:
            raise ModelError(f"{name} in {entry.file} is {entry.dtype}: jaxsvd reads F32, F16 and BF16")
        try:
            array = self._files[entry.file].get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{name} in {entry.file} can't be read ({error}): download the file again") from None
        array = array.view(_DTYPES[entry.dtype]) if array.dtype != _DTYPES[entry.dtype] else array
        if not _finite(array, entry.dtype):
            raise ModelError(f"{name} in {entry.file} holds values that are not numbers: the file is damaged")
        return array


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}): download it again") from None


def _finite(array: np.ndarray, dtype: str) -> bool:
    word, exponent = _EXPONENT[dtype]
    bits = array.reshape(-1).view(word)
    chunk = 1 << 20  # stays in the cache, and needs no copy of the whole tensor
    mask = word(exponent)
    return not any(((bits[i : i + chunk] & mask) == mask).any() for i in range(0, bits.size, chunk))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
