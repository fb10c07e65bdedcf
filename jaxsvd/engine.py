"""The engine: compiled prefill and decode over a model that is a pure tree of arrays. It knows token ids only.

Every step is compiled ahead of time for its static shapes and kept; nothing is ever compiled twice or behind the
caller's back (`Engine.compiled` lists it all). Weights go in as flat leaves, which costs 1 ms a call where `nnx.jit`
costs 48.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxsvd.cache import KVCache, empty_cache
from jaxsvd.errors import JaxsvdError, UsageError
from jaxsvd.models.llama import Llama
from jaxsvd.sampling import NOT_FINITE, PROMPT, Mode, Sampler, SamplingParams, mode_of, sample, sampler_of

logger = logging.getLogger("jaxsvd")

# Prompts are padded to one of these lengths; a longer one goes through the largest in chunks.
PREFILL_BUCKETS = (16, 32, 64, 128, 256, 512)
SMALLEST_CAPACITY = 128

# What a prefill gives: logits of each row's last token, of every token, or no logits but the states under them.
Output = Literal["last", "every", "hidden"]


class Compiled(NamedTuple):
    """One compiled step: what it is, and what compiling cost."""

    name: str
    seconds: float


class Score(NamedTuple):
    """How likely a prompt was, from its second token on: two arrays (tokens - 1,).

    `logprobs` float32: the natural logarithm of each token's probability given those before it. `greedy` bool: whether
    no other token was likelier.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


