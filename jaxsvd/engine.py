"""The engine: compiled prefill and decode over a model that is a pure tree of arrays. It knows token ids only.

Every step is compiled for its static shapes before it runs, and kept, or taken from an artefact (`jaxsvd.artifacts`);
nothing is ever compiled twice or behind the caller's back (`Engine.compiled` lists it all). Weights go in as flat
leaves, which costs 1 ms a call where `nnx.jit` costs 48.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxsvd.attention import has_flash
from jaxsvd.buckets import CHUNK, CHUNK_WITH_FLASH, Buckets, buckets
from jaxsvd.cache import KVCache
from jaxsvd.config import ModelConfig
from jaxsvd.errors import JaxsvdError, UsageError
from jaxsvd.models.llama import Llama
from jaxsvd.sampling import NOT_FINITE, PROMPT, Mode, Sampler, SamplingParams, mode_of, sampler_of
from jaxsvd.steps import Call, Output, Steps

logger = logging.getLogger("jaxsvd")


class Compiled(NamedTuple):
    """One compiled step: what it is, and what compiling cost."""

    name: str
    seconds: float


class Held(Protocol):
    """Steps that were compiled ahead, for one size of batch and some modes of sampling: `jaxsvd.artifacts`."""

    def mode(self, batch: int, needed: Mode) -> Mode:
        """The least mode held that does what is needed. Raises UsageError where it, or a batch of that size, is not."""
        ...

    def load(self, call: Call) -> Callable[..., Any] | None:
        """What runs the call's step, on its arguments or others of these shapes; None where it is not held."""
        ...


