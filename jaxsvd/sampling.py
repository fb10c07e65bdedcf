"""Choosing the next token, on device, one set of parameters per row.

The order is that of transformers: penalties, temperature, top-k, top-p, min-p. Nothing is sorted: a radix search finds
the threshold above which lie k tokens, or a probability of p. Sorting 150 000 logits a step is slow everywhere, and
`argmax` and variadic sorts do not compile for Neuron.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsvd.errors import UsageError

PROMPT, GENERATED = 1, 2  # bits of `seen`: where a token has occurred
NOT_FINITE = -1  # the token that stands for logits that are not numbers
_MOST = 1e30  # float32 holds it, and what is computed from it


@dataclass(frozen=True)
class SamplingParams:
    """How a row's tokens are chosen. The defaults are greedy.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token and ignores top_k, top_p, min_p and seed.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability (Holtzman et al. 2020); 1 keeps all.
        min_p: keep tokens with at least this fraction of the likeliest one's probability (Nguyen et al. 2024).
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the text
            (Keskar et al. 2019); 1 is none.
        presence_penalty: subtracted from the logits of tokens in the generated text; 0 is none.
        seed: of the row's random numbers. A row's tokens depend on its own prompt, parameters and seed alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, wanted in (
            ("temperature", 0 <= self.temperature <= _MOST, "a number of at least 0"),
            ("top_k", 0 <= self.top_k < 2**31 and self.top_k == int(self.top_k), "an integer of at least 0 (0: off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= _MOST, "a number above 0 (1: off)"),
            ("presence_penalty", abs(self.presence_penalty) <= _MOST, "a finite number"),
            ("seed", 0 <= self.seed < 2**64 and self.seed == int(self.seed), "an integer from 0 to 2**64 - 1"),
        ):
            if not fine:
                raise UsageError(f"{name} is {getattr(self, name)}: expected {wanted}")


def per_row(batch: int, **options: float | Sequence[float]) -> list[SamplingParams]:
    """One SamplingParams per row, from options that are one value for all rows or a sequence with one each."""
    known = [field.name for field in fields(SamplingParams)]
    rows: list[dict[str, Any]] = [{} for _ in range(batch)]
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"there is no option {name!r}: sampling has {', '.join(known)}")
        values = [value] * batch if np.ndim(value) == 0 else list(value)  # type: ignore[arg-type]
        if len(values) != batch:
            raise UsageError(f"{name} has {len(values)} values for {batch} prompts: give one, or one per prompt")
        for row, item in zip(rows, values, strict=True):
            row[name] = item
    try:
        return [SamplingParams(**row) for row in rows]
    except TypeError:
        raise UsageError(f"sampling options must be numbers: found {options}") from None


class Mode(NamedTuple):
    """What the compiled graph must be able to do; static, so that greedy decoding carries nothing else."""

    random: bool
    penalties: bool


# What each is called. Every mode does what those before it do, only slower.
MODES = {"greedy": Mode(False, False), "random": Mode(True, False), "penalties": Mode(True, True)}


def mode_of(rows: Sequence[SamplingParams]) -> Mode:
    """The least mode that serves all rows."""
    return Mode(
        any(row.temperature > 0 for row in rows),
        any(row.repetition_penalty != 1 or row.presence_penalty != 0 for row in rows),
    )


