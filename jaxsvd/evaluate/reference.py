"""What a model should answer: logits of the greedy text behind prompts, computed here or kept in a golden file."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd import __version__, api, kernels
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.compression.emit import digest
from jaxsvd.config import end_of_text_ids
from jaxsvd.engine import Engine
from jaxsvd.errors import ModelError, UsageError
from jaxsvd.evaluate import torch_reference
from jaxsvd.progress import bar

SOURCES = ("jaxsvd", "transformers")
REFERENCE = "XLA, float32 on CPU"
FORMAT = "jaxsvd golden 1"
_FIELDS = ("format", "model", "digest", "config", "texts", "source", "jaxsvd")


class Reference(NamedTuple):
    """The greedy text of a model behind prompts.

    `texts` are the prompts, `prompts` their token ids; `logits` float32 (batch, tokens, vocab); `source` says in words
    who computed them. No text ends before its last token: the logits of tokens that would end it are -inf, as
    transformers' `min_new_tokens` makes them, which NxD Inference sets to the number of tokens that it checks.
    """

    texts: list[str]
    prompts: list[list[int]]
    logits: np.ndarray
    source: str

    @property
    def tokens(self) -> np.ndarray:
        """The text, int32 (batch, tokens): the likeliest tokens."""
        return self.logits.argmax(axis=-1).astype(np.int32)

    def first(self, count: int) -> "Reference":
        """Only the first `count` tokens of each row."""
        return self._replace(logits=self.logits[:, :count])


def compute(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
    count: int,
    source: str = "jaxsvd",
    progress: bool | None = None,
) -> Reference:
    """The greedy text of a checkpoint, in float32 on CPU.

    Args:
        checkpoint: the model.
        texts: the prompts, for people.
        prompts: their token ids.
        count: how many tokens.
        source: "jaxsvd", through XLA, or "transformers", through torch.
        progress: a progress bar on stderr; by default where stderr is a terminal.

    Raises UsageError for prompts that do not fit the model, and where the source can't be had.
    """
    check_source(source)
    ends = [
        token for token in end_of_text_ids(checkpoint.folder, checkpoint.raw) if token < checkpoint.config.vocab_size
    ]
    rows, total = list(map(list, prompts)), count * (len(prompts) if source == "transformers" else 1)
    with bar("reference", total, "token", progress, leave=False) as shown:
        if source == "transformers":
            logits = torch_reference.greedy(checkpoint, rows, count, ends, shown.update)
        else:
            logits = _greedy(checkpoint, rows, count, ends, shown.update)
    words = "transformers, float32 on CPU" if source == "transformers" else REFERENCE
    return Reference(list(texts), rows, logits, words)


def check_source(source: str) -> None:
    """Raises UsageError where there is no such source, or it can't be had."""
    if source not in SOURCES:
        raise UsageError(f"there is no reference {source!r}: choose one of {', '.join(SOURCES)}")
    if source == "transformers":
        torch_reference.check()


