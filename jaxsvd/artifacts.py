"""Artefacts: every step of an engine, compiled ahead into a folder, so that a start compiles nothing.

An artefact is a folder of executables, as XLA writes them, and a manifest that says what they were compiled for and
what digest each has. It holds no weights: these are arguments of the steps, so it serves every checkpoint of the same
config and ranks. Nothing in it is a pickle (`jax.experimental.serialize_executable` makes one around the same bytes).
But executables are machine code: use artefacts of people whose programs you would run.

The folder takes its name when all of it is there. Until then it is `.NAME.partial` beside it, and compiling that was
cut short goes on from what is there.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib.version
from jaxlib.xla_client import DeviceList

from jaxsvd import __version__
from jaxsvd.buckets import Buckets
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.checkpoint.write import check_target, write_json
from jaxsvd.config import read_json
from jaxsvd.engine import Engine
from jaxsvd.errors import JaxsvdError, ModelError, UsageError
from jaxsvd.kernels import Backend
from jaxsvd.sampling import MODES, Mode
from jaxsvd.steps import Call

logger = logging.getLogger("jaxsvd")

FORMAT = 1
MANIFEST = "manifest.json"
_SETTINGS = "settings.json"  # what an unfinished artefact has instead
_CURE = "compile it again (--force), or start without --artifacts"

_Json = dict[str, Any]


def identity(checkpoint: Checkpoint, dtype: Any, backend: Backend, buckets: Buckets, steps_per_dispatch: int) -> _Json:
    """All that compiled steps depend on, but the batch and the modes of sampling: what a manifest has to agree with."""
    device = jax.local_devices()[0]
    said = {
        "format": FORMAT,
        "config": _digest(json.dumps(dataclasses.asdict(checkpoint.config), sort_keys=True).encode()),
        "ranks": checkpoint.ranks,
        "dtype": jax.numpy.dtype(dtype).name,
        "backend": backend.name,
        "buckets": buckets._asdict(),
        "steps_per_dispatch": steps_per_dispatch,
        "platform": device.platform,
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "versions": {
            "jaxsvd": __version__,
            "code": _code(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "flax": flax.__version__,
            "plugin": device.client.platform_version,
        },
        "settings": {
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "NEURON_CC_FLAGS": os.environ.get("NEURON_CC_FLAGS", ""),
            "matmul_precision": jax.config.values["jax_default_matmul_precision"],
            "x64": jax.config.values["jax_enable_x64"],
        },
    }
    return json.loads(json.dumps(said))  # as it will be read


class Artifact:
    """A finished artefact, opened. Raises UsageError where the folder is damaged or of another format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = read_json(folder / MANIFEST)
            self.batch = int(self.manifest["batch"])
            self.modes = [MODES[name] for name in self.manifest["modes"]]
            self.graphs: dict[str, _Json] = self.manifest["graphs"]
            self.buckets = Buckets(*(self._plain(self.manifest["buckets"][name]) for name in Buckets._fields))
            self.steps_per_dispatch = int(self.manifest["steps_per_dispatch"])
            sizes = {name: int(graph["bytes"]) for name, graph in self.graphs.items()}
        except (ModelError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"its {MANIFEST} can't be used: {error}") from None
        for name, size in sizes.items():
            path = self._path(name)
            if not path.is_file() or path.stat().st_size != size:
                raise self._damaged(f"{path.name} is not there or not of its size")

    @staticmethod
    def _plain(value: Any) -> Any:
        return value if isinstance(value, int) else tuple(map(int, value))

    def check(self, wanted: _Json) -> None:
        """Raises UsageError that says in what it differs from an `identity`: it is of another model, or out of date."""
        reasons = [
            f"its {name} is {theirs}, here it is {ours}" for name, theirs, ours in _differences(self.manifest, wanted)
        ]
        if reasons:
            raise UsageError(f"the artefact {self.folder} can't be used: {'; '.join(reasons)}; {_CURE}")

    def mode(self, batch: int, needed: Mode) -> Mode:
        """The least mode held that does what is needed. Raises UsageError where it, or a batch of that size, is not."""
        if batch != self.batch:
            raise UsageError(
                f"the artefact {self.folder} is for {self.batch} prompts at a time, found {batch}: "
                f"compile one with --batch-size {batch}, or start without --artifacts"
            )
        if not (able := [mode for mode in self.modes if _does(mode, needed)]):
            name = next(name for name, mode in MODES.items() if _does(mode, needed))
            raise UsageError(
                f"the artefact {self.folder} has the modes {', '.join(self.manifest['modes'])}, and {name} is needed: "
                f"compile one with --modes {name}, or start without --artifacts"
            )
        return min(able)

    def load(self, call: Call) -> Callable[..., Any] | None:
        """What runs the call's step, on its arguments or others of these shapes; None where it is not held.

        Raises UsageError where its file is damaged.
        """
        name = name_of(call)
        if name not in self.graphs:
            return None
        start = time.perf_counter()
        data = self._path(name).read_bytes()
        if _digest(data) != self.graphs[name].get("sha256"):
            raise self._damaged(f"{name} does not have its digest")
        try:
            run = _loaded(data, call.gives)
        except jax.errors.JaxRuntimeError as error:
            raise self._damaged(f"{name} can't be loaded ({error})") from None
        logger.debug("took %s from the artefact in %.2f s", call.label, time.perf_counter() - start)
        return run

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.xla"

    def _damaged(self, reason: str) -> UsageError:
        return UsageError(f"the artefact {self.folder} is damaged ({reason}): {_CURE}")


def find(folder: str | os.PathLike[str]) -> Artifact | None:
    """The artefact in a folder; None, and a warning, where there is none that was finished.

    Raises UsageError where it is damaged, or the folder is a file.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: give the folder of an artefact")
    if (path / MANIFEST).exists():
        return Artifact(path)
    logger.warning("there is no finished artefact in %s: steps are compiled when they are needed", path)
    return None


def name_of(call: Call) -> str:
    """The name of a step's file: what it is, and a digest of the shapes of all its arguments and what is static."""
    leaves = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(call.args)]
    return f"{call.step.__name__}-{_digest(repr((call.key, leaves)).encode())[:16]}"


def write(engine: Engine, folder: Path, said: _Json, batch: int, modes: Sequence[str], force: bool = False) -> Artifact:
    """Compile all that `engine.generate` can run into an artefact, and return it opened.

    Args:
        engine: of arrays or of `jax.ShapeDtypeStruct`s.
        folder: what the artefact will be called; with `force`, one that is there is replaced in the end.
        said: the engine's `identity`.
        batch: the prompts that it generates for at a time.
        modes: how they are sampled: names of `jaxsvd.sampling.MODES`.

    Raises UsageError where the folder can't be used, JaxsvdError where the platform can't write what it compiles.
    """
    check_artifact_target(folder, force)
    if batch < 1:
        raise UsageError(f"the batch size is {batch}: expected at least 1")
    if not modes or set(modes) - set(MODES):
        raise UsageError(f"modes are {', '.join(modes) or 'none'}: choose from {', '.join(MODES)}")
    said = said | {"batch": batch, "modes": [name for name in MODES if name in modes]}
    calls = {name_of(call): call for call in engine.calls(batch, [MODES[name] for name in said["modes"]])}
    with _workplace(folder.with_name(f".{folder.name}.partial"), said) as work, _without_compilation_cache():
        for number, (name, call) in enumerate(calls.items(), start=1):
            path = work / f"{name}.xla"
            if not path.exists():
                logger.info("%d of %d: %s", number, len(calls), call.label)
                path.with_suffix(".tmp").write_bytes(_written(engine, call))
                os.replace(path.with_suffix(".tmp"), path)
        graphs = {}
        for name, call in calls.items():
            data = (work / f"{name}.xla").read_bytes()
            graphs[name] = {"step": call.label, "bytes": len(data), "sha256": _digest(data)}
        _finish(work, folder, said | {"graphs": graphs})
    return Artifact(folder)


