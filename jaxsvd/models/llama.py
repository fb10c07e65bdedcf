"""Llama (2 and 3.x) with factored projections (Touvron et al. 2023; Grattafiori et al. 2024)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxsvd.attention import attend
from jaxsvd.cache import KVCache, write
from jaxsvd.config import ModelConfig
from jaxsvd.kernels import Backend, Heads
from jaxsvd.layers import Embedding, RMSNorm, rope_angles, rotate
from jaxsvd.lowrank import GatedMLP, Projections
from jaxsvd.models.stack import Stack, alike
from jaxsvd.weights import Weights


class Step(NamedTuple):
    """What all layers of one forward pass share."""

    start: jax.Array  # int32 (batch,) or (): where the new tokens go in the cache
    positions: jax.Array  # int32 (batch, tokens)
    cosines: jax.Array
    sines: jax.Array


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
        layers = [
            self.layer(config.of_layer(i), weights, backend, f"model.layers.{i}") for i in range(config.num_layers)
        ]
        fused = self._kernel(layers[0], len(layers)) is not None and alike(layers)  # which may widen them
        self.layers: Stack | nnx.List[Layer] = Stack(layers) if fused else nnx.List(layers)
        self.norm = RMSNorm(weights, "model.norm", config.hidden_size, config.rms_norm_eps)
        if not config.tied:
            self.lm_head = Embedding(weights, backend, "lm_head", config.vocab_size, config.hidden_size)

    def __call__(self, tokens: jax.Array, cache: KVCache, start: jax.Array) -> tuple[jax.Array, KVCache]:
        """Run new tokens through the layers and into the cache.

        Args:
            tokens: int32 (batch, tokens), right-padded.
            cache: what the tokens before have left; its `lengths` are the caller's to set.
            start: int32 (batch,) or (), the position of the first new token of each row.

        Returns:
            Final hidden states (batch, tokens, hidden), normed, and the cache with the new keys and values.
        """
        positions = jnp.broadcast_to(start, tokens.shape[:1])[:, None] + jnp.arange(tokens.shape[1])
        angles = rope_angles(positions, self.config.rope, self.config.head_dim)
        step = Step(start, positions, *angles)
        x = self.embed_tokens(tokens)
        if isinstance(self.layers, Stack):
            x, cache = self._stacked(self.layers, x, cache, step)
            return self.norm(x), cache
        keys, values = list(cache.keys), list(cache.values)
        for i, layer in enumerate(self.layers):
            x, keys[i], values[i] = layer(x, keys[i], values[i], step)
        return self.norm(x), KVCache(keys, values, cache.lengths)

    @property
    def is_stacked(self) -> bool:
        """Whether the layers are one stack: then the cache is too."""
        return isinstance(self.layers, Stack)

    def _stacked(self, layers: Stack, x: jax.Array, cache: KVCache, step: Step) -> tuple[jax.Array, KVCache]:
        """x through all layers: one token of one row in the backend's kernel if it has one, else layer by layer."""
        (keys,), (values,) = cache.keys, cache.values
        run = self.decoder(x.shape[0], cache.capacity) if x.shape[1] == 1 else None
        if run is not None:
            layer = layers.whole
            norms = [layer.input_layernorm, layer.post_attention_layernorm, *layer.self_attn.head_norms]
            arrays = [norm.weight[...] for norm in norms] + [array for group in layer.groups for array in group.values]
            caches = jax.new_ref(keys), jax.new_ref(values)
            y = run(x[0, 0], step.positions[0, 0], step.cosines[0, 0, 0], step.sines[0, 0, 0], *arrays, *caches)
            return y.astype(x.dtype)[None, None], KVCache([caches[0][...]], [caches[1][...]], cache.lengths)

        # A loop, as XLA would tune and compile each layer's slices of the stack apart.
        def through(x: jax.Array, given: tuple) -> tuple[jax.Array, tuple]:
            leaves, keys, values = given
            x, keys, values = layers.merge(leaves)(x, keys, values, step)
            return x, (keys, values)

        x, (keys, values) = lax.scan(through, x, (layers.leaves, keys, values))
        return x, KVCache([keys], [values], cache.lengths)

    def decoder(self, batch: int, capacity: int) -> Callable[..., jax.Array] | None:
        """The backend's kernel that takes one token through all layers; None where there is none for such a batch."""
        if not isinstance(self.layers, Stack) or batch != 1:
            return None
        return self._kernel(self.layers.whole, len(self.layers), capacity)

    def _kernel(self, layer: Layer, layers: int, capacity: int = 0) -> Callable[..., jax.Array] | None:
        """The kernel for so many layers like this one: without biases and in bfloat16, if the backend has any."""
        attention, groups = layer.self_attn, layer.groups
        fused = attention.o.backend.fused
        if fused is None or self.embed_tokens.weight.dtype != jnp.bfloat16 or any(group.biases for group in groups):
            return None
        normed = bool(attention.head_norms)
        heads = Heads(attention.heads, attention.kv_heads, attention.head_dim, layer.input_layernorm.eps, normed)
        return fused.decoder(heads, [group.plan for group in groups], layers, capacity)

    @property
    def matrices(self) -> list[jax.Array]:
        """The arrays of all projections, as they lie on the device."""
        layers = [self.layers.whole] if isinstance(self.layers, Stack) else self.layers
        return [array for layer in layers for group in layer.groups for array in group.values]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (…, hidden) to float32 logits (…, vocab)."""
        return (self.embed_tokens if self.config.tied else self.lm_head).attend(hidden)
