"""Logit matching, token by token: the rules of torch_neuronx's `logit_validation`, which SVD-Flash's users know.

Two vectors of logits match where, up to a constant shift, the greatest of the expected ones are met within tolerances,
and where a token other than the expected one is the likeliest, it is a near-tie. The comparison is the strict one of
the newer builds: older ones round an error to the digits of its bound first.
"""

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsvd.errors import UsageError


class Tolerance(NamedTuple):
    """What the `k` greatest expected logits may differ by (None: all of them).

    An error passes up to `rtol`: it is (|actual - expected| - `atol`) / max |expected|, the maximum over the same k.
    """

    k: int | None
    atol: float
    rtol: float

    @property
    def name(self) -> str:
        """What people call k."""
        return "all" if self.k is None else str(self.k)


# torch_neuronx.testing.validation.DEFAULT_TOLERANCE_MAP and DEFAULT_DIVERGENCE_DIFFERENCE_TOLERANCE
TOLERANCES = (
    Tolerance(5, 1e-5, 0.01),
    Tolerance(50, 1e-5, 0.02),
    Tolerance(1000, 1e-5, 0.03),
    Tolerance(None, 1e-5, 0.05),
)
DIVERGENCE_TOLERANCE = 0.001


class TokenMatch(NamedTuple):
    """How one token's logits compare.

    `expected` and `actual` are the likeliest tokens, `gap` is by how much the actual logits prefer the latter; `errors`
    are those of each tolerance, 0 at least, and `worst` the tokens that have them; `shift` was subtracted.
    """

    expected: int
    actual: int
    gap: float
    shift: float
    errors: tuple[float, ...]
    worst: tuple[int, ...]


def compare(expected: np.ndarray, actual: np.ndarray, tolerances: Sequence[Tolerance]) -> TokenMatch:
    """Compare the logits (vocab,) of one token. A token that is -inf on either side is left out.

    Where that is the expected one, though, the gap to it is infinite: upstream forgets it.
    """
    kept = np.flatnonzero(~(np.isneginf(expected) | np.isneginf(actual)))
    e, a = expected[kept].astype(np.float64), actual[kept].astype(np.float64)
    shift = _shift(e, a)
    errors, worst = [], []
    for tolerance in tolerances:
        top = _top(e, tolerance.k)
        found = _errors(e[top], a[top] - shift, tolerance.atol)
        at = int(found.argmax()) if found.size else 0
        errors.append(float(found[at]) if found.size else math.inf)  # nothing is left that could match
        worst.append(int(kept[top[at]]) if found.size else int(expected.argmax()))
    likeliest = int(expected.argmax())
    ours = int(kept[a.argmax()]) if kept.size else likeliest
    gap = 0.0 if likeliest == ours else float(actual[ours]) - float(actual[likeliest])  # the shift is in both
    return TokenMatch(likeliest, ours, gap, shift, tuple(errors), tuple(worst))


def _shift(expected: np.ndarray, actual: np.ndarray) -> float:
    """b of the least squares of `actual = a·expected + b`: only b is forgiven, not the scale a."""
    if not expected.size:
        return 0.0
    deviations = expected - expected.mean()
    spread = float(deviations @ deviations)
    scale = float(deviations @ (actual - actual.mean())) / spread if spread else 1.0
    return float((actual - scale * expected).mean())


def _top(values: np.ndarray, k: int | None) -> np.ndarray:
    """The indices of the k greatest values, of all of them where there are no more."""
    if k is None or k >= values.size:
        return np.arange(values.size)
    return np.argpartition(values, values.size - k)[values.size - k :]


def _errors(expected: np.ndarray, actual: np.ndarray, atol: float) -> np.ndarray:
    over = np.maximum(np.abs(actual - expected) - atol, 0)
    largest = np.abs(expected).max(initial=0)
    return over / largest if largest else np.where(over > 0, math.inf, 0)


class Failure(NamedTuple):
    """A token that does not match.

    `position` counts the new tokens of `prompt` from 0; `rule` is the k of a tolerance, or "divergence" where another
    token is the likeliest by a `error` of at least `bound`; `token` is the vocabulary entry at fault.
    """

    prompt: int
    position: int
    rule: str
    token: int
    error: float
    bound: float


