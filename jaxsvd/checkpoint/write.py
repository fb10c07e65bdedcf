"""Writing a model folder: all of it or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxsvd.checkpoint.files import INDEX
from jaxsvd.errors import UsageError

SHARD_BYTES = 5 * 10**9
FORMAT_VERSION = 1  # of the low_rank entry in config.json
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")


def check_target(target: Path, force: bool = False, mark: str = "config.json", kind: str = "a model folder") -> None:
    """Raises UsageError where `target` exists and `force` is not given, or no folder of that kind can be there.

    `mark` is the file that tells such a folder from others, which are never replaced.
    """
    above = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{target} can't be a folder: {above} is a file; choose another target")
    if target.exists() and not force:
        raise UsageError(f"{target} exists: choose another target, or replace it with --force (force=True)")
    if target.exists() and any(target.iterdir()) and not (target / mark).exists():
        raise UsageError(f"{target} is not {kind}: it will not be replaced; choose another target")


@contextmanager
def atomic_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes when not.

    Raises UsageError as `check_target` does.
    """
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            old = partial.with_suffix(".old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partials(target: Path) -> None:
    """Remove what runs of `atomic_folder` left beside `target` when they were killed."""
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(partial)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and whatever else lies beside the weights, but what describes these weights only."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json") and path.name != "adapter_config.json":
                shutil.copyfile(path, target / path.name)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """One safetensors file. safetensors writes memory as it lies, so views are made contiguous first."""
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


class TensorWriter:
    """Collects tensors and writes them in shards of at most 5 GB, with an index where there are several."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Add one tensor, stored as (out, in) where it is a matrix."""
        if self._pending and self._pending_bytes + array.nbytes > SHARD_BYTES:
            self._flush()
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def _flush(self) -> None:
        save_tensors(self._pending, self._folder / f"shard-{len(self._shards)}")
        self._shards.append(list(self._pending))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, give the shards their names, and write the index."""
        self._flush()
        count = len(self._shards)
        names = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]
        for i, name in enumerate(names):
            os.rename(self._folder / f"shard-{i}", self._folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map})
