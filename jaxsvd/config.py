"""What config.json says of a model, checked: the only reader of its keys."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsvd.errors import ModelError

# model_type -> the architecture that runs it. The low-rank families' exports have names of their own.
ARCHITECTURES = {
    "llama": "llama",
    **dict.fromkeys(("svdllm-llama", "asvd_llama", "svdllama", "lowrank_llama", "basis_sharing_llama"), "llama"),
    "qwen3": "qwen3",
    **dict.fromkeys(("asvd_qwen3", "lowrank_qwen3"), "qwen3"),
}

_Json = dict[str, Any]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `theta`, and how Llama 3 (or plain position interpolation) stretches it."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A Llama or Qwen3, in numbers. Widths are in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: Rope
    tied: bool | None  # None: config.json does not say, so the presence of lm_head.weight decides
    attention_bias: bool = False
    mlp_bias: bool = False
    mlp_widths: tuple[tuple[int, int], ...] = ()  # (layer, width) of the MLPs that differ from intermediate_size

    def of_layer(self, index: int) -> "ModelConfig":
        """The config as layer `index` has it."""
        width = dict(self.mlp_widths).get(index)
        return dataclasses.replace(self, intermediate_size=width) if width else self

    @classmethod
    def from_hf(cls, raw: _Json) -> "ModelConfig":
        """Read the fields of a transformers 4 or 5 config.json. Raises ModelError that names the field at fault."""
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ModelError(
                f"config.json has model_type {model_type!r}: jaxsvd runs {', '.join(sorted(ARCHITECTURES))}"
            )
        activation = raw.get("hidden_act", "silu")
        if activation != "silu":
            raise ModelError(f"config.json has hidden_act {activation!r}: jaxsvd runs models with silu")
        if raw.get("use_sliding_window"):
            raise ModelError("config.json has use_sliding_window true: jaxsvd has full attention only")
        architecture = ARCHITECTURES[model_type]
        heads = _integer(raw, "num_attention_heads")
        hidden = _integer(raw, "hidden_size")
        kv_heads = _integer(raw, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(f"config.json has {heads} attention heads, not a multiple of {kv_heads} key-value heads")
        head_dim = _integer(raw, "head_dim", 128 if architecture == "qwen3" else hidden // heads)
        if head_dim % 2:
            raise ModelError(f"config.json gives head_dim {head_dim}: rotary embedding needs an even number")
        return cls(
            architecture=architecture,
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(raw, "intermediate_size"),
            num_layers=_integer(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=_integer(raw, "max_position_embeddings", 2048),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw),
            tied=_boolean(raw, "tie_word_embeddings", None),
            attention_bias=bool(_boolean(raw, "attention_bias", False)),
            mlp_bias=bool(_boolean(raw, "mlp_bias", False)),
            mlp_widths=_mlp_widths(raw),
        )


def _rope(raw: _Json) -> Rope:
    """Transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`."""
    both = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    for name, value in (("rope_parameters", both), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise ModelError(f"config.json has {name} = {value!r}: expected an object")
    merged = {"rope_theta": raw.get("rope_theta")} | scaling | both
    if merged["rope_theta"] is None:
        merged["rope_theta"] = raw.get("rope_theta") or 10000.0
    if _number(merged, "partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("config.json has a partial_rotary_factor other than 1: jaxsvd rotates whole heads only")
    kind = merged.get("rope_type") or merged.get("type") or "default"
    theta = _number(merged, "rope_theta")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, _number(merged, "factor"))
    if kind == "llama3":
        rope = Rope(
            theta,
            kind,
            factor=_number(merged, "factor"),
            low_freq_factor=_number(merged, "low_freq_factor"),
            high_freq_factor=_number(merged, "high_freq_factor"),
            original_max_position=_integer(merged, "original_max_position_embeddings"),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise ModelError("config.json has a rope high_freq_factor that is not above low_freq_factor")
        return rope
    raise ModelError(f"config.json has rope type {kind!r}: jaxsvd has default, linear and llama3")


def _mlp_widths(raw: _Json) -> tuple[tuple[int, int], ...]:
    """A compressed model may have narrower MLPs: `low_rank.widths`, {"model.layers.0.mlp": 1024}."""
    entry = raw.get("low_rank")
    stated = entry.get("widths") if isinstance(entry, dict) else None
    if stated is None:
        return ()
    stated = stated if isinstance(stated, dict) else {"": stated}
    matches = [re.fullmatch(r"model\.layers\.(\d{1,9})\.mlp", path) for path in stated]
    layers = [int(match[1]) for match in matches if match]
    if len(layers) < len(stated) or any(layer >= _integer(raw, "num_hidden_layers") for layer in layers):
        raise ModelError('config.json has low_rank.widths that are not of its MLPs, as {"model.layers.0.mlp": 1024}')
    return tuple(sorted((layer, _integer(stated, f"model.layers.{layer}.mlp")) for layer in layers))


def _integer(raw: _Json, name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ModelError(f"config.json has {name} = {str(value)[:40]}: expected a positive integer")
    return value


def _number(raw: _Json, name: str, default: float | None = None) -> float:
    value = raw.get(name)
    value = default if value is None else value
    # float32 must hold it, and what is computed from it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-15 <= value <= 1e15:
        raise ModelError(f"config.json has {name} = {str(value)[:40]}: expected a positive number")
    return float(value)


def _boolean(raw: _Json, name: str, default: bool | None) -> bool | None:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"config.json has {name} = {value!r}: expected true or false")
    return value


def read_json(path: Path) -> _Json:
    """A JSON object from a file. Raises ModelError where it is missing, unreadable or not an object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: a model folder needs it; copy it from the original model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read as JSON ({error}): copy it again from the original model") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a {type(raw).__name__}, not a JSON object: copy it from the original model")
    return raw


def end_of_text_ids(folder: Path, raw: _Json) -> tuple[int, ...]:
    """The token ids that end a text: from generation_config.json, else from config.json, else none."""
    source = folder / "generation_config.json"
    value = read_json(source).get("eos_token_id") if source.exists() else None
    value = raw.get("eos_token_id") if value is None else value
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise ModelError(f"eos_token_id is {value!r} in {folder}: expected an integer or a list of integers")
    return tuple(ids)