@jax.tree_util.register_dataclass
@dataclass
class Sampler:
    """The rows' parameters as arrays (batch,); `keys` are rbg key data, uint32 (batch, 4)."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    keys: jax.Array


def sampler_of(rows: Sequence[SamplingParams]) -> Sampler:
    """Host arrays for `sample`."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    seeds = column("seed", np.uint64)
    low, high = (seeds & 0xFFFFFFFF).astype(np.uint32), (seeds >> np.uint64(32)).astype(np.uint32)
    columns = [column(name, np.float32) for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty")]
    keys = np.stack([low, high, ~low, ~high], axis=1)
    return Sampler(column("temperature", np.float32), column("top_k", np.int32), *columns, keys)  # type: ignore[arg-type]


def sample(
    logits: jax.Array, sampler: Sampler, positions: jax.Array, seen: jax.Array | None, mode: Mode
) -> tuple[jax.Array, jax.Array | None]:
    """Choose each row's next token.

    Args:
        logits: float32 (batch, vocab).
        sampler: the rows' parameters.
        positions: int32 (batch,), where the new token will stand: it selects the random numbers.
        seen: uint8 (batch, vocab), bits PROMPT and GENERATED; None without penalties.
        mode: what to compile.

    Returns:
        int32 (batch,) token ids, NOT_FINITE where a row's logits are not numbers, and `seen` with the new tokens.
    """
    finite = jnp.isfinite(jnp.max(_comparable(logits), axis=-1))
    if mode.penalties and seen is not None:
        logits = _penalise(logits, sampler, seen)
    tokens = first_largest(logits)
    if mode.random:
        drawn = first_largest(_truncate(logits, sampler) + _gumbel(sampler.keys, positions, logits.shape[-1]))
        tokens = jnp.where(sampler.temperature > 0, drawn, tokens)
    if seen is not None:
        new = jnp.arange(logits.shape[-1]) == tokens[:, None]
        seen = jnp.where(new, seen | GENERATED, seen)
    return jnp.where(finite, tokens, NOT_FINITE), seen


def first_largest(scores: jax.Array) -> jax.Array:
    """int32 (batch,), the first index of the largest score: argmax without its variadic reduce."""
    vocab, scores = scores.shape[-1], _comparable(scores)
    best = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, jnp.arange(vocab, dtype=jnp.int32), vocab - 1), axis=-1)


def _comparable(scores: jax.Array) -> jax.Array:
    """Scores with infinity for what is not a number, so that one maximum tells of both.

    All maxima of a greedy step are of this, and hence one.
    """
    return jnp.where(jnp.isnan(scores), jnp.inf, scores)


def _penalise(logits: jax.Array, sampler: Sampler, seen: jax.Array) -> jax.Array:
    repetition = sampler.repetition[:, None]
    logits = jnp.where(seen > 0, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - jnp.where(seen & GENERATED, sampler.presence[:, None], 0)


def _truncate(logits: jax.Array, sampler: Sampler) -> jax.Array:
    """Temperature, then -inf for the tokens that top-k, top-p and min-p leave out."""
    greedy = sampler.temperature == 0
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)  # before dividing, which may overflow
    logits = logits / jnp.where(greedy, 1, sampler.temperature)[:, None]
    vocab = logits.shape[-1]
    keys = _ordered(logits)
    top_k = jnp.where((sampler.top_k > 0) & (sampler.top_k < vocab), sampler.top_k, vocab)
    kept = keys >= _threshold(keys, jnp.ones_like(logits), top_k.astype(jnp.float32))[:, None]
    mass = jnp.where(kept, jnp.exp(logits), 0)
    reach = sampler.top_p * jnp.sum(mass, axis=-1)
    nucleus = keys >= _threshold(keys, mass, reach)[:, None]
    kept &= nucleus | (sampler.top_p >= 1)[:, None]
    kept &= logits >= jnp.log(sampler.min_p)[:, None]
    kept |= logits >= 0  # the likeliest, however small top_p is
    return jnp.where(kept, logits, -jnp.inf)


def _ordered(scores: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 scores do."""
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t for which the mass of `keys >= t` reaches the row's target: a radix search, 4 bits a round."""
    found = jnp.zeros(keys.shape[:1], jnp.uint32)
    for shift in range(28, -1, -4):
        steps = jnp.arange(1, 16, dtype=jnp.uint32) << shift
        above = keys[:, None, :] >= (found[:, None] | steps)[:, :, None]
        reached = jnp.sum(jnp.where(above, mass[:, None, :], 0), axis=-1) >= target[:, None]
        found |= jnp.sum(reached, axis=-1).astype(jnp.uint32) << shift
    return found


def _gumbel(keys: jax.Array, positions: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise (batch, vocab). Rows are drawn apart: under `vmap`, rbg draws all rows from the first one's key."""
    rows = [
        jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key, impl="rbg"), position), (vocab,))
        for key, position in zip(keys, positions, strict=True)
    ]
    return jnp.stack(rows)
