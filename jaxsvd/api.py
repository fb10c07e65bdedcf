"""What a notebook calls: load a model, take its logits, generate or stream text."""

import inspect
import logging
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxsvd import artifacts as artefacts
from jaxsvd import hub, kernels
from jaxsvd.artifacts import Artifact
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.config import ModelConfig, end_of_text_ids
from jaxsvd.engine import Engine, Score, lengths_of
from jaxsvd.errors import UsageError
from jaxsvd.models.check import CAPACITY, check
from jaxsvd.progress import bar
from jaxsvd.sampling import per_row
from jaxsvd.tokenizer import Message, StopMatcher, TextStream, Tokenizer, has_tokenizer

logger = logging.getLogger("jaxsvd")

Prompt = str | Sequence[Message] | Sequence[int]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclass(frozen=True)
class Statistics:
    """What a call of `generate` cost: seconds, tokens of all rows together, bytes.

    `first_token_seconds` leaves compilation out, though not the loading of an artefact's steps; `total_seconds` has all
    in. `decode_tokens_per_second` counts the tokens after each row's first over the time after the first, compilation
    left out.
    `bytes_per_step` is what one decode step must read: all weights once, and the cache as far as it is filled at the
    end; `bandwidth` is that over the time of a step, in bytes per second. `peak_bytes` is the device's peak memory,
    on CPU the process's.
    """

    load_seconds: float
    compile_seconds: float
    first_token_seconds: float
    total_seconds: float
    prompt_tokens: int
    new_tokens: int
    decode_tokens_per_second: float
    bytes_per_step: int
    bandwidth: float
    peak_bytes: int


@dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    `token_ids` are all new tokens, the one that ended the text included; `text` leaves special tokens and stop strings
    out, and is "" where the model has no tokenizer. `finish_reason` is "stop" after an end-of-text or stop token or a
    stop string, "length" after max_new_tokens. `stats` are those of the whole call.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Statistics


class _Row:
    """One prompt's way from tokens to text, and to its end."""

    def __init__(self, tokenizer: Tokenizer | None, stop_ids: frozenset[int], stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer) if tokenizer else None
        self._matcher = StopMatcher(stops)
        self._stop_ids = stop_ids
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.finish_reason = ""

    def push(self, token: int, last: bool) -> str:
        """Take a token; return the text that it completes."""
        if self.finish_reason:
            return ""
        self.token_ids.append(token)
        ended = token in self._stop_ids
        piece = ""
        if self._stream:
            piece = self._matcher.push("" if ended else self._stream.push(token))
            if (ended or last) and not self._matcher.stopped:
                piece += self._matcher.push(self._stream.flush()) + self._matcher.flush()
        if ended or self._matcher.stopped:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
        self.pieces.append(piece)
        return piece


