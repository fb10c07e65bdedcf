"""Llama (2 and 3.x) with factored projections (Touvron et al. 2023; Grattafiori et al. 2024)."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsvd.attention import attend
from jaxsvd.cache import KVCache, write
from jaxsvd.config import ModelConfig
from jaxsvd.kernels import Backend, Fused, Heads
from jaxsvd.layers import Embedding, RMSNorm, rope_angles, rotate
from jaxsvd.lowrank import GatedMLP, Projections
from jaxsvd.weights import Weights

logger = logging.getLogger("jaxsvd")


class Step(NamedTuple):
    """What all layers of one forward pass share."""

    start: jax.Array  # int32 (batch,) or (): where the new tokens go in the cache
    positions: jax.Array  # int32 (batch, tokens)
    cosines: jax.Array
    sines: jax.Array
    norms: Sequence[jax.Array] | None = None  # see `Llama.norms`


class Attention(nnx.Module):
    """Grouped-query attention; q, k and v are one group."""

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend, path: str) -> None:
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv = Projections(weights, backend, path, config.hidden_size, outputs, config.attention_bias)
        self.o = Projections(weights, backend, path, queries, {"o_proj": config.hidden_size}, config.attention_bias)

    @property
    def head_norms(self) -> list[RMSNorm]:
        """Those of the heads of q and k, which Llama has not."""
        return []

    def normalise(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Llama leaves the heads as they are."""
        return q, k

    def __call__(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, step: Step
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (batch, tokens, hidden) and the layer's cache to the same three, the cache with the new tokens."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x)
        q, k = self.normalise(
            q.reshape(batch, tokens, self.heads, self.head_dim), k.reshape(batch, tokens, self.kv_heads, self.head_dim)
        )
        q, k = (rotate(heads.swapaxes(1, 2), step.cosines, step.sines) for heads in (q, k))
        v = v.reshape(batch, tokens, self.kv_heads, self.head_dim).swapaxes(1, 2)
        keys, values = write(keys, k, step.start), write(values, v, step.start)
        mixed = attend(q, keys, values, step.positions)
        (y,) = self.o(mixed.swapaxes(1, 2).reshape(batch, tokens, -1))
        return y, keys, values


class Layer(nnx.Module):
    """One pre-norm transformer layer."""

    attention: type[Attention] = Attention

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend, path: str) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights, f"{path}.{name}", config.hidden_size, config.rms_norm_eps)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = self.attention(config, weights, backend, f"{path}.self_attn")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = GatedMLP(
            weights, backend, f"{path}.mlp", config.hidden_size, config.intermediate_size, config.mlp_bias
        )

    @property
    def groups(self) -> list[Projections]:
        """In the order of their use."""
        return [self.self_attn.qkv, self.self_attn.o, self.mlp.gate_up, self.mlp.down]

    @property
    def norms(self) -> list[RMSNorm]:
        """Before attention, before the MLP, and of the heads, if any."""
        return [self.input_layernorm, self.post_attention_layernorm, *self.self_attn.head_norms]

    def __call__(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, step: Step
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `Attention`, with both residual streams."""
        y, keys, values = self.self_attn(self.input_layernorm(x), keys, values, step)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Llama(nnx.Module):
    """The whole model, a pure tree: no state, no shared variables. A tied head is a method of the embedding."""

    layer: type[Layer] = Layer

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.embed_tokens = Embedding(weights, backend, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nnx.List(
            [self.layer(config.of_layer(i), weights, backend, f"model.layers.{i}") for i in range(config.num_layers)]
        )
        self.norm = RMSNorm(weights, "model.norm", config.hidden_size, config.rms_norm_eps)
        if not config.tied:
            self.lm_head = Embedding(weights, backend, "lm_head", config.vocab_size, config.hidden_size)

    def __call__(
        self, tokens: jax.Array, cache: KVCache, start: jax.Array, norms: Sequence[jax.Array] | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Run new tokens through the layers and into the cache.

        Args:
            tokens: int32 (batch, tokens), right-padded.
            cache: what the tokens before have left; its `lengths` are the caller's to set.
            start: int32 (batch,) or (), the position of the first new token of each row.
            norms: the `norms` of this model, where they were put together before a loop.

        Returns:
            Final hidden states (batch, tokens, hidden), normed, and the cache with the new keys and values.
        """
        positions = jnp.broadcast_to(start, tokens.shape[:1])[:, None] + jnp.arange(tokens.shape[1])
        step = Step(start, positions, *rope_angles(positions, self.config.rope, self.config.head_dim), norms)
        x = self.embed_tokens(tokens)
        keys, values = list(cache.keys), list(cache.values)
        run = self.decoder(x.shape[0], cache.capacity) if x.shape[1] == 1 else None
        if run is not None:
            x = self._together(run, x, keys, values, step)
        else:
            for i, layer in enumerate(self.layers):
                x, keys[i], values[i] = layer(x, keys[i], values[i], step)
        return self.norm(x), KVCache(keys, values, cache.lengths)

    def _together(
        self, run: Callable[..., jax.Array], x: jax.Array, keys: list[jax.Array], values: list[jax.Array], step: Step
    ) -> jax.Array:
        """One token of each row through all layers in the backend's kernel, and into the cache."""
        arrays = [[array for group in layer.groups for array in group.values] for layer in self.layers]
        caches = [[jax.new_ref(buffer) for buffer in buffers] for buffers in (keys, values)]
        angles = step.cosines[:, 0, 0], step.sines[:, 0, 0]
        y = run(x[:, 0], step.positions[:, 0], *angles, step.norms or self.norms, arrays, *caches)
        keys[:], values[:] = ([buffer[...] for buffer in buffers] for buffers in caches)
        return y.astype(x.dtype)[:, None]

    @property
    def norms(self) -> list[jax.Array]:
        """The weights of each kind of norm (layers, width), if there is a kernel for all layers; best before a loop."""
        weights = ([norm.weight[...] for norm in layer.norms] for layer in self.layers if self.fused)
        return list(map(jnp.stack, zip(*weights, strict=True)))

    def decoder(self, batch: int, capacity: int) -> Callable[..., jax.Array] | None:
        """The backend's kernel that takes a token of each row through all layers; None where it has none for them."""
        if self.fused is None or batch > self.fused.sizes[-1]:
            return None
        if obstacle := self.obstacle(batch, capacity):
            logger.warning("XLA decodes, not the kernel for all layers: %s", obstacle)
            return None
        return self.fused.decoder(*self._form, batch)

    @property
    def fused(self) -> Fused | None:
        """What the backend has for all layers at once."""
        return self.layers[0].self_attn.o.backend.fused

    def obstacle(self, batch: int, capacity: int) -> str | None:
        """Why such a kernel can't run this model with so many rows and a cache for so many tokens each, or None."""
        dtype = self.embed_tokens.weight.dtype
        if dtype != jnp.bfloat16:
            return f"the kernel computes in bfloat16, and the model is in {dtype}"
        if any(group.biases for layer in self.layers for group in layer.groups):
            return "the kernel has no biases, and the model has"
        assert self.fused is not None
        return self.fused.obstacle(*self._form, batch, capacity)

    @property
    def _form(self) -> tuple[Heads, list[list[Any]]]:
        """What such a kernel has to know."""
        first = self.layers[0]
        attention, eps = first.self_attn, first.input_layernorm.eps
        heads = Heads(attention.heads, attention.kv_heads, attention.head_dim, eps, bool(attention.head_norms))
        return heads, [[group.plan for group in layer.groups] for layer in self.layers]

    @property
    def matrices(self) -> list[jax.Array]:
        """The arrays of all projections, as they lie on the device."""
        return [array for layer in self.layers for group in layer.groups for array in group.values]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (…, hidden) to float32 logits (…, vocab)."""
        return (self.embed_tokens if self.config.tied else self.lm_head).attend(hidden)
