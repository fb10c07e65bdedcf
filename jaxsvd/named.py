"""The architectures of named models, for what needs a model's shape but not its weights."""

from jaxsvd.config import ModelConfig, Rope


def _llama3(hidden: int, inner: int, layers: int, heads: int, head_dim: int, factor: float, tied: bool) -> ModelConfig:
    rope = Rope(5e5, "llama3", factor=factor)
    return ModelConfig("llama", 128256, hidden, inner, layers, heads, 8, head_dim, 131072, 1e-5, rope, tied)


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    return ModelConfig("qwen3", 151936, hidden, inner, layers, heads, 8, 128, 40960, 1e-6, Rope(1e6), tied)


# Every name of `hub.REGISTRY`, and Llama-2-7B, as their config.json has them.
CONFIGS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, 32, True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, 32, True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, 8, False),
    "llama-2-7b": ModelConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5, Rope(1e4), False),
    "smollm2-135m": ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, Rope(1e5), True),
}
