"""Does a model, as it runs here, answer as it should? Its logits or its tokens against a reference."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxsvd import api, hub
from jaxsvd.checkpoint.files import TensorFiles, Tensors
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.engine import Engine
from jaxsvd.errors import UsageError
from jaxsvd.evaluate import locate, matching, reference
from jaxsvd.evaluate.matching import DIVERGENCE_TOLERANCE, TOLERANCES, Matching, Tolerance
from jaxsvd.evaluate.reference import REFERENCE, Reference
from jaxsvd.progress import bar
from jaxsvd.sampling import SamplingParams
from jaxsvd.tokenizer import Tokenizer

logger = logging.getLogger("jaxsvd")

MODES = ("logits", "tokens")
TOKENS = 32
PROMPT = "I believe the meaning of life is"  # that of NxD Inference's own check


class Difference(NamedTuple):
    """The first token of a prompt's text that is another one."""

    prompt: int
    position: int
    expected: int
    actual: int


class Outcome(NamedTuple):
    """What a check found.

    `subject` says how the model in `folder` ran. `against` is the other model that the reference is of: the check then
    measures what compression changes, and not this program alone. `matching` is of mode "logits", `differences` are
    of mode "tokens". `deviations` are those of single projections, the largest first, and `suspects` those that are too
    large: in mode "logits" only.
    """

    mode: str
    folder: Path
    subject: str
    reference: Reference
    against: str | None
    matching: Matching | None = None
    differences: list[Difference] | None = None
    deviations: Sequence[locate.Deviation] = ()
    projection_tolerance: float = locate.PROJECTION_TOLERANCE

    @property
    def suspects(self) -> list[locate.Deviation]:
        """The projections that do not do what their weights say."""
        return locate.suspects(self.deviations, self.projection_tolerance)

    @property
    def passed(self) -> bool:
        """Whether the model answers as it should."""
        return self.matching.passed and not self.suspects if self.matching else not self.differences


class RoundedFiles(Tensors):
    """The tensors of a checkpoint rounded to a dtype, in the dtype of the file: they stay what they are otherwise."""

    def __init__(self, files: TensorFiles, dtype: Any) -> None:
        self._files, self._dtype = files, np.dtype(dtype)
        self.folder, self.entries, self.problems = files.folder, files.entries, files.problems

    def read(self, name: str) -> np.ndarray:
        """The tensor. Raises UsageError for values that are too large for the dtype."""
        array = self._files.read(name)
        with np.errstate(over="ignore"):
            rounded = array.astype(self._dtype)
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise UsageError(f"{name} of {self.folder} has values too large for {self._dtype}: round to bfloat16")
        return rounded.astype(np.float32).astype(array.dtype)


def check(
    model: str | os.PathLike[str],
    mode: str = "logits",
    prompts: Sequence[str] = (),
    count: int | None = None,
    against: str | os.PathLike[str] | None = None,
    source: str = "jaxsvd",
    golden: Path | None = None,
    save_golden: Path | None = None,
    tolerances: Sequence[Tolerance] = TOLERANCES,
    divergence: float = DIVERGENCE_TOLERANCE,
    projection_tolerance: float = locate.PROJECTION_TOLERANCE,
    dtype: Any = None,
    backend: str = "auto",
    round_weights: str | None = None,
    progress: bool | None = None,
) -> Outcome:
    """Compare a model, as it runs here, with a reference in float32 on CPU: one of the two in memory at a time.

    Args:
        model: a name, Hub id or folder for `jaxsvd.load`.
        mode: "logits" matches them (`jaxsvd.evaluate.matching`), "tokens" wants the greedy text to be the same.
        prompts: plain texts, all of them checked, as one batch; default PROMPT. Not with `golden`, which has its own.
        count: new tokens a prompt; default TOKENS, or all of the golden file's.
        against: the model that the reference is of; by default the same one.
        source: who computes the reference: "jaxsvd" or "transformers".
        golden: a file with the reference, in place of `source`.
        save_golden: a file to keep the reference in.
        tolerances: of mode "logits".
        divergence: of mode "logits": below this gap another token is a near-tie.
        projection_tolerance: of mode "logits": what a projection alone may deviate by, relative to its output, from
            what the weights in the model's own files make (`jaxsvd.evaluate.locate`); `math.inf` forgives everything.
        dtype: as in `jaxsvd.load`.
        backend: as in `jaxsvd.load`.
        round_weights: "bfloat16" or "float16": round the model's weights, not the reference's, before `dtype`.
        progress: progress bars on stderr; by default where it is a terminal.

    Raises UsageError for arguments that can't be used, ModelError for models that can't be loaded and golden files that
    are not of the model.
    """
    _refuse(mode, prompts, count, golden, save_golden)
    reference.check_source(source)
    _refuse_tolerances(divergence, projection_tolerance)
    tolerances, folder = matching.checked(tolerances), hub.resolve(model)
    checkpoint = _opened(folder, round_weights)
    expecting = Checkpoint(hub.resolve(against)) if against else Checkpoint(folder) if round_weights else checkpoint
    if golden:
        expected = _shortened(reference.load_golden(golden, expecting), golden, count)
    else:
        texts = list(prompts) or [PROMPT]
        ids = _encoded(checkpoint, expecting, texts)
        expected = reference.compute(expecting, texts, ids, count or TOKENS, source, progress)
    if save_golden:
        reference.save_golden(expected, expecting, save_golden)
    engine = api.load(checkpoint, dtype, backend, progress).engine
    outcome = Outcome(mode, folder, _subject(engine, round_weights), expected, str(against) if against else None)
    if not (against or round_weights or golden or source != "jaxsvd") and outcome.subject == REFERENCE:
        logger.warning("the model runs here as the reference does, so they can't differ: choose a dtype or a backend")
    if mode == "tokens":
        return outcome._replace(differences=_differences(engine, expected))
    with bar("checking", expected.logits.shape[1], "token", progress, leave=False) as shown:
        found = matching.match(engine.follow, expected.prompts, expected.logits, tolerances, divergence, shown.update)
    own = Checkpoint(folder) if round_weights else checkpoint
    return outcome._replace(
        matching=found, deviations=locate.deviations(engine, own), projection_tolerance=projection_tolerance
    )