class LanguageModel:
    """A loaded model. Made by `load`."""

    def __init__(
        self, folder: Path, config: ModelConfig, engine: Engine, ends: tuple[int, ...], seconds: float
    ) -> None:
        self.folder = folder
        self.config = config
        self.engine = engine
        self.load_seconds = seconds
        self._ends = ends
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, loaded when first used. Raises ModelError where there is none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.folder)
        return self._tokenizer

    def logits(self, token_ids: Any) -> np.ndarray:
        """Float32 logits (batch, tokens, vocab) of token ids (batch, tokens), or of a list of unequal rows.

        Unequal rows are right-padded: behind a row's end the logits are zero. Raises UsageError for ids out of range.
        """
        return self.engine.logits([_ids(row) for row in ([token_ids] if _is_one_prompt(token_ids) else token_ids)])

    def score(self, prompts: Any) -> Score | list[Score]:
        """How likely one prompt is (a `Score`), or each of a list of them (a list of `Score`s, in one ragged batch).

        Args:
            prompts: a string, chat messages or token ids; or a list of these. See `encode` for their token ids.

        Returns `logprobs`, float32 natural logarithms of each token's probability given those before it, and `greedy`,
        whether it was the likeliest: arrays (tokens - 1,), from the second token on. Raises UsageError for prompts that
        can't be used.
        """
        if _is_one_prompt(prompts):
            return self.engine.score([self.encode(prompts)])[0]
        return self.engine.score([self.encode(prompt) for prompt in prompts])

    def generate(self, prompts: Any, max_new_tokens: int = 128, stop: str | Sequence[str] = (), **options: Any) -> Any:
        """Continue one prompt (a `Completion`) or a list of them (a list of `Completion`s, in one ragged batch).

        Args:
            prompts: a string, chat messages (`[{"role": "user", "content": "…"}]`) or token ids; or a list of these.
            max_new_tokens: at most so many tokens a row.
            stop: a string or strings that end the text; they may span tokens.
            **options: those of `SamplingParams`, one value or one per prompt, and `stop_token_ids` beside the
                model's own end-of-text tokens, and `ignore_eos` to run past those.

        Raises UsageError for prompts or options that can't be used.
        """
        single = _is_one_prompt(prompts)
        session = _Session(self, [prompts] if single else list(prompts), max_new_tokens, stop, options)
        for _ in session:
            pass
        completions = session.completions()
        return completions[0] if single else completions

    def stream(
        self, prompt: Prompt, max_new_tokens: int = 128, stop: str | Sequence[str] = (), **options: Any
    ) -> Iterator[str]:
        """As `generate` for one prompt, but yield the text as it comes, never half a character."""
        yield from (piece for _, piece in self.session([prompt], max_new_tokens, stop, **options) if piece)

    def session(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 128, stop: str | Sequence[str] = (), **options: Any
    ) -> "_Session":
        """The iterator under `generate` and `stream`: (row, text) pieces, then `completions()` with statistics."""
        return _Session(self, list(prompts), max_new_tokens, stop, options)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt of any kind."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if _is_text(prompt):
            return self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        return _ids(prompt)


class _Session:
    """One call of `generate`: an iterator of (row, piece of text) that then knows completions and statistics."""

    def __init__(
        self, model: LanguageModel, prompts: list[Prompt], limit: int, stop: str | Sequence[str], options: dict
    ) -> None:
        self._model, self._limit = model, limit
        self._prompts = [model.encode(prompt) for prompt in prompts]
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise UsageError(f"stop is {stop!r}: expected strings that are not empty")
        ends = () if options.pop("ignore_eos", False) else model._ends
        stop_ids = frozenset(ends) | frozenset(
            _ids(options.pop("stop_token_ids", ()), "stop_token_ids: a list of token ids")
        )
        self._sampling = per_row(len(prompts), **options)
        needs_text = bool(stops) or any(map(_is_text, prompts))
        tokenizer = model.tokenizer if needs_text or has_tokenizer(model.folder) else None
        self._rows = [_Row(tokenizer, stop_ids, stops) for _ in prompts]
        self._compiled_before = self._compiled_first = len(model.engine.compiled)
        self._start = self._first = self._end = 0.0
        self._steps = 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        self._start = time.perf_counter()
        with closing(self._model.engine.generate(self._prompts, self._sampling, self._limit)) as blocks:
            done = 0
            for block in blocks:
                self._end = time.perf_counter()
                if not self._first:
                    self._first, self._compiled_first = self._end, len(self._model.engine.compiled)
                for column in block.T:
                    done += 1
                    for row, token in enumerate(column.tolist()):
                        yield row, self._rows[row].push(token, last=done == self._limit)
                self._steps = done
                if all(row.finish_reason for row in self._rows):
                    return

    def completions(self) -> list[Completion]:
        """One per prompt, once the iterator has ended."""
        stats = self._statistics()
        return [Completion("".join(row.pieces), row.token_ids, row.finish_reason, stats) for row in self._rows]

    def _statistics(self) -> Statistics:
        engine = self._model.engine
        seconds = [step.seconds for step in engine.compiled]
        before = sum(seconds[self._compiled_before : self._compiled_first])
        after = sum(seconds[self._compiled_first :])  # a text that grew into its next cache
        new = sum(len(row.token_ids) for row in self._rows)
        later, decoding = new - len(self._rows), self._end - self._first - after
        longest = [len(prompt) + len(row.token_ids) for prompt, row in zip(self._prompts, self._rows, strict=True)]
        step_bytes = engine.step_bytes(sum(longest))
        steps = self._steps - 1
        return Statistics(
            load_seconds=self._model.load_seconds,
            compile_seconds=before + after,
            first_token_seconds=self._first - self._start - before,
            total_seconds=self._end - self._start,
            prompt_tokens=sum(map(len, self._prompts)),
            new_tokens=new,
            decode_tokens_per_second=later / decoding if later > 0 and decoding > 0 else 0.0,
            bytes_per_step=step_bytes,
            bandwidth=step_bytes * steps / decoding if steps > 0 and decoding > 0 else 0.0,
            peak_bytes=peak_bytes(),
        )


