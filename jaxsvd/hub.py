"""From what a user calls a model to a folder on this machine."""

import os
import re
from pathlib import Path

from jaxsvd.errors import ModelError

# The names of the README, and what the Hub calls them.
REGISTRY = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cache_folder() -> Path:
    """Where jaxsvd keeps compiled steps and models: $JAXSVD_CACHE, else jaxsvd/ in the user's cache."""
    if chosen := os.environ.get("JAXSVD_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsvd"


def local_copy(name: str) -> Path:
    """Where a registry model lies that was not had from the Hub (`python -m jaxsvd.demo` puts one there)."""
    return cache_folder() / "models" / name


def resolve(model: str | os.PathLike[str]) -> Path:
    """The folder of a registry name, a Hub id or a folder; what is not here is downloaded from the Hub.

    Raises ModelError that says what was not found and what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file: give the folder that it lies in")
    name = str(model)
    if name.lower() in REGISTRY:
        local = local_copy(name.lower())
        return local if (local / "config.json").exists() else _download(REGISTRY[name.lower()])
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return _download(name)
    raise ModelError(
        f"there is no folder and no model {name!r}: give a folder, a Hub id such as Qwen/Qwen3-4B, or one of "
        + ", ".join(REGISTRY)
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_PATTERNS))
    except GatedRepoError:
        raise ModelError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the Hub has no model {hub_id}: check the name, or run `hf auth login` if it is private"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        hint = "; `make demo` gets this model without the Hub" if hub_id == REGISTRY["smollm2-135m"] else ""
        raise ModelError(
            f"{hub_id} is not on this machine and the Hub can't be reached ({type(error).__name__}): "
            f"go online, or give a folder that holds the model{hint}"
        ) from None