class Score(NamedTuple):
    """How likely a prompt was, from its second token on: two arrays (tokens - 1,).

    `logprobs` float32: the natural logarithm of each token's probability given those before it. `greedy` bool: whether
    no other token was likelier.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


class Engine(Steps):
    """Runs one model.

    Args:
        model: its arrays on device, or `jax.ShapeDtypeStruct`s, for lowering only.
        lengths: those that steps are compiled for: `Buckets`, or a rule of `jaxsvd.buckets.buckets`.
        steps_per_dispatch: tokens decoded per call of the device. More hide the host; fewer stream more smoothly and
            waste less behind the end of a text.
        held: steps that are compiled already.
    """

    def __init__(
        self,
        model: Llama,
        lengths: Buckets | str = "auto",
        steps_per_dispatch: int = 8,
        held: Held | None = None,
    ) -> None:
        if steps_per_dispatch < 1:
            raise UsageError(f"steps_per_dispatch is {steps_per_dispatch}: expected at least 1")
        super().__init__(model)
        if isinstance(lengths, str):
            lengths = lengths_of(self.config, self.dtype, lengths)
        self.buckets = lengths
        self.steps_per_dispatch = steps_per_dispatch
        self.held = held
        self.compiled: list[Compiled] = []
        self._steps: dict[tuple, Callable] = {}
        self._any_cache = KVCache([0] * self.config.num_layers, [0] * self.config.num_layers, 0)  # type: ignore[arg-type]

    def logits(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits of every token of every prompt, float32 (batch, longest, vocab); zeros behind a shorter row's end."""
        lengths = self._check(prompts, 0)
        result = np.zeros((len(prompts), lengths.max(), self.config.vocab_size), np.float32)
        for start, logits, _ in self._chunks(prompts, lengths, "every"):
            width = min(logits.shape[1], result.shape[1] - start)
            result[:, start : start + width] = np.asarray(logits)[:, :width]
        result[np.arange(result.shape[1]) >= lengths[:, None]] = 0
        if np.isnan(result).any():
            raise _not_finite()
        return result

    def score(self, prompts: Sequence[Sequence[int]]) -> list[Score]:
        """How likely every token of every prompt is, given those before it; nothing for the first.

        A prompt may have one token more than the model has positions: the last is only predicted. Raises UsageError for
        prompts that do not fit the model, JaxsvdError where the model computes something that is not a number.
        """
        lengths = np.maximum(self._check(prompts, -1) - 1, 1)
        inputs = [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)]
        pieces = []
        for start, hidden, _ in self._chunks(inputs, lengths, "hidden"):
            targets = _padded([prompt[start + 1 :][: hidden.shape[1]] for prompt in prompts], hidden.shape[1])
            label = f"scores of {hidden.shape[1]} tokens"
            pieces.append(self._run(Call(label, self.score_tokens, (self.leaves, hidden, targets), gives=(0, 0))))
        logprobs, greedy = (
            np.concatenate(list(map(np.asarray, arrays)), axis=1) for arrays in zip(*pieces, strict=True)
        )
        sizes = [len(prompt) - 1 for prompt in prompts]
        scores = [Score(p[:size], g[:size]) for p, g, size in zip(logprobs, greedy, sizes, strict=True)]
        if not all(np.isfinite(score.logprobs).all() for score in scores):
            raise _not_finite()
        return scores

    def generate(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[SamplingParams], max_new_tokens: int
    ) -> Generator[np.ndarray, None, None]:
        """Yield blocks of new tokens, int32 (batch, n), up to `max_new_tokens` a row in all; the first block is one.

        The caller decides which rows have ended, and stops by closing the iterator. Raises UsageError for prompts that
        do not fit the model, JaxsvdError where the model computes something that is not a number.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
        lengths = self._check(prompts, max_new_tokens)
        mode, sampler = self._mode(rows), sampler_of(rows)
        seen = self._seen(prompts) if mode.penalties else None
        logits, cache = self._begin(prompts, lengths)
        token, seen = self._run(self._first_call(logits, sampler, lengths, seen, mode))
        # The newest token never goes in; what a last block writes behind the others is never looked at.
        filled, most = int(lengths.max()), int(lengths.max()) + max_new_tokens - 1
        # One block is always under way while the caller looks at the one before it.
        block, width, left = token, 1, max_new_tokens - 1
        while block is not None:
            ahead, steps = None, self.steps_per_dispatch
            if left > 0:
                filled = min(filled + steps, most)
                cache = self._with_room(cache, filled)
                ahead, cache, token, seen = self._run(self._decode_call(cache, token, seen, sampler, mode))
            # Slicing on the host: on the device it would compile, once for each shape.
            yield _checked(np.asarray(block).reshape(len(prompts), -1)[:, :width])
            block, width, left = ahead, min(steps, left), left - steps

    def follow(
        self, prompts: Sequence[Sequence[int]], count: int, choose: Callable[[int, np.ndarray], np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Yield the float32 logits (batch, vocab) that each of `count` tokens behind the prompts is chosen from.

        `choose(i, logits)` chooses the i-th of every row, int32 (batch,): the likeliest, or that of a text which is
        forced on the model. Decodes a token at a time. Raises as `generate` does.
        """
        if count < 1:
            raise UsageError(f"the number of tokens is {count}: expected at least 1")
        lengths = self._check(prompts, count)
        logits, cache = self._begin(prompts, lengths)
        for i in range(count):
            found = np.asarray(logits)
            if not np.isfinite(found.max(axis=-1)).all():  # a NaN is the maximum of its row
                raise _not_finite()
            if i + 1 < count:
                cache = self._with_room(cache, int(lengths.max()) + i + 1)
                label = f"logits of one decoded token, cache {cache.capacity}"
                args = (self.leaves, cache, np.asarray(choose(i, found), np.int32))
                logits, cache = self._run(Call(label, self.decode_logits, args, (1,), gives=(0, cache)))
            yield found

    def step_bytes(self, cached: int) -> int:
        """The bytes that a decode step must read: the weights, and keys and values of `cached` tokens of all rows.

        Of an embedding that is not also the head, a step reads a row a token, which is not counted.
        """
        config = self.config
        table = 0 if config.tied else config.vocab_size * config.hidden_size * self.dtype.itemsize
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize
        return sum(leaf.nbytes for leaf in self.leaves) - table + cached * per_token

    def calls(self, batch: int, modes: Sequence[Mode]) -> Iterator[Call]:
        """Every call that `generate` can make of `batch` prompts in these modes, on shapes instead of arrays."""

        def shaped(*shape: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        def cache_of(capacity: int) -> KVCache:
            return jax.eval_shape(lambda: self.empty_cache(batch, capacity))

        vocab = self.config.vocab_size
        lengths, logits = shaped(batch), shaped(batch, vocab, dtype=jnp.float32)
        sampler = jax.tree.map(
            lambda leaf: shaped(*leaf.shape, dtype=leaf.dtype), sampler_of([SamplingParams()] * batch)
        )
        for bucket in self.buckets.prefill:
            yield self._prefill_call(shaped(batch, bucket), lengths, "last")
        for bucket, capacity in self.buckets.extensions():
            yield self._extend_call(shaped(batch, bucket), lengths, cache_of(capacity), shaped(), "last")
        if self.buckets.extensions():
            yield self._select_call(shaped(batch, 1, dtype=jnp.bool), logits, logits)
        for size, capacity in self.buckets.growths(self.steps_per_dispatch):
            yield self._grow_call(cache_of(size).keys[0], capacity)
        for mode in modes:
            seen = shaped(batch, vocab, dtype=jnp.uint8) if mode.penalties else None
            yield self._first_call(logits, sampler, lengths, seen, mode)
            for capacity in self.buckets.decode:
                yield self._decode_call(cache_of(capacity), shaped(batch), seen, sampler, mode)

    # What `generate` and `calls` have in common: each step with its name, its arguments and what it gives away.

    def _prefill_call(self, tokens: Any, lengths: Any, output: Output) -> Call:
        label = f"prefill of {tokens.shape[1]} tokens"
        args = (self.leaves, tokens, lengths)
        return Call(label, self.prefill, args, static={"output": output}, gives=(0, self._any_cache))

    def _extend_call(self, tokens: Any, lengths: Any, cache: KVCache, start: Any, output: Output) -> Call:
        label = f"extension by {tokens.shape[1]} tokens, cache {cache.capacity}"
        args = (self.leaves, tokens, lengths, cache, start)
        return Call(label, self.extend, args, (3,), {"output": output}, (0, cache))

    def _select_call(self, inside: Any, new: Any, old: Any) -> Call:
        return Call("select", self.select, (inside, new, old))

    def _grow_call(self, buffer: Any, capacity: int) -> Call:
        return Call(f"cache {capacity} of {buffer.shape[1]}", self.grow, (buffer,), static={"capacity": capacity})

    def _first_call(self, logits: Any, sampler: Sampler, lengths: Any, seen: Any, mode: Mode) -> Call:
        return Call("first token", self.first, (logits, sampler, lengths, seen), (3,), {"mode": mode}, (0, seen))

    def _decode_call(self, cache: KVCache, token: Any, seen: Any, sampler: Sampler, mode: Mode) -> Call:
        label = f"decode of {self.steps_per_dispatch} tokens, cache {cache.capacity}"
        static = {"steps": self.steps_per_dispatch, "mode": mode}
        return Call(label, self.decode, (self.leaves, cache, token, seen, sampler), (1, 3), static, (0, cache, 0, seen))

    # The way of a prompt.

    def begin(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[jax.Array, KVCache]:
        """What `generate` starts with, for measuring it alone: the prefill of prompts that `new` tokens are to follow.

        Returns the float32 logits (batch, vocab) of each row's last token, and the cache.
        """
        return self._begin(prompts, self._check(prompts, new))

    @property
    def executables(self) -> list[tuple[str, Any]]:
        """Every step that was compiled here, as JAX has it, behind the name of its method, in their order."""
        return [(key[0], step) for key, step in self._steps.items() if isinstance(step, jax.stages.Compiled)]

    def _mode(self, rows: Sequence[SamplingParams]) -> Mode:
        """The least mode that serves all rows, among those that are held where an artefact is used."""
        mode = mode_of(rows)
        return mode if self.held is None else self.held.mode(len(rows), mode)

    def _begin(self, prompts: Sequence[Sequence[int]], lengths: np.ndarray) -> tuple[jax.Array, KVCache]:
        """Prefill: float32 logits (batch, vocab) of each row's last token, and the cache."""
        chunks = self._chunks(prompts, lengths)
        _, logits, cache = next(chunks)
        for start, chunk, cache in chunks:  # noqa: B007 (the last cache is the one that counts)
            logits = self._run(self._select_call((lengths > start)[:, None], chunk, logits))
        return logits, cache

    def _chunks(
        self, prompts: Sequence[Sequence[int]], lengths: np.ndarray, output: Output = "last"
    ) -> Iterator[tuple[int, jax.Array, KVCache]]:
        """Prefill in chunks: the first token of each, its output, and the cache so far."""
        chunk, padded = self.buckets.chunk, _padded(prompts, self.buckets.padded(int(lengths.max())))
        result, cache = self._run(self._prefill_call(padded[:, :chunk], lengths, output))
        yield 0, result, cache
        for start in range(chunk, padded.shape[1], chunk):
            cache = self._with_room(cache, padded.shape[1])
            call = self._extend_call(padded[:, start : start + chunk], lengths, cache, np.int32(start), output)
            result, cache = self._run(call)
            yield start, result, cache

    def _with_room(self, cache: KVCache, tokens: int) -> KVCache:
        """The cache, or a longer one in its place, that holds so many tokens a row."""
        capacity = self.buckets.capacity(max(tokens, cache.capacity))
        if capacity > cache.capacity:
            for buffers in (cache.keys, cache.values):
                for i in range(len(buffers)):
                    buffers[i] = self._run(self._grow_call(buffers[i], capacity))
        return cache

    def _check(self, prompts: Sequence[Sequence[int]], new: int) -> np.ndarray:
        """The lengths of prompts that `new` tokens are to follow; -1 where the last one itself is only predicted."""
        if not prompts:
            raise UsageError("there is no prompt: give at least one")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise UsageError(f"prompt {row} is empty: give at least one token")
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise UsageError(
                    f"prompt {row} has token id {bad}: the model has ids 0 to {self.config.vocab_size - 1}"
                )
            if len(prompt) + new > self.buckets.length:
                room = self.buckets.length - min(new, 0)
                follow, lower = (f" and {new} are to follow", " or lower max_new_tokens") if new > 0 else ("", "")
                narrow = self.buckets.length < self.config.max_positions
                what, wider = ("buckets have", ", or give longer buckets") if narrow else ("model has", "")
                raise UsageError(
                    f"prompt {row} has {len(prompt)} tokens{follow}: the {what} room for {room}; "
                    f"shorten the prompt{lower}{wider}"
                )
        return np.array([len(prompt) for prompt in prompts], np.int32)

    def _seen(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        seen = np.zeros((len(prompts), self.config.vocab_size), np.uint8)
        for row, prompt in zip(seen, prompts, strict=True):
            row[np.asarray(prompt)] = PROMPT
        return seen

    def _run(self, call: Call) -> Any:
        """Run a step, taken from the artefact or compiled once for what is static and the shapes of its arguments."""
        key = call.key
        if key not in self._steps:
            self._steps[key] = (self.held.load(call) if self.held else None) or self.compile(call)
        return self._steps[key](*call.args)

    def compile(self, call: Call) -> jax.stages.Compiled:
        """Compile a step; `compiled` and the log have what it cost."""
        jax.block_until_ready(call.own)  # or the time of compiling would hide that of the step before
        start = time.perf_counter()
        # Nothing unused is dropped: whoever holds the compiled step knows what it takes.
        step = jax.jit(partial(call.step, **call.static), donate_argnums=call.donate, keep_unused=True)
        compiled = step.lower(*call.args).compile()
        self.compiled.append(Compiled(call.label, time.perf_counter() - start))
        logger.info("compiled %s in %.2f s", *self.compiled[-1])
        return compiled


def lengths_of(config: ModelConfig, dtype: Any, rule: str | None, max_length: int | None = None) -> Buckets:
    """The lengths that steps are compiled for here: see `jaxsvd.buckets.buckets`, which raises UsageError."""
    chunk = CHUNK_WITH_FLASH if has_flash(jnp.dtype(dtype), config.head_dim) else CHUNK
    return buckets("auto" if rule is None else rule, config.max_positions, jax.default_backend(), max_length, chunk)


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    padded = np.zeros((len(rows), width), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _checked(tokens: np.ndarray) -> np.ndarray:
    """The tokens, all real. Logits that are not numbers mean broken weights or a dtype that is too small."""
    if (tokens == NOT_FINITE).any():
        raise _not_finite()
    return tokens


def _not_finite() -> JaxsvdError:
    return JaxsvdError(
        "the model's logits are not numbers: the weights are damaged, or too large for this dtype (try float32)"
    )
