"""Qwen3 (Qwen team 2025): a Llama whose queries and keys are normed per head, with a head_dim of its own."""

import jax

from jaxsvd.config import ModelConfig
from jaxsvd.kernels import Backend
from jaxsvd.layers import RMSNorm
from jaxsvd.models import llama
from jaxsvd.weights import Weights


class Attention(llama.Attention):
    """Attention with an RMSNorm over each head of q and k, before RoPE."""

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend, path: str) -> None:
        super().__init__(config, weights, backend, path)
        self.q_norm = RMSNorm(weights, f"{path}.q_norm", config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(weights, f"{path}.k_norm", config.head_dim, config.rms_norm_eps)

    @property
    def head_norms(self) -> list[RMSNorm]:
        """Those of the heads of q and k."""
        return [self.q_norm, self.k_norm]

    def normalise(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Heads (batch, tokens, heads, head_dim), each normed by itself."""
        return self.q_norm(q), self.k_norm(k)


class Layer(llama.Layer):
    """A Llama layer with Qwen3's attention."""

    attention = Attention


class Qwen3(llama.Llama):
    """A Llama with Qwen3's layers."""

    layer = Layer
