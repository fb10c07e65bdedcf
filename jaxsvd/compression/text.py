"""Calibration text: which token windows the model is shown."""

import hashlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np

from jaxsvd.errors import UsageError
from jaxsvd.tokenizer import Tokenizer

WINDOW = 512
DEFAULT_TOKENS = 48 * WINDOW


def calibration_windows(
    folder: Path, files: Sequence[str | Path], tokens: int, window: int = WINDOW, seed: int = 0
) -> tuple[np.ndarray, str]:
    """Token windows int32 (n, window), as many from each text, and the digest of what was chosen.

    They are spread evenly over each text, with starts that the seed shifts. Raises UsageError where a file can't be
    read or there is less text than asked for.
    """
    if tokens < window:
        raise UsageError(f"tokens is {tokens}: calibration needs at least {window}")
    tokenizer, texts, rng = Tokenizer(folder), _texts(files), np.random.default_rng(seed)
    count = tokens // window
    shares = [count // len(texts) + (i < count % len(texts)) for i in range(len(texts))]
    rows = []
    for text, share in zip(texts, shares, strict=True):
        # About ten characters of text a token, so that a large file is not tokenised whole.
        ids = [tokenizer.encode(piece)[:window] for piece in _spread(text, share, 10 * window, rng)]
        rows += [row for row in ids if len(row) == window]
    if len(rows) < count:
        raise UsageError(
            f"the calibration text has {len(rows)} windows of {window} tokens: {count} were asked for; "
            "give more text or lower tokens"
        )
    windows = np.array(rows, np.int32)
    return windows, hashlib.sha256(windows.tobytes()).hexdigest()


def _texts(files: Sequence[str | Path]) -> list[str]:
    if not files:  # the one English text that every Python has: its language reference
        topics = import_module("pydoc_data.topics").topics
        return ["\n\n".join(topics[name] for name in sorted(topics))]
    try:
        return [Path(path).read_text(encoding="utf-8") for path in files]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration text can't be read as UTF-8 ({error})") from None


def _spread(text: str, count: int, length: int, rng: np.random.Generator) -> list[str]:
    """Up to `count` pieces of `length` characters, one in each of `count` equal parts.

    They begin with a line, where there is one near.
    """
    span = max(len(text) - length, 0) / max(count, 1)
    places = [int((i + shift) * span) for i, shift in enumerate(rng.random(count))]
    lines = [text.rfind("\n", max(0, at - length), at + 1) for at in places]
    starts = sorted({line + 1 if line >= 0 else at for line, at in zip(lines, places, strict=True)})
    return [text[start : start + length] for start in starts]