def check_artifact_target(folder: Path, force: bool) -> None:
    """Raises UsageError where no artefact can be written there."""
    check_target(folder, force, MANIFEST, "an artefact")


@contextmanager
def _workplace(work: Path, said: _Json) -> Iterator[Path]:
    """The folder to work in, for one process at a time. What was left there stays if it was begun for the same."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if said not in (_said(work / _SETTINGS), _said(work / MANIFEST)):
            for path in work.iterdir():
                path.unlink()
            write_json(work / "settings.tmp", said)
            os.replace(work / "settings.tmp", work / _SETTINGS)
        yield work
    except BlockingIOError:
        raise UsageError(f"another process is compiling into {work}: wait for it, or choose another folder") from None
    finally:
        os.close(descriptor)


def _said(path: Path) -> _Json | None:
    """What an artefact or the beginning of one is for."""
    try:
        return {name: value for name, value in read_json(path).items() if name != "graphs"}
    except ModelError:
        return None


def _finish(work: Path, folder: Path, manifest: _Json) -> None:
    """Write the manifest and give the folder its name. Another artefact of that name goes when this one is whole."""
    write_json(work / MANIFEST, manifest)
    keep = {MANIFEST, *(f"{name}.xla" for name in manifest["graphs"])}
    for path in work.iterdir():
        if path.name not in keep:
            path.unlink()
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _written(engine: Engine, call: Call) -> bytes:
    """Compile a step: the bytes of its executable, which have been read back."""
    compiled = engine.compile(call)
    assert compiled.out_tree == jax.tree.structure(call.gives), (call.label, compiled.out_tree)
    device = jax.local_devices()[0]
    try:
        data = device.client.serialize_executable(compiled.runtime_executable())
        _loaded(data, call.gives)
    except (jax.errors.JaxRuntimeError, AttributeError, NotImplementedError) as error:
        raise JaxsvdError(
            f"platform {device.platform} can't write {call.label} to a file and read it back ({error}): "
            "there are no artefacts for it, the compilation cache is used without them"
        ) from None
    return bytes(data)


def _loaded(data: bytes, gives: Any) -> Callable[..., Any]:
    """A function that runs an executable on what `jax.jit` would take and gives what it would give."""
    device = jax.local_devices()[0]
    executable = device.client.deserialize_executable(data, executable_devices=DeviceList((device,)))
    tree = jax.tree.structure(gives)
    handlers = [lambda shards: shards[0]] * tree.num_leaves

    def run(*args: Any) -> Any:
        flat = [leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, device) for leaf in jax.tree.leaves(args)]
        return tree.unflatten(executable.execute_sharded(flat).consume_with_handlers(handlers))

    return run


@contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Compile afresh: an executable that came out of JAX's cache can't be written again (on CPU its code is lost)."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks but once whether there is one; what is on disk stays
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def _differences(theirs: _Json, ours: _Json, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, their value, ours) of every entry of `ours` that differs; of an object's entries the first alone."""
    for name, value in ours.items():
        found = theirs.get(name)
        if found == value:
            continue
        if isinstance(value, dict) and isinstance(found, dict):
            entries = {key: None for key in found} | value
            differing = next(key for key in entries if found.get(key) != value.get(key))
            yield f"{above}{name} ({differing})", found.get(differing, "none"), value.get(differing, "none")
        else:
            yield above + name, found, value


def _does(mode: Mode, needed: Mode) -> bool:
    return mode.random >= needed.random and mode.penalties >= needed.penalties


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def _code() -> str:
    """A digest of jaxsvd's own source: another version of a step may compute something else."""
    package = Path(__file__).parent
    files = sorted(package.rglob("*.py"))
    return _digest(b"".join(str(path.relative_to(package)).encode() + path.read_bytes() for path in files))[:16]


@cache
def _processor() -> str:
    """What XLA's code for CPUs was made for: their number, and what they can do."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        features = next(line for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {platform.machine()} {_digest(' '.join(sorted(features.split())).encode())[:16]}"
