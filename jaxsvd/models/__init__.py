"""The architectures, imported when asked for."""

from typing import TYPE_CHECKING

from jaxsvd.config import ModelConfig
from jaxsvd.kernels import Backend
from jaxsvd.weights import Weights

if TYPE_CHECKING:
    from jaxsvd.models.llama import Llama


def architecture(config: ModelConfig) -> type["Llama"]:
    """The class that runs it."""
    if config.architecture == "qwen3":
        from jaxsvd.models.qwen3 import Qwen3

        return Qwen3
    from jaxsvd.models.llama import Llama

    return Llama


def build(config: ModelConfig, weights: Weights, backend: Backend) -> "Llama":
    """The model that `config` describes, its arrays taken from `weights` and laid out for `backend`."""
    return architecture(config)(config, weights, backend)
