"""The tensors of `torch.save` files, read without torch. For the converter alone."""

import mmap
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsvd.checkpoint.files import DTYPES, Entry, Tensors, collect, finite, readable
from jaxsvd.checkpoint.pickles import Bag, Refused, Tensor, describe, unpickle
from jaxsvd.errors import ModelError

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
# A model of 1000 layers has some 10^4 modules and tensors; a graph that is made to be walked for ever has more.
_MOST_MEMBERS = 200_000
_DEEPEST = 64
_LONGEST_NAME = 256
_LARGEST_CONFIG = 10_000  # fields, and items in one of them
_MOST_DIMENSIONS = 8
_LARGEST_PICKLE = 1 << 26  # bytes of the pickle itself; a 70B model's has some 10^6


class _Archive:
    """The zip file of `torch.save`: its pickle, and where each storage lies in the mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise ModelError(
                f"{path} is not a file of torch.save since 1.6 ({error}): download it again, or, if it is an older one "
                "from a source that you trust, load it with torch, save it again and convert that"
            ) from None
        try:
            self._spans = self._find(members)
        except (Refused, struct.error) as refused:
            raise self.refused(refused) from None

    def refused(self, why: object) -> ModelError:
        """The error for this file."""
        return ModelError(f"{self.path} is refused: {why}; jaxsvd reads pickled weights only, and runs nothing of them")

    def _find(self, members: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
        spans: dict[str, tuple[int, int]] = {}
        for member in members:
            name = member.filename.split("/", 1)[-1]  # without the folder of the archive
            if name in spans:
                raise Refused(f"it holds {name} twice")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise Refused(f"its {name} is compressed or encrypted, which torch.save never does")
            if member.header_offset < 0:
                raise Refused(f"its {name} lies before its beginning")
            header = self._map[member.header_offset : member.header_offset + 30]
            if header[:4] != b"PK\x03\x04":
                raise Refused(f"its {name} is not where its directory says")
            start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            if start + member.file_size > len(self._map):
                raise Refused(f"its {name} reaches beyond the end of the file")
            spans[name] = (start, member.file_size)
        if "data.pkl" not in spans:
            raise Refused("it has no data.pkl")
        if "constants.pkl" in spans:
            raise Refused("it is a TorchScript program")
        if "byteorder" in spans and self._bytes(spans["byteorder"]) != b"little":
            raise Refused("its numbers are big-endian")
        return spans

    def _bytes(self, span: tuple[int, int]) -> bytes:
        return self._map[span[0] : span[0] + span[1]]

    def unpickle(self) -> Any:
        """What its pickle describes. Raises `Refused`."""
        span = self._spans["data.pkl"]
        if span[1] > _LARGEST_PICKLE:
            raise Refused("its data.pkl has more than 64 MiB, which weights never need")
        return unpickle(self._bytes(span))

    def check(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The tensor's shape. Raises ModelError where it is not wholly inside of its storage."""
        storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
        sane = all(isinstance(sizes, tuple | list) and len(sizes) <= _MOST_DIMENSIONS for sizes in (shape, stride))
        numbers = [tensor.offset, storage.numel, *shape, *stride] if sane and len(shape) == len(stride) else [None]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise self.refused(f"{name} has a shape or a stride that makes no sense")
        span = self._spans.get(f"data/{storage.key}")
        if span is None:
            raise self.refused(f"the storage {storage.key!r} of {name} is not in it")
        if storage.numel * storage.itemsize > span[1]:
            raise self.refused(f"the storage of {name} has {span[1]} bytes, too few for {storage.numel} elements")
        elements, last = 1, tensor.offset
        for size, step in zip(shape, stride, strict=True):
            elements, last = elements * size, last + max(size - 1, 0) * step
        if elements > storage.numel or (elements and last >= storage.numel):
            raise self.refused(f"{name} of shape {tuple(shape)} reaches beyond its storage of {storage.numel} elements")
        return tuple(shape)

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor that `check` has passed; a view of the file where it lies there in order."""
        storage = tensor.storage
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, DTYPES[storage.dtype])
        dtype, (start, _) = DTYPES[storage.dtype], self._spans[f"data/{storage.key}"]
        whole = np.frombuffer(self._map, dtype, storage.numel, start)
        strides = [step * dtype.itemsize for step in tensor.stride]
        view = np.lib.stride_tricks.as_strided(whole[tensor.offset :], tensor.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(tensor.shape)  # a scalar would come out as a vector


class _Pickled(NamedTuple):
    """What a pickle holds: its tensors by name, and the attributes of the model's config where it has one."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None