def _greedy(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    count: int,
    ends: Sequence[int],
    progress: Callable[[int], object],
) -> np.ndarray:
    api.use_compilation_cache()
    found = []

    def endless(logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[:, ends] = -np.inf
        return logits

    with _on_cpu():
        engine = Engine(checkpoint.load(kernels.choose("xla", "cpu"), jnp.float32))
        for logits in engine.follow(prompts, count, lambda _, logits: endless(logits).argmax(axis=-1)):
            found.append(endless(logits))
            progress(1)
    return np.stack(found, axis=1)


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Arrays and steps go to the CPU, beside whatever accelerator there is."""
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:
        raise UsageError(
            f"the reference needs JAX's CPU platform, which is left out of "
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: add it (cuda,cpu), or compare with a golden file"
        ) from None
    with jax.default_device(device):
        yield


def check_golden(path: Path) -> None:
    """Raises UsageError where no golden file can be written there."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise UsageError(f"{path} is no golden file: expected a name that ends in .safetensors")
    if not path.parent.is_dir():
        raise UsageError(f"{path} can't be written: there is no folder {path.parent}")


def save_golden(reference: Reference, checkpoint: Checkpoint, path: Path) -> None:
    """Keep a reference in a file, with what it is of. All of it or nothing is written."""
    from safetensors.numpy import save_file

    lengths = np.array([len(row) for row in reference.prompts], np.int32)
    ids = np.zeros((len(lengths), lengths.max()), np.int32)
    for target, row in zip(ids, reference.prompts, strict=True):
        target[: len(row)] = row
    tensors = {"prompts": ids, "lengths": lengths, "tokens": reference.tokens}
    said = {
        "format": FORMAT,
        "model": checkpoint.folder.name,
        "digest": digest(checkpoint),
        "config": json.dumps(dataclasses.asdict(checkpoint.config)),
        "texts": json.dumps(reference.texts),
        "source": reference.source,
        "jaxsvd": __version__,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors | {"logits": np.ascontiguousarray(reference.logits)}, partial, metadata=said)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_golden(path: Path, checkpoint: Checkpoint) -> Reference:
    """The reference that a file keeps.

    Raises UsageError where it is no golden file or is damaged, ModelError where it is not of this checkpoint.
    """
    tensors, said = _read(path)
    _check_origin(path, said, checkpoint)
    prompts, lengths = (tensors.get(name, np.zeros(0)) for name in ("prompts", "lengths"))
    logits, tokens = (tensors.get(name, np.zeros(0)) for name in ("logits", "tokens"))
    texts = _json(path, said, "texts", list)
    shapes = len(texts) == len(prompts) == len(lengths) == len(logits) > 0 and tokens.shape == logits.shape[:2]
    if not shapes or logits.ndim != 3 or logits.shape[2] != checkpoint.config.vocab_size or not logits.shape[1]:
        raise _damaged(path, "its tensors do not fit together")
    rows = [row[:length].tolist() for row, length in zip(prompts, lengths.tolist(), strict=True)]
    reference = Reference(texts, rows, logits, f"{path.name}: {said['source']}")
    if np.isnan(logits).any() or not np.array_equal(reference.tokens, tokens):
        raise _damaged(path, "its tokens are not those of its logits")
    return reference


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            said = file.metadata() or {}
            names = list(file.keys()) if said.get("format") == FORMAT else []
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"the golden file {path} can't be read ({error}): write one with --save-golden {path}"
        ) from None
    if said.get("format") != FORMAT:
        raise UsageError(
            f"{path} is no golden file of this version of jaxsvd (format {said.get('format')!r}, expected "
            f"{FORMAT!r}): write one with --save-golden {path}"
        )
    if missing := [name for name in _FIELDS if name not in said]:
        raise _damaged(path, f"it does not say {', '.join(missing)}")
    return tensors, said


def _check_origin(path: Path, said: dict[str, str], checkpoint: Checkpoint) -> None:
    """A golden file of another model is foreign; one of weights that have changed since is stale."""
    theirs, ours = _json(path, said, "config", dict), json.loads(json.dumps(dataclasses.asdict(checkpoint.config)))
    for name in ours:
        if theirs.get(name) != ours[name]:
            reason = f"its {name} is {theirs.get(name)}, here it is {ours[name]}"
            break
    else:
        found = digest(checkpoint)
        if found == said["digest"]:
            return
        reason = f"its weights have the digest {said['digest'][:12]}, here it is {found[:12]}"
    raise ModelError(
        f"{path} is golden for the model {said['model']} and can't be used for {checkpoint.folder}: {reason}; "
        f"write it anew with --save-golden {path}, or name the model that it is of with --against"
    )


def _json(path: Path, said: dict[str, str], name: str, kind: type) -> Any:
    try:
        value = json.loads(said[name])
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise _damaged(path, f"its {name} can't be read")
    return value


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(f"the golden file {path} is damaged ({reason}): write it anew with --save-golden {path}")