def load(
    model: str | os.PathLike[str] | Checkpoint,
    dtype: Any = None,
    backend: str = "auto",
    progress: bool | None = None,
    steps_per_dispatch: int | None = None,
    buckets: str | None = None,
    max_length: int | None = None,
    artifacts: str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """Load a model, dense or low-rank.

    Args:
        model: a registry name (`qwen3-4b`), a Hub id (`Qwen/Qwen3-4B`), a folder or an opened `Checkpoint`.
        dtype: of weights and activations: "float32", "bfloat16", "float16" or a dtype. Default: bfloat16 on
            accelerators, float32 on CPU, where the others are many times slower.
        backend: who multiplies: "xla"; "neuron", the kernels for Trainium; "neuron-emulated", these kernels in NumPy,
            thousands of times slower; "gpu", one kernel for all layers of a step of up to sixteen rows, on Hopper GPUs
            with jax 0.11 or later, XLA for the rest; or "auto": "neuron" or, for bfloat16, "gpu" where they can be had,
            else "xla".
        progress: a progress bar on stderr; by default where stderr is a terminal.
        steps_per_dispatch: tokens decoded per call of the device; default 2 on CPU, 8 elsewhere.
        buckets: the lengths that steps are compiled for: "auto", "off", "128,1024" or "PROMPTS/CACHES"
            (`jaxsvd.buckets.buckets`); default: the artefact's, else "auto".
        max_length: the tokens of the longest text, its prompt included; default: the artefact's, else the model's.
        artifacts: a folder of `compile_ahead`, whose steps are taken instead of compiling. Where it holds no finished
            artefact, a warning says so and steps are compiled when they are needed.

    Raises ModelError for a model that can't be had or is broken, UsageError for options that can't be used, among them
    an artefact of another model or out of date, JaxsvdError for a kernel that does not give what XLA gives.
    """
    start = time.perf_counter()
    chosen = dtype_of(dtype)
    kernels.choose(backend)  # or what it refuses would be told only when the model is there
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(hub.resolve(model))
    kernel = backend_of(checkpoint, backend, chosen)
    folder = checkpoint.folder
    ends = end_of_text_ids(folder, checkpoint.raw)
    held = None if artifacts is None else artefacts.find(artifacts)
    if steps_per_dispatch is None:
        steps_per_dispatch = held.steps_per_dispatch if held else default_steps()
    if held and buckets is None and max_length is None:
        lengths = held.buckets
    else:
        lengths = lengths_of(checkpoint.config, chosen, buckets, max_length)
    if held:
        held.check(artefacts.identity(checkpoint, chosen, kernel, lengths, steps_per_dispatch))
    use_compilation_cache()
    name, total = f"loading {folder.name}", checkpoint.files.nbytes
    with bar(name, total, "B", progress, unit_scale=True, leave=False) as shown:
        built = checkpoint.load(kernel, chosen, shown.update)
    try:
        check(built)
    except Exception as error:  # whatever compiling a kernel ends with, where nobody has asked for it
        if backend != "auto":
            raise
        logger.warning("XLA decodes, not the kernel for all layers, which failed: %s", error)
        return load(checkpoint, dtype, "xla", progress, steps_per_dispatch, buckets, max_length)
    engine = Engine(built, lengths, steps_per_dispatch, held)
    jax.block_until_ready(engine.leaves)
    return LanguageModel(folder, checkpoint.config, engine, ends, time.perf_counter() - start)


def compile_ahead(
    model: str | os.PathLike[str] | Checkpoint,
    artifacts: str | os.PathLike[str],
    dtype: Any = None,
    backend: str = "auto",
    steps_per_dispatch: int | None = None,
    buckets: str | None = None,
    max_length: int | None = None,
    batch_size: int = 1,
    modes: Sequence[str] = ("greedy", "random"),
    force: bool = False,
) -> Artifact:
    """Compile all that `generate` can run, for `load` to take; reads no weights.

    Args:
        model, dtype, backend, steps_per_dispatch, buckets, max_length: as in `load`.
        artifacts: the folder that will hold the artefact. What an interrupted call has compiled is used again.
        batch_size: the number of prompts that it will serve at a time.
        modes: how tokens are chosen: "greedy"; "random", by temperature, greedy rows among them; and "penalties", both
            with repetition and presence penalties.
        force: replace an artefact that is there.

    Raises as `load`, UsageError also for a folder that can't be used, JaxsvdError where the platform can't write what
    it compiles.
    """
    folder = Path(artifacts).expanduser().absolute()
    artefacts.check_artifact_target(folder, force)
    chosen = dtype_of(dtype)
    if kernels.choose(backend).name == "neuron-emulated":
        raise UsageError("the backend neuron-emulated runs in Python: it can't be compiled ahead; take another backend")
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(hub.resolve(model))
    kernel = backend_of(checkpoint, backend, chosen)
    lengths = lengths_of(checkpoint.config, chosen, buckets, max_length)
    steps = default_steps() if steps_per_dispatch is None else steps_per_dispatch
    engine = Engine(checkpoint.describe(kernel, chosen), lengths, steps)
    said = artefacts.identity(checkpoint, chosen, kernel, lengths, steps)
    return artefacts.write(engine, folder, said, batch_size, modes, force)


def load_and_generate(model: str | os.PathLike[str], prompt: Prompt, **options: Any) -> str:
    """Load a model and continue one prompt: the text. `options` are those of `load` and of `generate`."""
    names = set(inspect.signature(load).parameters) - {"model"}
    loading = {name: options.pop(name) for name in names if name in options}
    return load(model, **loading).generate(prompt, **options).text


def use_compilation_cache() -> None:
    """Keep compiled steps on disk, unless the user has chosen a place with JAX's own setting."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(hub.cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def backend_of(checkpoint: Checkpoint, backend: str, dtype: Any) -> kernels.Backend:
    """`kernels.choose` for a model: where a kernel for all layers can't run it, "auto" leaves it to XLA.

    XLA could run it as that backend lays it out, too, but more slowly.
    """
    chosen = kernels.choose(backend, dtype=dtype)
    if backend == "auto" and chosen.fused is not None:
        obstacle = checkpoint.describe(chosen, dtype).obstacle(1, CAPACITY)
        if obstacle is not None:
            logger.warning("XLA decodes, not the kernel for all layers: %s", obstacle)
            return kernels.choose("xla")
    return chosen


def default_steps() -> int:
    """Tokens decoded per call of the device, where nobody says otherwise: 2 on CPU, 8 elsewhere."""
    return 2 if jax.default_backend() == "cpu" else 8


def dtype_of(dtype: Any) -> Any:
    """The dtype that `load` is asked for, by default that of the platform. Raises UsageError for any other one."""
    if dtype is None:
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise UsageError(f"there is no dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _is_text(prompt: Prompt) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))


def _ids(tokens: Any, what: str = "a prompt: a string, chat messages or a list of token ids") -> list[int]:
    try:
        array = np.asarray(tokens)
    except ValueError:  # rows of unequal length
        array = np.empty((), object)
    if array.size == 0:
        return []
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(f"found {str(tokens)[:60]!r}, expected {what}")
    return array.tolist()


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, str) or getattr(prompts, "ndim", None) == 1:
        return True
    if not hasattr(prompts, "__len__") or isinstance(prompts, dict):
        raise UsageError("prompts must be a string, chat messages or token ids, or a list of these")
    return len(prompts) > 0 and isinstance(prompts[0], dict | int | float | np.number)


def peak_bytes() -> int:
    """The most memory that was in use on the first device, on CPU by the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get("peak_bytes_in_use") or kibibytes * 1024
