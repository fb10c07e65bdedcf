"""Tiny models made by transformers, and engines on them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxsvd import kernels
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.engine import Engine

MAX_POSITIONS = 512
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# What distinguishes each tiny model, as keyword arguments of its transformers config.
TINY = {
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def make_tiny(kind: str, folder: Path, seed: int = 0):
    """Save a tiny random float32 model of that kind as a Hugging Face folder; return the torch model."""
    import torch
    import transformers

    architecture, options = TINY[kind]
    name = {"llama": "Llama", "qwen3": "Qwen3"}[architecture]
    config = getattr(transformers, f"{name}Config")(**_COMMON | options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # transformers initialises norms to one and biases to zero, which would hide that they are used.
            scale = 0.2 if parameter.ndim == 1 else 0.08
            offset = 1.0 if "norm" in parameter_name else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def open_engine(folder, **options):
    """A float32 engine on a model folder."""
    return Engine(Checkpoint(folder).load(kernels.choose(), jnp.float32), **options)


def prompts_of(*lengths, seed=0):
    """Random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 128, length).tolist() for length in lengths]
