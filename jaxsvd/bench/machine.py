"""Where a benchmark ran: device, versions, commit; and how fast its memory is."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd import __version__
from jaxsvd.errors import UsageError

# GB/s that a copy reaches, bytes read and written together, by JAX's name of the device: measured, below the peak.
COPY_RATES = {"NVIDIA H200": 4300.0}
_BYTES, _SECONDS = 2**28, 1.0


class Bandwidth(NamedTuple):
    """GB/s of the device's memory, and how they are known."""

    rate: float
    source: str


def bandwidth(given: float | None = None) -> Bandwidth:
    """That of the first device: as given, else as known for its kind, else measured here and now (a second).

    Raises UsageError for one that is not a positive number.
    """
    if given is not None:
        if not 0 < given < float("inf"):
            raise UsageError(f"the bandwidth is {given} GB/s: expected a number above 0")
        return Bandwidth(given, "given")
    kind = jax.local_devices()[0].device_kind
    if kind in COPY_RATES:
        return Bandwidth(COPY_RATES[kind], f"copy rate of {kind}, measured before")
    if jax.default_backend() == "cpu":
        return Bandwidth(_read_rate(), "reading with all cores, measured in this run")
    return Bandwidth(_copy_rate(), "copying on the device, measured in this run")


def _read_rate() -> float:
    """Of a CPU, which decodes by reading: every core walks its own part of an array once."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(_BYTES // 4, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return _BYTES / _fastest(lambda: list(pool.map(np.max, parts))) / 1e9


def _copy_rate() -> float:
    array, copy = jnp.ones(_BYTES // 4, jnp.float32), jax.jit(lambda x: x + 1)
    return 2 * _BYTES / _fastest(lambda: copy(array).block_until_ready()) / 1e9


def _fastest(run: Callable[[], Any]) -> float:
    """The least seconds of one run within about a second of runs: what else the machine does only slows them."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < _SECONDS:  # the first ones compile, or touch the memory
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def description() -> dict[str, Any]:
    """Device, versions, commit and date, for the record."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": jax.default_backend(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "jaxsvd": __version__,
            **{name: version(name) for name in ("jax", "jaxlib", "flax")},
            "python": platform.python_version(),
        },
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """The git commit of a checkout, "+" behind it where files differ from it; None where `root` is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root.resolve():
            return None  # installed into some other project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
