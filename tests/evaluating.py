"""What the tests of evaluation share: likelihoods by transformers, and a tokenizer for the tiny models."""

import json
import shutil
import string

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Raw

TEXT = "Four score and seven years ago our fathers brought forth on this continent, a new nation. " * 4
SPECIAL = ("<s>", "</s>", "<unk>")
TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def reference(model, ids):
    """The log-probability of every token of `ids` but the first, and whether it is the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)[:-1] or [0]])).logits[0, : len(ids) - 1].double()
    targets = torch.tensor(list(ids)[1:], dtype=torch.long)
    logprobs = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    return logprobs.numpy(), (logits.argmax(-1) == targets).numpy()


def write_texts(folder, times=1):
    """TEXT, so many times, and the same backwards, as two files."""
    paths = folder / "a.txt", folder / "b.txt"
    for path, text in zip(paths, (TEXT, TEXT[::-1]), strict=True):
        path.write_text(times * text, "utf-8")
    return paths


def write_tokenizer(folder, bos=True, template=TEMPLATE, order=string.printable, lowercase=False):
    """A tokenizer of single characters, with a BOS token in front where `bos`: 103 of a tiny model's 128 ids."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *order])}
    raw = Raw(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if lowercase:
        raw.normalizer = normalizers.Lowercase()
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(list(SPECIAL))
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def copy_model(folder, target):
    """A copy of a model folder."""
    return shutil.copytree(folder, target)


KEPT = 1 - (64 * 96 - 16 * (64 + 96)) / (2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96))


def with_rank(folder, target, path="model.layers.0.mlp.up_proj", rank=16):
    """A copy with one projection of low rank, which keeps `KEPT` of all projections; its config.json doesn't say so."""
    copy_model(folder, target)
    tensors = {name: np.array(array) for name, array in load_file(target / "model.safetensors").items()}
    u, s, vt = np.linalg.svd(tensors.pop(f"{path}.weight"), full_matrices=False)
    stem = path.removesuffix("_proj")
    tensors[f"{stem}_u_proj.weight"] = np.ascontiguousarray(u[:, :rank] * s[:rank])
    tensors[f"{stem}_v_proj.weight"] = np.ascontiguousarray(vt[:rank])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text("utf-8"))
    low_rank = {"format_version": 1, "method": "svd", "ranks": {path: rank}}
    (target / "config.json").write_text(json.dumps(config | {"low_rank": low_rank}), "utf-8")
    return target