class Engine:
    """Runs one model.

    Args:
        model: its arrays on device, or `jax.ShapeDtypeStruct`s, for lowering only.
        prefill_buckets: lengths that prompts are padded to, ascending; the largest is the chunk of longer prompts.
        steps_per_dispatch: tokens decoded per call of the device. More hide the host; fewer stream more smoothly and
            waste less behind the end of a text.
    """

    def __init__(
        self, model: Llama, prefill_buckets: Sequence[int] = PREFILL_BUCKETS, steps_per_dispatch: int = 8
    ) -> None:
        if not prefill_buckets or list(prefill_buckets) != sorted(set(prefill_buckets)) or prefill_buckets[0] < 1:
            raise UsageError(f"prefill_buckets is {list(prefill_buckets)}: expected ascending positive lengths")
        if steps_per_dispatch < 1:
            raise UsageError(f"steps_per_dispatch is {steps_per_dispatch}: expected at least 1")
        self.config = model.config
        self.dtype = jnp.dtype(model.embed_tokens.weight.dtype)
        self.prefill_buckets = tuple(prefill_buckets)
        self.steps_per_dispatch = steps_per_dispatch
        self.compiled: list[Compiled] = []
        self._graph, state = nnx.split(model)
        self.leaves, self._tree = jax.tree.flatten(state)
        self._steps: dict[tuple, Any] = {}

    # The steps. Pure functions of the leaves: tests lower them for Neuron as they stand.

    def _model(self, leaves: Sequence[jax.Array]) -> Llama:
        return nnx.merge(self._graph, self._tree.unflatten(leaves))

    @property
    def model(self) -> Llama:
        """The model itself, of the engine's own leaves."""
        return self._model(self.leaves)

    def prefill(
        self,
        leaves: Sequence[jax.Array],
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        output: Output = "last",
    ) -> tuple[jax.Array, KVCache]:
        """Start a cache, just large enough, with prompts (batch, bucket) of `lengths` (batch,).

        Returns float32 logits of each row's last token (batch, vocab) or of "every" one (batch, bucket, vocab), or the
        "hidden" states (batch, bucket, hidden) for `score_tokens`; and the cache.
        """
        batch, bucket = tokens.shape
        cache = empty_cache(self.config, batch, bucket, self.dtype)
        return self._prefill(leaves, tokens, lengths, cache, jnp.int32(0), output)

    def grow(self, cache: KVCache, *, capacity: int) -> KVCache:
        """The cache with room for `capacity` tokens. A step of its own, so that prefill depends on the bucket alone."""

        def pad(buffer: jax.Array) -> jax.Array:
            return jnp.pad(buffer, ((0, 0), (0, capacity - buffer.shape[1]), (0, 0)))

        return KVCache([pad(k) for k in cache.keys], [pad(v) for v in cache.values], cache.lengths)

    def extend(
        self,
        leaves: Sequence[jax.Array],
        tokens: jax.Array,
        lengths: jax.Array,
        cache: KVCache,
        start: jax.Array,
        *,
        output: Output = "last",
    ) -> tuple[jax.Array, KVCache]:
        """Add the chunk (batch, bucket) that begins at token `start` () of prompts of `lengths` to a cache.

        Returns as `prefill`; rows whose last token lies in another chunk get logits without meaning.
        """
        return self._prefill(leaves, tokens, lengths, cache, start, output)

    def _prefill(
        self,
        leaves: Sequence[jax.Array],
        tokens: jax.Array,
        lengths: jax.Array,
        cache: KVCache,
        start: jax.Array,
        output: Output,
    ) -> tuple[jax.Array, KVCache]:
        model = self._model(leaves)
        hidden, cache = model(tokens, cache, start)
        cache = KVCache(cache.keys, cache.values, lengths)
        if output == "hidden":
            return hidden, cache
        if output == "last":
            last = jnp.clip(lengths - 1 - start, 0, tokens.shape[1] - 1)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1, mode="clip")[:, 0]
        return model.logits(hidden), cache

    def score_tokens(
        self, leaves: Sequence[jax.Array], hidden: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """How likely each of `targets` (batch, bucket) is after its "hidden" state (batch, bucket, hidden).

        Returns the logarithm of its probability, float32, and whether its logit is the greatest, both (batch, bucket).
        """
        model = self._model(leaves)

        def row(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, targets = given
            logits = model.logits(hidden)
            target = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
            top = jnp.max(logits, axis=-1)
            total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
            return target - top - jnp.log(total), target == top

        # Row by row: the logits of a whole batch can take more memory than the model.
        return lax.map(row, (hidden, targets))

    def first(
        self, logits: jax.Array, sampler: Sampler, lengths: jax.Array, seen: jax.Array | None, *, mode: Mode
    ) -> tuple[jax.Array, jax.Array | None]:
        """Choose the token that follows the prompt: int32 (batch,), and `seen` with it."""
        return sample(logits, sampler, lengths, seen, mode)

    def decode(
        self,
        leaves: Sequence[jax.Array],
        cache: KVCache,
        token: jax.Array,
        seen: jax.Array | None,
        sampler: Sampler,
        *,
        steps: int,
        mode: Mode,
    ) -> tuple[jax.Array, KVCache, jax.Array, jax.Array | None]:
        """Generate `steps` tokens per row, starting from `token` (batch,), the newest one and not yet in the cache.

        Returns the tokens (batch, steps), the cache, the last token and `seen`.
        """
        model = self._model(leaves)

        def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            cache, token, seen = carry
            logits, cache = _append(model, cache, token)
            token, seen = sample(logits, sampler, cache.lengths, seen, mode)
            return (cache, token, seen), token

        if steps == 1:
            (cache, token, seen), tokens = step((cache, token, seen), None)
            return tokens[:, None], cache, token, seen
        (cache, token, seen), tokens = lax.scan(step, (cache, token, seen), length=steps)
        return tokens.T, cache, token, seen

    def decode_logits(self, leaves: Sequence[jax.Array], cache: KVCache, token: jax.Array) -> tuple[jax.Array, KVCache]:
        """One step of `decode` without its choice: float32 logits (batch, vocab) behind `token`, and the cache."""
        return _append(self._model(leaves), cache, token)

    # What the host does.

    def logits(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits of every token of every prompt, float32 (batch, longest, vocab); zeros behind a shorter row's end."""
        lengths = self._check(prompts, 0)
        result = np.zeros((len(prompts), lengths.max(), self.config.vocab_size), np.float32)
        for start, logits, _ in self._chunks(prompts, lengths, 0, "every"):
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
        for start, hidden, _ in self._chunks(inputs, lengths, 0, "hidden"):
            targets = _padded([prompt[start + 1 :][: hidden.shape[1]] for prompt in prompts], hidden.shape[1])
            label = f"scores of {hidden.shape[1]} tokens"
            pieces.append(self._run(label, self.score_tokens, (self.leaves, hidden, targets)))
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
        mode, sampler = mode_of(rows), sampler_of(rows)
        seen = self._seen(prompts) if mode.penalties else None
        logits, cache = self._begin(prompts, lengths, max_new_tokens)
        token, seen = self._run("first token", self.first, (logits, sampler, lengths, seen), donate=(3,), mode=mode)
        # One block is always under way while the caller looks at the one before it.
        block, width, left = token, 1, max_new_tokens - 1
        while block is not None:
            ahead, steps = None, self.steps_per_dispatch
            if left > 0:
                label = f"decode of {steps} tokens, cache {cache.capacity}"
                args = (self.leaves, cache, token, seen, sampler)
                ahead, cache, token, seen = self._run(label, self.decode, args, (1, 3), steps=steps, mode=mode)
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
        logits, cache = self._begin(prompts, self._check(prompts, count), count)
        for i in range(count):
            found = np.asarray(logits)
            if not np.isfinite(found.max(axis=-1)).all():  # a NaN is the maximum of its row
                raise _not_finite()
            if i + 1 < count:
                label = f"logits of one decoded token, cache {cache.capacity}"
                args = (self.leaves, cache, np.asarray(choose(i, found), np.int32))
                logits, cache = self._run(label, self.decode_logits, args, (1,))
            yield found

    def step_bytes(self, cached: int) -> int:
        """The bytes that a decode step must read: the weights, and keys and values of `cached` tokens of all rows.

        Of an embedding that is not also the head, a step reads a row a token, which is not counted.
        """
        config = self.config
        table = 0 if config.tied else config.vocab_size * config.hidden_size * self.dtype.itemsize
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize
        return sum(leaf.nbytes for leaf in self.leaves) - table + cached * per_token

    def capacity(self, tokens: int) -> int:
        """The cache that `tokens` a row need: a power of two, so that few graphs serve all lengths."""
        capacity = SMALLEST_CAPACITY
        while capacity < tokens:
            capacity *= 2
        return capacity

    def begin(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[jax.Array, KVCache]:
        """What `generate` starts with, for measuring it alone: the prefill of prompts that `new` tokens are to follow.

        Returns the float32 logits (batch, vocab) of each row's last token, and the cache.
        """
        return self._begin(prompts, self._check(prompts, new), new)

    @property
    def executables(self) -> list[tuple[str, Any]]:
        """Every compiled step, as JAX has it, behind the name of its method; in the order of `compiled`."""
        return [(key[0], step) for key, step in self._steps.items()]

    def _begin(self, prompts: Sequence[Sequence[int]], lengths: np.ndarray, new: int) -> tuple[jax.Array, KVCache]:
        """Prefill: float32 logits (batch, vocab) of each row's last token, and a cache with room for `new` more."""
        chunks = self._chunks(prompts, lengths, new)
        _, logits, cache = next(chunks)
        for start, chunk, cache in chunks:  # noqa: B007 (the last cache is the one that counts)
            logits = self._run("select", _where, ((lengths > start)[:, None], chunk, logits))
        return logits, cache

    def _chunks(
        self, prompts: Sequence[Sequence[int]], lengths: np.ndarray, new: int, output: Output = "last"
    ) -> Iterator[tuple[int, jax.Array, KVCache]]:
        """Prefill in chunks: the first token of each, its output, and the cache so far."""
        chunk = self.prefill_buckets[-1]
        longest = int(lengths.max())
        last = next(size for size in self.prefill_buckets if size >= (longest - 1) % chunk + 1)
        padded = _padded(prompts, (longest - 1) // chunk * chunk + last)
        # The last block of a decode may run past max_new_tokens.
        capacity = self.capacity(max(padded.shape[1], longest + new + self.steps_per_dispatch if new else 0))
        cache = None
        for start in range(0, padded.shape[1], chunk):
            piece = padded[:, start : start + chunk]
            if cache is None:
                label = f"prefill of {piece.shape[1]} tokens"
                result, cache = self._run(label, self.prefill, (self.leaves, piece, lengths), output=output)
                if new or padded.shape[1] > chunk:
                    cache = self._run(f"cache {capacity}", self.grow, (cache,), capacity=capacity)
            else:
                label = f"extension by {piece.shape[1]} tokens, cache {capacity}"
                args = (self.leaves, piece, lengths, cache, np.int32(start))
                result, cache = self._run(label, self.extend, args, donate=(3,), output=output)
            yield start, result, cache

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
            if len(prompt) + new > self.config.max_positions:
                room = self.config.max_positions - min(new, 0)
                follow, lower = (f" and {new} are to follow", " or lower max_new_tokens") if new > 0 else ("", "")
                raise UsageError(
                    f"prompt {row} has {len(prompt)} tokens{follow}: the model has room for {room}; "
                    f"shorten the prompt{lower}"
                )
        return np.array([len(prompt) for prompt in prompts], np.int32)

    def _seen(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        seen = np.zeros((len(prompts), self.config.vocab_size), np.uint8)
        for row, prompt in zip(seen, prompts, strict=True):
            row[np.asarray(prompt)] = PROMPT
        return seen

    def _run(self, label: str, step: Any, args: tuple, donate: tuple[int, ...] = (), **static: Any) -> Any:
        """Run a step, compiled once for its static arguments and the shapes of the others."""
        own = args[1:] if args[0] is self.leaves else args
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(own))
        key = (step.__name__, shapes, tuple(static.items()))
        if key not in self._steps:
            jax.block_until_ready(own)  # or the time of compiling would hide that of the step before
            start = time.perf_counter()
            self._steps[key] = jax.jit(partial(step, **static), donate_argnums=donate).lower(*args).compile()
            self.compiled.append(Compiled(label, time.perf_counter() - start))
            logger.info("compiled %s in %.2f s", *self.compiled[-1])
        return self._steps[key](*args)


def _append(model: Llama, cache: KVCache, token: jax.Array) -> tuple[jax.Array, KVCache]:
    """Put `token` (batch,), the newest of each row, into the cache; the float32 logits (batch, vocab) behind it."""
    hidden, cache = model(token[:, None], cache, cache.lengths)
    return model.logits(hidden[:, 0]), KVCache(cache.keys, cache.values, cache.lengths + 1)


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    padded = np.zeros((len(rows), width), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _where(inside: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(inside, new, old)


def _checked(tokens: np.ndarray) -> np.ndarray:
    """The tokens, all real. Logits that are not numbers mean broken weights or a dtype that is too small."""
    if (tokens == NOT_FINITE).any():
        raise _not_finite()
    return tokens


def _not_finite() -> JaxsvdError:
    return JaxsvdError(
        "the model's logits are not numbers: the weights are damaged, or too large for this dtype (try float32)"
    )
