"""The steps of the engine: pure functions of a model's leaves, as they are compiled for one shape each.

Tests lower them for Neuron as they stand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxsvd.cache import KVCache, empty_cache
from jaxsvd.models.llama import Llama
from jaxsvd.sampling import Mode, Sampler, sample

# What a prefill gives: logits of each row's last token, of every token, or no logits but the states under them.
Output = Literal["last", "every", "hidden"]


class Call(NamedTuple):
    """A step with the arguments that it runs on.

    `donate` are the arguments that it gives away, `static` what is fixed when it is compiled, and `gives` shows how its
    result is put together, any leaf standing for an array.
    """

    label: str
    step: Callable
    args: tuple
    donate: tuple[int, ...] = ()
    static: Mapping[str, Any] = {}
    gives: Any = 0

    @property
    def own(self) -> list:
        """The arrays among the arguments; not the model's leaves, a list that comes first where a step needs it."""
        return jax.tree.leaves([arg for arg in self.args if not isinstance(arg, list)])

    @property
    def key(self) -> tuple:
        """What tells it from the other calls of an engine."""
        return (self.step.__name__, tuple((leaf.shape, leaf.dtype) for leaf in self.own), tuple(self.static.items()))


class Steps:
    """The steps of one model, and its leaves.

    Args:
        model: its arrays on device, or `jax.ShapeDtypeStruct`s, for lowering only.
    """

    def __init__(self, model: Llama) -> None:
        self.config = model.config
        self.dtype = jnp.dtype(model.embed_tokens.weight.dtype)
        self._graph, state = nnx.split(model)
        self.leaves, self._tree = jax.tree.flatten(state)

    def _model(self, leaves: Sequence[jax.Array]) -> Llama:
        return nnx.merge(self._graph, self._tree.unflatten(leaves))

    @property
    def model(self) -> Llama:
        """The model itself, of the engine's own leaves."""
        return self._model(self.leaves)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of zeros for this model, of `capacity` tokens a row."""
        return empty_cache(self.config, batch, capacity, self.dtype)

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
        cache = self.empty_cache(batch, bucket)
        return self.extend(leaves, tokens, lengths, cache, jnp.int32(0), output=output)

    def grow(self, buffer: jax.Array, *, capacity: int) -> jax.Array:
        """The keys or values of a layer with room for `capacity` tokens a row.

        A step of its own, so that prefill depends on the bucket alone; and of one layer, as memory then holds both the
        old and the new buffer of one layer only.
        """
        return jnp.pad(buffer, ((0, 0), (0, capacity - buffer.shape[1]), (0, 0)))

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
        model = self._model(leaves)
        hidden, cache = model(tokens, cache, start)
        cache = KVCache(cache.keys, cache.values, lengths)
        if output == "hidden":
            return hidden, cache
        if output == "last":
            last = jnp.clip(lengths - 1 - start, 0, tokens.shape[1] - 1)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1, mode="clip")[:, 0]
        return model.logits(hidden), cache

    def select(self, inside: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
        """Logits (batch, vocab): those in `new` of the rows that end `inside` (batch, 1) its chunk, else in `old`."""
        return jnp.where(inside, new, old)

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
        norms = model.norms

        def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            cache, token, seen = carry
            logits, cache = _append(model, cache, token, norms)
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


def _append(
    model: Llama, cache: KVCache, token: jax.Array, norms: Sequence[jax.Array] | None = None
) -> tuple[jax.Array, KVCache]:
    """Put `token` (batch,), the newest of each row, into the cache; the float32 logits (batch, vocab) behind it."""
    hidden, cache = model(token[:, None], cache, cache.lengths, norms)
    return model.logits(hidden[:, 0]), KVCache(cache.keys, cache.values, cache.lengths + 1)
