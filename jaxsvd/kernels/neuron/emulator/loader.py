"""Loading kernel files against the emulated `nki`, whether a real one (or a placeholder) is installed or not."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxsvd.kernels.neuron.emulator import isa, language
from jaxsvd.kernels.neuron.emulator.errors import EmulationError, not_modelled
from jaxsvd.kernels.neuron.emulator.runner import jit

EMULATOR = __name__.rpartition(".")[0]
PACKAGE = EMULATOR.rpartition(".")[0]
FILE_PREFIX = "_emulated_"  # of the module names of files from elsewhere
FOLDER = Path(__file__).resolve().parent.parent

_siblings: dict[str, ModuleType] = {}  # modules of PACKAGE, loaded against the emulated nki
_files: dict[Path, ModuleType] = {}


class Emulated(ModuleType):
    """A module of the emulated nki: a name that it hasn't got is not modelled."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        not_modelled(f"{self.__name__}.{name}")


def _emulated() -> dict[str, ModuleType]:
    nki, nisa, nl = (Emulated(name) for name in ("nki", "nki.isa", "nki.language"))
    vars(nisa).update(isa.SURFACE)
    vars(nl).update(language.SURFACE)
    vars(nki).update(jit=jit, isa=nisa, language=nl, __path__=[])
    return {module.__name__: module for module in (nki, nisa, nl)}


NKI = _emulated()


def load(kernel: str | Path) -> ModuleType:
    """The module of a kernel file, imported against the emulated nki; the same one every time.

    Args:
        kernel: the name of a file beside the emulator ("xuv"), or the path of any file.

    Other files of the same package that it imports are loaded against the emulated nki too. sys.modules, and the
    copies of those files that were imported already, stay as they are.

    Raises EmulationError where there is no such file.
    """
    path = FOLDER / f"{kernel}.py" if isinstance(kernel, str) else kernel.resolve()
    if not path.is_file():
        raise EmulationError("load", f"expected a kernel file, found none at {path}")
    if path.parent == FOLDER:
        name = f"{PACKAGE}.{path.stem}"
        if name not in _siblings:
            with _patched():
                importlib.import_module(name)
        return _siblings[name]
    if path not in _files:
        with _patched():
            _files[path] = _execute(path)
    return _files[path]


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{FILE_PREFIX}{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _is_sibling(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.") and name != EMULATOR and not name.startswith(f"{EMULATOR}.")


def _is_patched(name: str) -> bool:
    return name == "nki" or name.startswith("nki.") or _is_sibling(name)


@contextmanager
def _patched() -> Iterator[None]:
    """The emulated nki in sys.modules, and the kernel files that were loaded against it; then all as it was."""
    before, package = dict(sys.modules), sys.modules[PACKAGE]
    attributes = dict(vars(package))
    for name, module in before.items():
        if _is_patched(name):
            del sys.modules[name]
            if attributes.get(stem := name.rpartition(".")[2]) is module:  # an import also binds it in its package
                delattr(package, stem)
    sys.modules.update(NKI | _siblings)
    vars(package).update({name.rpartition(".")[2]: module for name, module in _siblings.items()})
    try:
        yield
        _siblings.update({name: module for name, module in sys.modules.items() if _is_sibling(name)})
    finally:
        for name in list(sys.modules):
            if _is_patched(name) or name.startswith(FILE_PREFIX):
                del sys.modules[name]
        sys.modules.update(before)
        for name in set(vars(package)) - set(attributes):
            delattr(package, name)
        vars(package).update(attributes)
