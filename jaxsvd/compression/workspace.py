"""Work that can be killed at any moment and taken up again: results on disk, each file there whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open

from jaxsvd.checkpoint.write import save_tensors, write_json
from jaxsvd.config import read_json
from jaxsvd.errors import UsageError

Arrays = dict[str, np.ndarray]


class Workspace:
    """A folder of named results that belong to one set of settings.

    Args:
        folder: where; made where it is not there.
        settings: what the results depend on, as JSON values.
        resume: use what an earlier run has left; without it, the earlier results are removed.

    Raises UsageError where `resume` finds results of other settings, or a folder that is none of ours.
    """

    def __init__(self, folder: Path, settings: dict[str, object], resume: bool) -> None:
        self.folder = folder
        stamp = folder / "settings.json"
        if folder.exists() and any(folder.iterdir()) and not stamp.exists():
            raise UsageError(f"{folder} holds other files: it will not be used to work in; choose another folder")
        if stamp.exists() and not resume:
            shutil.rmtree(folder)
        elif stamp.exists() and (found := read_json(stamp)) != settings:
            other = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
            raise UsageError(
                f"{folder} was begun with another {', '.join(other)}: take the same, or start again without resuming"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not stamp.exists():
            write_json(folder / "settings.tmp", settings)
            os.replace(folder / "settings.tmp", stamp)

    def has(self, name: str) -> bool:
        """Whether a result is there."""
        return self._path(name).exists()

    def load(self, name: str, only: str = "") -> Arrays:
        """A result, as it was saved: all of its arrays, or those whose names end with `only`."""
        with safe_open(self._path(name), framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.endswith(only)}  # noqa: SIM118

    def save(self, name: str, arrays: Arrays) -> None:
        """Save a result; a kill leaves the old file, or none, never half of one."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(arrays, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def sequence(
        self,
        name: str,
        order: Iterable[int],
        first: Callable[[], Arrays],
        step: Callable[[int, Arrays], tuple[Arrays, Arrays]],
        progress: Callable[[int], object],
    ) -> Arrays:
        """Walk through `order`: `step(i, carry)` gives the next carry and the result that is saved as `name/i`.

        The carry is saved after each result, so that a resumed walk goes on behind the last whole step; a step that
        was cut short is done again and, as steps are deterministic, leaves the same bytes. Returns the last carry.
        """
        order = list(order)
        carry = self.load(f"{name}/carry") if self.has(f"{name}/carry") else None
        done = int(carry.pop("done")[0]) if carry else 0
        progress(done)
        carry = carry if carry is not None else first()
        for position in range(done, len(order)):
            carry, result = step(order[position], carry)
            self.save(f"{name}/{order[position]}", result)
            self.save(f"{name}/carry", carry | {"done": np.array([position + 1])})
            progress(1)
        return carry

    def remove(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