class Matching(NamedTuple):
    """All tokens of all prompts, `tokens[prompt][position]`, and what they were compared by.

    `restarts` are the positions from which the expected text was forced on the model after another token had been the
    likeliest in some row: the index of the divergence + 1.
    """

    tokens: list[list[TokenMatch]]
    tolerances: tuple[Tolerance, ...]
    divergence: float
    restarts: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Whether every token matches."""
        return next(self.failures(), None) is None

    def failures(self) -> Iterator[Failure]:
        """Every rule that a token breaks, in the order of the text, then of the prompts and of the rules."""
        for position, column in enumerate(zip(*self.tokens, strict=True)):
            for prompt, token in enumerate(column):
                if token.expected != token.actual and not token.gap < self.divergence:
                    yield Failure(prompt, position, "divergence", token.actual, token.gap, self.divergence)
                for rule, error, worst in zip(self.tolerances, token.errors, token.worst, strict=True):
                    if error > rule.rtol:
                        yield Failure(prompt, position, rule.name, worst, error, rule.rtol)


# What runs the model under test: (prompts, count, choose) as `Engine.follow` takes them.
Follow = Callable[[Sequence[Sequence[int]], int, Callable[[int, np.ndarray], np.ndarray]], Iterator[np.ndarray]]


def match(
    follow: Follow,
    prompts: Sequence[Sequence[int]],
    expected: np.ndarray,
    tolerances: Sequence[Tolerance] = TOLERANCES,
    divergence: float = DIVERGENCE_TOLERANCE,
    progress: Callable[[int], object] = lambda count: None,
) -> Matching:
    """Compare a model with expected logits, float32 (batch, tokens, vocab), of the greedy text behind each prompt.

    The model goes on with its own tokens up to and with the first that is not the expected one in some row; from there
    the expected text is forced on it through its cache, which, unlike prompting anew, has no limit of length.
    """
    text = expected.argmax(axis=-1).astype(np.int32)
    tokens: list[list[TokenMatch]] = [[] for _ in prompts]
    # As long as they agree, the model's own tokens are the expected ones, so these can be given at every step.
    for i, logits in enumerate(follow(prompts, text.shape[1], lambda i, _: text[:, i])):
        for row, theirs, ours in zip(tokens, expected[:, i], logits, strict=True):
            row.append(compare(theirs, ours, tolerances))
        progress(1)
    diverged = [any(token.expected != token.actual for token in column) for column in zip(*tokens, strict=True)]
    restarts = tuple(i + 1 for i, other in enumerate(diverged[:-1]) if other)
    return Matching(tokens, tuple(tolerances), divergence, restarts)


def tolerance_of(text: str) -> Tolerance:
    """The tolerance that "K:ATOL:RTOL" says. Raises UsageError for other texts."""
    parts = text.split(":")
    if len(parts) != 3:
        raise UsageError(f"the tolerance {text!r} can't be read: expected K:ATOL:RTOL, such as 5:1e-5:0.01")
    try:
        return _tolerance(None if parts[0] == "all" else int(parts[0]), float(parts[1]), float(parts[2]))
    except ValueError:
        raise _unusable(text) from None


def tolerances_of_map(text: str) -> list[Tolerance]:
    """The tolerances of NxD Inference's literal, such as "{5: (1e-5, 0.02), None: (1e-5, 0.05)}".

    It is parsed as a literal and never evaluated. Raises UsageError for other texts.
    """
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, Mapping):
        raise UsageError(
            f"the tolerance map {text[:60]!r} can't be read: expected a literal such as '{{5: (1e-5, 0.02)}}', "
            "with K: (ATOL, RTOL) and None as the K of all logits"
        )
    return [_of_item(k, pair) for k, pair in value.items()]


def _of_item(k: Any, pair: Any) -> Tolerance:
    shown = f"{k!r}: {pair!r}"
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_is_number, pair)):
        raise _unusable(shown)
    if k not in (None, "all") and (not isinstance(k, int) or isinstance(k, bool)):
        raise _unusable(shown)
    try:
        return _tolerance(None if k == "all" else k, *map(float, pair))
    except (ValueError, OverflowError):
        raise _unusable(shown) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tolerance(k: int | None, atol: float, rtol: float) -> Tolerance:
    if (k is not None and k < 1) or not (0 <= atol < math.inf and 0 <= rtol < math.inf):
        raise ValueError
    return Tolerance(k, atol, rtol)


def _unusable(text: str) -> UsageError:
    return UsageError(
        f"the tolerance {text[:60]!r} can't be used: expected a K of at least 1, or all, "
        "and finite numbers of at least 0"
    )


def checked(tolerances: Sequence[Tolerance]) -> tuple[Tolerance, ...]:
    """The tolerances by ascending k, all logits last. Raises UsageError where there is none, or a k has two."""
    names = [tolerance.name for tolerance in tolerances]
    if not names:
        raise UsageError("there is no tolerance: give at least one K:ATOL:RTOL")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"the tolerance of k {twice} is given twice: give each k once")
    return tuple(sorted(tolerances, key=lambda tolerance: tolerance.k or math.inf))