def _refuse(
    mode: str,
    prompts: Sequence[str],
    count: int | None,
    golden: Path | None,
    save_golden: Path | None,
) -> None:
    """Raises UsageError for arguments that can't be used, before anything is opened."""
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode!r}: choose one of {', '.join(MODES)}")
    if golden and (prompts or save_golden):
        raise UsageError("a golden file has its own prompts: give neither prompts nor a file to save with it")
    if count is not None and count < 1:
        raise UsageError(f"the number of tokens is {count}: expected at least 1")
    if save_golden:
        reference.check_golden(save_golden)


def _refuse_tolerances(divergence: float, projection: float) -> None:
    """Raises UsageError for tolerances that can't be used."""
    if not 0 <= divergence < math.inf:
        raise UsageError(f"the divergence tolerance is {divergence}: expected a number of at least 0")
    if not projection >= 0:
        raise UsageError(f"the projections' tolerance is {projection}: expected a number of at least 0, or inf")


def _subject(engine: Engine, round_weights: str | None) -> str:
    """What runs, in the words of a `Reference`'s source."""
    backend = engine.model.layers[0].self_attn.qkv.backend.name
    device = jax.local_devices()[0]
    place = "CPU" if device.platform == "cpu" else device.device_kind
    rounded = f", weights rounded to {round_weights}" if round_weights else ""
    return f"{'XLA' if backend == 'xla' else backend}, {engine.dtype.name} on {place}{rounded}"


def _opened(folder: Path, round_weights: str | None) -> Checkpoint:
    if round_weights is None:
        return Checkpoint(folder)
    kinds = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if round_weights not in kinds:
        raise UsageError(f"weights can't be rounded to {round_weights!r}: choose one of {', '.join(kinds)}")
    return Checkpoint(folder, RoundedFiles(TensorFiles(folder), kinds[round_weights]))


def _encoded(checkpoint: Checkpoint, expecting: Checkpoint, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of plain texts. Raises UsageError where the two models do not have the same tokens."""
    ids = [Tokenizer(folder) for folder in dict.fromkeys((checkpoint.folder, expecting.folder))]
    first, *others = ([tokenizer.encode(text) for text in texts] for tokenizer in ids)
    sizes = checkpoint.config.vocab_size, expecting.config.vocab_size
    if sizes[0] != sizes[1] or [first] * len(others) != others:
        reason = f"vocabularies of {sizes[0]} and {sizes[1]} tokens" if sizes[0] != sizes[1] else "other tokenizers"
        raise UsageError(
            f"{checkpoint.folder} can't be checked against {expecting.folder}: they have {reason}; "
            "give the dense model that it was made of"
        )
    return first


def _shortened(expected: Reference, path: Path, count: int | None) -> Reference:
    """The reference of a golden file, or its beginning."""
    kept = expected.logits.shape[1]
    if count is not None and count > kept:
        raise UsageError(f"the golden file {path} has {kept} tokens a prompt: {count} were asked for")
    return expected.first(count or kept)


def _differences(engine: Engine, expected: Reference) -> list[Difference]:
    """Where the greedy text of each prompt, as `generate` makes it, first is another one.

    A text that ends, as the reference's never does, is compared as far as it goes.
    """
    rows, tokens = [SamplingParams()] * len(expected.prompts), expected.tokens
    found = np.concatenate(list(engine.generate(expected.prompts, rows, tokens.shape[1])), axis=1)
    ended = np.isneginf(np.take_along_axis(expected.logits, found[:, :, None], axis=2)[:, :, 0])
    return [
        Difference(row, int(at[0]), int(tokens[row, at[0]]), int(found[row, at[0]]))
        for row in range(len(found))
        if (at := np.flatnonzero(found[row] != tokens[row])).size and not ended[row, at[0]]
    ]
