"""Tensors that a checkpoint holds in parts, put together for the converter: LoRA pairs, and a factored head."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxsvd.checkpoint.families import find, listing
from jaxsvd.checkpoint.files import DTYPES, Entry, Tensors
from jaxsvd.config import ModelConfig
from jaxsvd.errors import ModelError

# How PEFT ends the names of a pair's first factor, and what it adds to the module that the pair belongs to.
_FIRST = (".lora_A.weight", ".lora_A.default.weight")
_WRAPPED = ".base_layer"
# Initialisations that take away from the base what they give to the pair.
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Edited(Tensors):
    """Tensors of which some are left out and some are computed when they are read."""

    def __init__(
        self, tensors: Tensors, computed: Mapping[str, tuple[Entry, Callable[[], np.ndarray]]], gone: set[str]
    ) -> None:
        self.folder = tensors.folder
        self.problems = tensors.problems
        self.entries = {name: entry for name, entry in tensors.entries.items() if name not in gone}
        self.entries |= {name: entry for name, (entry, _) in computed.items()}
        self._tensors = tensors
        self._computed = computed

    def read(self, name: str) -> np.ndarray:
        """See `Tensors.read`."""
        return self._computed[name][1]() if name in self._computed else self._tensors.read(name)


def has_pairs(tensors: Tensors) -> bool:
    """Whether there is a LoRA pair among the tensors."""
    return any(name.endswith(_FIRST) for name in tensors.entries)


def merged(tensors: Tensors, adapter: Tensors, settings: Mapping[str, Any]) -> Edited:
    """Add the LoRA pairs of `adapter` to the matrices that they belong to: W + scale·B·A, summed in float32.

    Args:
        tensors: the model; any matrix may have a pair, a factor as well.
        adapter: where the pairs are; may be `tensors` itself.
        settings: PEFT's adapter_config.json. The scale is alpha/r, or alpha/√r where it says `use_rslora`.

    Raises ModelError for an adapter that is more than LoRA pairs, or does not fit the model.
    """
    _refuse_other_kinds(settings)
    computed: dict[str, tuple[Entry, Callable[[], np.ndarray]]] = {}
    gone, problems = set(), []
    for first in adapter.entries:
        ending = next((ending for ending in _FIRST if first.endswith(ending)), None)
        if ending is None:
            continue
        module, second = first.removesuffix(ending), first.replace(".lora_A.", ".lora_B.")
        weight = next((n for n in (f"{module}.weight", f"{module}{_WRAPPED}.weight") if n in tensors.entries), None)
        gone |= {first, second}
        if weight is None or second not in adapter.entries:
            problems.append(f"missing: {second if weight else f'{module}.weight'}, which {first} belongs to")
            continue
        down, up, entry = adapter.entries[first].shape, adapter.entries[second].shape, tensors.entries[weight]
        if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != entry.shape or up[1] != down[0]:
            problems.append(f"mis-shaped: {first} {down} and {second} {up} do not fit {weight} {entry.shape}")
            continue
        pair = partial(_pair, adapter, first, second, _scale(settings, module, down[0]))
        computed[f"{module}.weight"] = entry, partial(_sum, tensors, weight, pair)
        if weight.endswith(f"{_WRAPPED}.weight"):
            gone.add(weight)
            if (bias := f"{module}{_WRAPPED}.bias") in tensors.entries:
                gone.add(bias)
                computed[f"{module}.bias"] = tensors.entries[bias], partial(tensors.read, bias)
    if adapter is not tensors:
        problems += [f"unexpected: {name}, which is no part of a LoRA pair" for name in adapter.entries.keys() - gone]
    if problems:
        raise listing(adapter.folder, sorted(problems))
    return Edited(tensors, computed, gone)


def _refuse_other_kinds(settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ModelError(f"adapter_config.json has peft_type {kind!r}: jaxsvd merges LORA")
    for key in ("use_dora", "fan_in_fan_out", "alora_invocation_tokens", "lora_bias"):
        if settings.get(key):
            raise ModelError(f"adapter_config.json has {key}: jaxsvd merges plain LoRA pairs; merge it with PEFT")
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(_CHANGING):
        raise ModelError(
            f"adapter_config.json has init_lora_weights {start!r}, which changes the base weights too: merge it with "
            "PEFT first"
        )


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha/r of one module; `alpha_pattern` names modules by the end of their path."""
    alpha = settings.get("lora_alpha")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(re.fullmatch(r"[\w.]+", name) is None for name in patterns):
        raise ModelError("adapter_config.json has an alpha_pattern of regular expressions: merge it with PEFT")
    alpha = next((patterns[name] for name in patterns if f".{module}".endswith(f".{name}")), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or rank < 1:
        raise ModelError(
            f"the LoRA pair of {module} has rank {rank} and lora_alpha {alpha!r}: its scale, alpha/r, can't be had; "
            "put the adapter_config.json that it was trained with beside it"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pair(adapter: Tensors, first: str, second: str, scale: float) -> np.ndarray:
    return scale * (adapter.read(second).astype(np.float32) @ adapter.read(first).astype(np.float32))


def _sum(tensors: Tensors, weight: str, pair: Callable[[], np.ndarray]) -> np.ndarray:
    return _cast(tensors.read(weight).astype(np.float32) + pair(), weight, tensors.entries[weight])


def _cast(array: np.ndarray, name: str, entry: Entry) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(DTYPES[entry.dtype])
    if not np.isfinite(result).all():
        raise ModelError(f"{name}, put together, has values too large for {entry.dtype}")
    return result


def with_whole_head(tensors: Tensors, raw: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Multiply a factored output head out, as ASVD may make one: the engine reads a head as a table.

    Such a head is not the embedding's, whatever the config says, so the config comes back with it.
    """
    config = ModelConfig.from_hf(raw)
    found = find(tensors.entries, "lm_head", config.hidden_size, config.vocab_size, bias=False, raw=raw)
    if not found.names - {"lm_head.weight"}:
        return tensors, raw
    if found.stored is None:
        raise listing(tensors.folder, found.problems)
    down, up = found.stored.down, found.stored.up
    assert down and up
    entry = tensors.entries[up]

    def product() -> np.ndarray:
        whole = tensors.read(up).astype(np.float32) @ tensors.read(down).astype(np.float32)
        return _cast(whole, "lm_head.weight", entry)

    whole = entry._replace(shape=(config.vocab_size, config.hidden_size))
    return Edited(tensors, {"lm_head.weight": (whole, product)}, found.names), raw | {"tie_word_embeddings": False}
