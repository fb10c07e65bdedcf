"""Which inputs occur: a forward pass over text, with the second moments of every projection's inputs."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd.cache import empty_cache
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.compression.svd import Moment
from jaxsvd.errors import UsageError
from jaxsvd.kernels.xla import XLA, GroupPlan
from jaxsvd.tokenizer import Tokenizer

WINDOW = 256
DEFAULT_TOKENS = 6144


@dataclass(frozen=True, eq=False)
class Recorder(XLA):
    """The XLA backend, run step by step, that sums x·xᵀ of every group in the order in which the model calls them."""

    totals: list[np.ndarray] = field(default_factory=list)

    def project(self, plan: GroupPlan, x: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """As XLA does, after taking the moment."""
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        self.totals.append(np.asarray(flat.T @ flat, np.float64))
        return super().project(plan, x, arrays)


def calibration_windows(folder: Path, files: Sequence[str | Path], tokens: int) -> tuple[np.ndarray, str]:
    """Token windows (n, WINDOW), evenly spread over the texts, and the digest of what was chosen.

    Raises UsageError where a file can't be read or there is less text than asked for.
    """
    if tokens < WINDOW:
        raise UsageError(f"tokens is {tokens}: calibration needs at least {WINDOW}")
    tokenizer, count = Tokenizer(folder), tokens // WINDOW
    # About ten bytes of text a token, so that a large file is not tokenised whole.
    pieces = [piece for text in _texts(files) for piece in _spread(text, count // max(len(files), 1) + 1, 10 * WINDOW)]
    rows = [ids[:WINDOW] for ids in map(tokenizer.encode, pieces) if len(ids) >= WINDOW]
    if len(rows) < count:
        raise UsageError(
            f"the calibration text has {len(rows)} windows of {WINDOW} tokens: {count} were asked for; "
            "give more text or lower tokens"
        )
    windows = np.array([rows[i * len(rows) // count] for i in range(count)], np.int32)
    return windows, hashlib.sha256(windows.tobytes()).hexdigest()


def _texts(files: Sequence[str | Path]) -> list[str]:
    if not files:  # the one English text that every Python has: its language reference
        topics = import_module("pydoc_data.topics").topics
        return ["\n\n".join(topics[name] for name in sorted(topics))]
    try:
        return [Path(path).read_text(encoding="utf-8") for path in files]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration text can't be read as UTF-8 ({error})") from None


def _spread(text: str, count: int, length: int) -> list[str]:
    """Up to `count` pieces of `length` characters, evenly spread, each from the beginning of a line."""
    starts = [i * max(len(text) - length, 0) // max(count - 1, 1) for i in range(count)]
    starts = sorted({text.rfind("\n", 0, start + 1) + 1 for start in starts})
    return [text[start : start + length] for start in starts]


def input_moments(checkpoint: Checkpoint, windows: np.ndarray, progress: Callable[[int], object]) -> dict[str, Moment]:
    """The moment of every projection's inputs by its path; `progress` is told of each layer of each batch."""
    recorder = Recorder("cpu")
    model: Any = checkpoint.load(recorder, jnp.float32)
    groups = _groups(list(checkpoint.matrices))
    sums: list[np.ndarray] = []
    for batch in np.array_split(windows, max(1, len(windows) // 8)):
        recorder.totals.clear()
        cache = empty_cache(checkpoint.config, len(batch), batch.shape[1], jnp.dtype("float32"))
        model(jnp.asarray(batch), cache, jnp.int32(0))
        sums = [a + b for a, b in zip(sums, recorder.totals, strict=True)] if sums else list(recorder.totals)
        progress(1)
    moments = [Moment(total, windows.size) for total in sums]
    return {path: moment for group, moment in zip(groups, moments, strict=True) for path in group}


def _groups(paths: Sequence[str]) -> list[list[str]]:
    """Projections in the order of the model's constructor, those of one x together."""
    groups: list[list[str]] = []
    for path in paths:
        if path.endswith((".k_proj", ".v_proj", ".up_proj")):
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups
