"""Perplexity over the windows of a text, of one model or of several that are compared window by window."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsvd import api, hub
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.config import ModelConfig
from jaxsvd.engine import Engine
from jaxsvd.errors import UsageError
from jaxsvd.progress import bar
from jaxsvd.tokenizer import Tokenizer

WINDOW = 512
BATCH_SIZE = 8


class Result(NamedTuple):
    """The perplexity of a text.

    `perplexity` is exp of the mean negative log-likelihood per predicted token, the first of each window not counted;
    `standard_error` is its own (perplexity times that of the windows' mean, nan for a single window). `tokens` are
    those predicted, `tokens_per_second` leaves loading and compiling out. `nlls`, float64 (windows,), are the windows'
    means, in nats; `digest` is the SHA-256 of their tokens.
    """

    perplexity: float
    standard_error: float
    windows: int
    tokens: int
    tokens_per_second: float
    nlls: np.ndarray
    digest: str


class Comparison(NamedTuple):
    """Two models on the same windows: the ratio of their perplexities, and the standard error of its logarithm."""

    ratio: float
    log_error: float


class Row(NamedTuple):
    """One model on one text. `keep` is the fraction of their parameters that the projections kept, 1 if dense.

    `comparison` is to the first model; it has none itself.
    """

    model: str
    keep: float
    text: str
    result: Result
    comparison: Comparison | None


def perplexity(
    model: api.LanguageModel | str | os.PathLike[str],
    text: str | Path,
    window: int = WINDOW,
    windows: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool | None = None,
) -> Result:
    """The perplexity of a text, cut into windows that do not overlap; no BOS token is added.

    Args:
        model: a loaded model, or a name, Hub id or folder for `jaxsvd.load`.
        text: the text itself, or the `Path` of a UTF-8 file.
        window: tokens per window; all but the first are predicted.
        windows: how many windows, evenly spaced, to take; by default all. What is left behind the last is not used.
        batch_size: windows scored at a time.
        progress: a progress bar on stderr; by default where stderr is a terminal.

    Raises UsageError for a text that can't be read or is too short, and for numbers that can't be used.
    """
    if not isinstance(model, api.LanguageModel):
        model = api.load(model, progress=progress)
    _check(model.config, window, windows, batch_size)
    chosen = _choose(model.tokenizer, text, window, windows)
    with bar("scoring", len(chosen), "window", progress, leave=False) as shown:
        return _score(model.engine, chosen, batch_size, shown.update)


def compare(base: Result, other: Result) -> Comparison:
    """`other` over `base`, both of the same windows: the noise that they share cancels.

    Raises UsageError where the windows differ.
    """
    if base.digest != other.digest:
        raise UsageError(
            f"results of {base.windows} windows ({base.tokens} tokens) and of {other.windows} others ({other.tokens}) "
            "can't be compared: score the same windows with both models"
        )
    differences = other.nlls - base.nlls
    return Comparison(_exp(differences.mean()), _standard_error(differences))


def measure(
    models: Sequence[str | os.PathLike[str]],
    texts: Sequence[str | Path],
    window: int = WINDOW,
    windows: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: Any = None,
    backend: str = "auto",
    progress: bool | None = None,
) -> list[Row]:
    """The perplexity of every text by every model, one of them in memory at a time.

    Options are those of `perplexity` and of `jaxsvd.load`.

    Raises UsageError as `perplexity` does, and where a model's tokens are not those of the first, before any is loaded.
    """
    checkpoints = [Checkpoint(hub.resolve(model)) for model in models]
    for checkpoint in checkpoints:
        _check(checkpoint.config, window, windows, batch_size)
    first, *others = (Tokenizer(checkpoint.folder) for checkpoint in checkpoints)
    chosen = [_choose(first, text, window, windows) for text in texts]
    for model, checkpoint, tokenizer in zip(models[1:], checkpoints[1:], others, strict=True):
        sizes = checkpoints[0].config.vocab_size, checkpoint.config.vocab_size
        if sizes[0] != sizes[1]:
            reason = f"they have vocabularies of {sizes[0]} and {sizes[1]} tokens"
        elif tokenizer.vocabulary != first.vocabulary:
            reason = "their tokenizers have other tokens"
        elif not all(
            np.array_equal(theirs, _choose(tokenizer, text, window, windows))
            for theirs, text in zip(chosen, texts, strict=True)
        ):
            reason = "their tokenizers cut the text differently"
        else:
            continue
        raise UsageError(f"{model} can't be compared with {models[0]}: {reason}, and a perplexity is per token")
    rows: list[Row] = []
    for model, checkpoint in zip(models, checkpoints, strict=True):
        results = _results(checkpoint, chosen, batch_size, dtype, backend, progress)
        for i, (text, result) in enumerate(zip(texts, results, strict=True)):
            comparison = compare(rows[i].result, result) if len(rows) >= len(texts) else None
            rows.append(Row(str(model), checkpoint.keep.linears, str(text), result, comparison))
    return rows


def _results(
    checkpoint: Checkpoint,
    chosen: Sequence[np.ndarray],
    batch_size: int,
    dtype: Any,
    backend: str,
    progress: bool | None,
) -> list[Result]:
    """One model's results. Its memory is free again when this returns."""
    engine = api.load(checkpoint, dtype, backend, progress).engine
    name, total = f"scoring {checkpoint.folder.name}", sum(map(len, chosen))
    with bar(name, total, "window", progress, leave=False) as shown:
        return [_score(engine, windows, batch_size, shown.update) for windows in chosen]


def _score(engine: Engine, windows: np.ndarray, batch_size: int, progress: Callable[[int], object]) -> Result:
    batches = -(-len(windows) // batch_size)
    width = -(-len(windows) // batches)  # batches of one size: a smaller last one would compile steps of its own
    means, start, known = [], time.perf_counter(), len(engine.compiled)
    for first in range(0, len(windows), width):
        batch = windows[first : first + width]
        scores = engine.score(np.resize(batch, (width, batch.shape[1])).tolist())[: len(batch)]
        means += [-score.logprobs.mean(dtype=np.float64) for score in scores]
        progress(len(batch))
    seconds = time.perf_counter() - start - sum(step.seconds for step in engine.compiled[known:])
    nlls, tokens = np.array(means), windows.size - len(windows)
    value, digest = _exp(nlls.mean()), hashlib.sha256(str(windows.shape).encode() + windows.tobytes()).hexdigest()
    return Result(value, value * _standard_error(nlls), len(windows), tokens, tokens / seconds, nlls, digest)


def _exp(value: np.floating) -> float:
    with np.errstate(over="ignore"):  # a broken model's is infinite
        return float(np.exp(value))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _check(config: ModelConfig, window: int, windows: int | None, batch_size: int) -> None:
    if window < 2:
        raise UsageError(f"window is {window}: expected at least 2 tokens, as the first is not predicted")
    if window > config.max_positions:
        raise UsageError(f"window is {window}: the model has room for {config.max_positions} tokens")
    if windows is not None and windows < 1:
        raise UsageError(f"windows is {windows}: expected at least 1")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: expected at least 1")


def _choose(tokenizer: Tokenizer, text: str | Path, window: int, windows: int | None) -> np.ndarray:
    """The windows of a text to score, int32 (windows, window)."""
    name = text if isinstance(text, Path) else "the text"
    ids = tokenizer.encode(_read(text), special=False)
    total = len(ids) // window
    if not total:
        raise UsageError(f"{name} has {len(ids)} tokens: less than one window of {window}; give more text")
    if windows is not None and windows > total:
        raise UsageError(f"{name} has {total} windows of {window} tokens: {windows} were asked for; give more text")
    count = windows or total
    return np.array(ids[: total * window], np.int32).reshape(total, window)[np.arange(count) * total // count]


def _read(text: str | Path) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text {text} can't be read as UTF-8 ({error})") from None
