"""Which lengths are compiled: the one rule for the lengths of padded prompts and of caches.

A compiled step has one shape. A *prefill bucket* is a length that prompts are padded to; a *decode bucket* is the
length of the cache that a step attends to, so that a short text never reads a long cache. The smallest bucket that
fits is taken, and equal lengths fit: NxD Inference wants a bucket longer than the text, and so runs a prompt of 128
tokens in its bucket of 256. Its `generate_buckets` also leaves out the power of two that comes just before the longest
text if that is nearer to it than to the next one (128, 256, 640); jaxsvd has them all (128, 256, 512, 640).
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxsvd.errors import UsageError
from jaxsvd.kernels.gpu.shape import TOKENS, whole

SMALLEST = 128  # below it a step costs an accelerator as much: it reads the weights
SMALLEST_PREFILL_ON_CPU = 16  # a CPU pays for every padded token
CHUNK = 512  # the largest prefill bucket of "auto" and "off": longer prompts go through it piece by piece
CHUNK_WITH_FLASH = 2048  # where attention keeps no scores: a GPU multiplies fewer tokens at once more slowly


class Buckets(NamedTuple):
    """Ascending lengths in tokens; `length` is the longest text, its prompt included, that they serve."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    length: int

    @property
    def chunk(self) -> int:
        """The tokens of a prompt that go through the model at once, at most."""
        return self.prefill[-1]

    def padded(self, tokens: int) -> int:
        """The length to which a prompt is padded: whole chunks, then the bucket of what is left."""
        whole = (tokens - 1) // self.chunk * self.chunk
        return whole + smallest(self.prefill, tokens - whole)

    def capacity(self, tokens: int) -> int:
        """The length of the cache that holds so many tokens a row."""
        return smallest(self.decode, tokens)

    # What compiling ahead has to know: all that can happen to a text of at most `length` tokens.

    def extensions(self) -> list[tuple[int, int]]:
        """(bucket, capacity) of every piece but the first of a prompt longer than a chunk."""
        found = set()
        for start in range(self.chunk, self.length, self.chunk):
            for bucket in self.prefill:
                if self.padded(min(start + bucket, self.length)) == start + bucket:
                    capacity = self.capacity(start + bucket)
                    found |= {(bucket, capacity)} | ({(self.chunk, capacity)} if start > self.chunk else set())
        return sorted(found)

    def growths(self, steps: int) -> list[tuple[int, int]]:
        """(capacity, greater capacity) of every cache that becomes a longer one, decoding `steps` tokens at a time."""
        found = {(self.chunk, capacity) for _, capacity in self.extensions() if capacity > self.chunk}
        for size in {*self.prefill, *self.decode}:
            most = self.capacity(max(size, min(size + steps, self.length))) if size < self.decode[-1] else size
            found |= {(size, capacity) for capacity in self.decode if size < capacity <= most}
        return sorted(found)


def smallest(lengths: Sequence[int], tokens: int) -> int:
    """The first of ascending lengths that is not below `tokens`."""
    return next(length for length in lengths if length >= tokens)


def powers_of_two(lowest: int, highest: int) -> tuple[int, ...]:
    """The powers of two from `lowest`, itself one, as far as they are below `highest`; then `highest`."""
    return (*(2**i for i in range(lowest.bit_length() - 1, (highest - 1).bit_length()) if 2**i < highest), highest)


def buckets(rule: str, positions: int, platform: str, max_length: int | None = None, chunk: int = CHUNK) -> Buckets:
    """The buckets of a model with so many `positions`.

    Args:
        rule: "auto", powers of two from 128 (for prompts on a CPU from 16) up to the longest text; "off", one bucket
            for the longest text; or lengths, "128,1024". The first two cut prompts into pieces of `chunk` tokens. A
            rule is for prompts and caches alike; "PROMPTS/CACHES" gives each its own: "off/auto",
            "64,512/1024,4096".
        positions: the tokens that the model can tell apart.
        platform: JAX's name of it.
        max_length: the longest text; default: what the lengths for caches allow, else all positions.
        chunk: the tokens of a prompt that go through the model at once, unless the rule says so.

    Raises UsageError for a rule that can't be used, naming what is wrong.
    """
    parts = str(rule).split("/")
    if len(parts) > 2:
        raise _wrong(rule, "more than one / in it")
    first, last = parts[0].strip(), parts[-1].strip()
    given = None if last in ("auto", "off") else _lengths(rule, last)
    if max_length is not None and given:
        raise UsageError(f"max_length is {max_length} and buckets are {rule!r}: the last bucket is the longest text")
    length = max_length if max_length is not None else min(given[-1], positions) if given else positions
    if not 1 <= length <= positions:
        raise UsageError(f"max_length is {length}: the model has {positions} positions, give 1 to {positions}")
    if first in ("auto", "off"):
        lowest = SMALLEST_PREFILL_ON_CPU if platform == "cpu" else SMALLEST
        chunk = min(length, chunk)
        if platform == "gpu":  # whose kernel wants caches of whole tiles
            chunk = whole(chunk, TOKENS)
        prefill = powers_of_two(lowest, chunk) if first == "auto" else (chunk,)
    else:
        prefill = _lengths(rule, first)
    found = Buckets(prefill, (), length)
    full = found.padded(length)
    if given and given[-1] < full:
        raise UsageError(
            f"buckets are {rule!r}: a prompt of {length} tokens is padded to {full}, "
            f"so the last length for caches must be at least {full}"
        )
    decode = given or (powers_of_two(SMALLEST, full) if last == "auto" else (full,))
    for lengths in (prefill, decode):
        if len(lengths) > 1 and lengths[-2] >= length:
            raise UsageError(
                f"buckets are {rule!r}: texts have at most {length} tokens, "
                f"so {lengths[-1]} is never used behind {lengths[-2]}"
            )
    return Buckets(prefill, decode, length)


def _lengths(rule: str, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise _wrong(rule, f"{text!r} in it") from None
    if lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
        raise _wrong(rule, "lengths that do not ascend from at least 1")
    return lengths


def _wrong(rule: str, found: str) -> UsageError:
    return UsageError(f"buckets are {rule!r}, with {found}: expected auto, off, lengths (128,1024) or PROMPTS/CACHES")