def _weights(root: Any) -> _Pickled:
    """Find the weights: a module, a dictionary of tensors, or one of them under a usual name."""
    for _ in range(3):
        if isinstance(root, Bag):
            state = root.state if isinstance(root.state, dict) else {}
            return _Pickled(dict(_module_tensors(root)), _config(state.get("config")))
        if isinstance(root, dict):
            # Beside the weights there may be loose tensors, such as the loss.
            values = (root.get(key) for key in ("model", "state_dict", "model_state_dict", "module"))
            if inner := next((value for value in values if value and isinstance(value, dict | Bag)), None):
                root = inner
                continue
            if tensors := {name: value for name, value in _items(root) if isinstance(value, Tensor)}:
                _check_names("", tensors)
                return _Pickled(tensors, None)
        break
    found = ", ".join(name[:50] for name, _ in list(_items(root))[:5]) if isinstance(root, dict) else describe(root)
    raise Refused(f"it holds no weights under a known name, but {found or 'nothing'}")


def _module_tensors(root: Bag) -> Iterator[tuple[str, Tensor]]:
    """A pickled module's parameters and persistent buffers by the names that its `state_dict` would give them."""
    waiting, met = [("", root, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        state = module.state if isinstance(module.state, dict) else {}
        parameters, buffers, modules = (
            dict(_items(state.get(f"_{kind}"))) for kind in ("parameters", "buffers", "modules")
        )
        passing = state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, list | tuple) else ()
        met += len(parameters) + len(buffers) + len(modules) + len(passing)
        if met > _MOST_MEMBERS or depth > _DEEPEST:
            raise Refused("its modules hold each other without end")
        _check_names(prefix, [*parameters, *buffers, *modules])
        passing = {name for name in passing if isinstance(name, str)}
        for name, value in (parameters | {name: buffers[name] for name in buffers if name not in passing}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
        waiting += [(f"{prefix}{name}.", value, depth + 1) for name, value in modules.items() if isinstance(value, Bag)]


def _check_names(prefix: str, names: Iterable[str]) -> None:
    if any(len(prefix) + len(name) > _LONGEST_NAME for name in names):
        raise Refused(f"it has names of more than {_LONGEST_NAME} characters")


def _items(group: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(group, dict):
        yield from ((name, value) for name, value in group.items() if isinstance(name, str))


def _config(bag: Any) -> dict[str, Any] | None:
    """The attributes of a pickled config that JSON can hold; its class, not they, says the model_type."""
    if not isinstance(bag, Bag) or not isinstance(bag.state, dict) or len(bag.state) > _LARGEST_CONFIG:
        return None

    def flat(value: Any) -> bool:
        return value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63)

    def plain(value: Any) -> bool:
        values = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        return len(values) <= _LARGEST_CONFIG and all(flat(item) for item in values)

    fields = {name: value for name, value in _items(bag.state) if not name.startswith("_") and plain(value)}
    parts = bag.kind.module.split(".")  # transformers.models.llama.configuration_llama
    return ({"model_type": parts[2]} if parts[:2] == ["transformers", "models"] and len(parts) > 2 else {}) | fields


class PickledTensors(Tensors):
    """The tensors of `torch.save` files, as `jaxsvd.checkpoint.files.Tensors`, read one by one from the mapped files.

    `config` is what a pickled model says of itself. Raises ModelError for whatever is no plain pickle of weights.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.config: dict[str, Any] | None = None
        self._archives = {path: _Archive(path) for path in paths}
        self._tensors: dict[tuple[Path, str], Tensor] = {}
        self.entries, self.problems = collect(self._headers(), weight_map or {})

    def _headers(self) -> Iterator[Entry]:
        for path, archive in self._archives.items():
            try:
                weights = _weights(archive.unpickle())
            except (Refused, TypeError) as refused:
                raise archive.refused(refused) from None
            self.config = self.config or weights.config
            for name, tensor in weights.tensors.items():
                self._tensors[path, name] = tensor
                yield Entry(path, tensor.storage.dtype, archive.check(name, tensor), name)

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype of the file. Raises ModelError where its numbers are not finite."""
        entry = readable(self, name)
        return finite(self._archives[entry.file].read(self._tensors[entry.file, entry.name]), name, entry)
