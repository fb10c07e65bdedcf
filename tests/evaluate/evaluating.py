"""What the tests of evaluation share: likelihoods by transformers, and a tokenizer for the tiny models."""

import json
import string

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Raw

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


def write_tokenizer(folder, bos=True, template=TEMPLATE, order=string.printable):
    """A tokenizer of single characters, with a BOS token in front where `bos`: 103 of a tiny model's 128 ids."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *order])}
    raw = Raw(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
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
