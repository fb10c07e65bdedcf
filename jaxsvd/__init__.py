"""jaxsvd runs Llama and Qwen3, dense or low-rank, from safetensors.

import jaxsvd
lm = jaxsvd.load("qwen3-4b")
print(lm.generate("The capital of France is").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsvd.api import Completion, LanguageModel, Statistics, compile_ahead, load, load_and_generate
    from jaxsvd.compression import compress
    from jaxsvd.errors import JaxsvdError, ModelError, UsageError
    from jaxsvd.sampling import SamplingParams

__version__ = "0.1.0"

# Public names by the module that has them, imported when first used: `import jaxsvd` itself costs next to nothing.
_PUBLIC = {
    "Completion": "api",
    "JaxsvdError": "errors",
    "LanguageModel": "api",
    "ModelError": "errors",
    "SamplingParams": "sampling",
    "Statistics": "api",
    "UsageError": "errors",
    "compile_ahead": "api",
    "compress": "compression",
    "load": "api",
    "load_and_generate": "api",
}
__all__ = [
    "Completion",
    "JaxsvdError",
    "LanguageModel",
    "ModelError",
    "SamplingParams",
    "Statistics",
    "UsageError",
    "compile_ahead",
    "compress",
    "load",
    "load_and_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxsvd' has no attribute {name!r}")
    return getattr(import_module(f"jaxsvd.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
