"""The safetensors files of a folder: what is in them, and one tensor at a time."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxsvd.config import read_json
from jaxsvd.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What wrappers of a model put before the names of its tensors: KFAC-SVD, DataParallel, torch.compile, PEFT.
PREFIXES = ("wrapped_model.", "module.", "_orig_mod.", "base_model.model.")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# The exponent bits: all ones in a NaN or an infinity.
_EXPONENT = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}


class Entry(NamedTuple):
    """Where a tensor is and what its header says; `name` is what the file calls it, prefixes and all."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str = ""


class Tensors(Protocol):
    """The tensors of a checkpoint by name, however they are stored."""

    folder: Path
    entries: dict[str, Entry]
    problems: list[str]  # for the one report of all that is wrong

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype of the file. Raises ModelError where its numbers are not finite."""
        ...

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
        dtype = DTYPES.get(self.entries[name].dtype)
        return dtype.itemsize if dtype else 0


def collect(found: Iterable[Entry], weight_map: Mapping[str, str]) -> tuple[dict[str, Entry], list[str]]:
    """Tensors by their names without prefixes, and what is wrong with them, also against a `weight_map`."""
    entries: dict[str, Entry] = {}
    problems = []
    for entry in found:
        name = _bare(entry.name)
        if name in entries:
            problems.append(f"duplicate: {name} is in {entries[name].file.name} and {entry.file.name}")
            continue
        entries[name] = entry
    for stored, shard in weight_map.items():
        place = entries[_bare(stored)].file.name if _bare(stored) in entries else "no shard"
        if place != shard:
            problems.append(f"misplaced: {stored} is in {place}, the index says {shard}")
    return entries, problems


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def sharded(folder: Path, index: str, single: str) -> tuple[list[Path], dict[str, str]]:
    """The shards that the index of a folder lists, with that list, or the single file; nothing where it has neither."""
    if not (folder / index).exists():
        return ([folder / single] if (folder / single).exists() else []), {}
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{folder / index} has no weight_map of tensor names to file names: copy it again")
    shards = sorted(set(weight_map.values()))
    if outside := [name for name in shards if Path(name).name != name]:
        raise ModelError(f"{folder / index} names files outside its folder ({outside[0]}): refused")
    if missing := [name for name in shards if not (folder / name).exists()]:
        raise ModelError(f"{folder} lacks {_some(missing)}, which its index lists: download the folder again")
    if not shards:
        raise ModelError(f"{folder / index} lists no tensors: copy it again")
    return [folder / name for name in shards], weight_map


class TensorFiles(Tensors):
    """All tensors of a folder by name, from the shards that the index lists or from its one file, whatever its name.

    `paths` are the files to read where they go by other names.
    Raises ModelError where the folder has no safetensors, a file is damaged, or index and shards disagree.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] = ()) -> None:
        self.folder = folder
        found, weight_map = (list(paths), {}) if paths else sharded(folder, INDEX, SINGLE)
        found = found or list(folder.glob("*.safetensors"))  # SVD-Flash's has a name of its own
        if len(found) != 1 and not (paths or weight_map):
            self._refuse(found)
        self._files = {path: _open(path) for path in found}
        self.entries, self.problems = collect(self._headers(), weight_map)

    def _headers(self) -> Iterator[Entry]:
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                piece = file.get_slice(name)
                yield Entry(path, piece.get_dtype(), tuple(piece.get_shape()), name)

    def _refuse(self, found: Sequence[Path]) -> None:
        if found:
            raise ModelError(
                f"{self.folder} has no {SINGLE} and no {INDEX}, but several others "
                f"({_some(path.name for path in found)}): leave the model's there only, or get the index as well"
            )
        if pickles := [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)]:
            raise ModelError(
                f"{self.folder} holds pickled weights ({_some(pickles)}) and no safetensors: jaxsvd runs no pickle; "
                f"get the safetensors version of the model, or convert it: jaxsvd convert {self.folder} NEW_FOLDER"
            )
        raise ModelError(f"{self.folder} has no {SINGLE} and no {INDEX}: it is not a model folder")

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype of the file. Raises ModelError where its numbers are not finite."""
        entry = readable(self, name)
        try:
            array = self._files[entry.file].get_tensor(entry.name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{name} in {entry.file} can't be read ({error}): download the file again") from None
        return finite(array.view(DTYPES[entry.dtype]) if array.dtype != DTYPES[entry.dtype] else array, name, entry)


def readable(tensors: Tensors, name: str) -> Entry:
    """The entry of a tensor. Raises ModelError where it is of a dtype that jaxsvd does not read."""
    entry = tensors.entries[name]
    if entry.dtype not in DTYPES:
        raise ModelError(f"{name} in {entry.file} is {entry.dtype}: jaxsvd reads F32, F16 and BF16")
    return entry


def finite(array: np.ndarray, name: str, entry: Entry) -> np.ndarray:
    """The array itself. Raises ModelError where it holds an infinity or a NaN."""
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
