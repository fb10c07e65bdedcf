"""A jaxsvd model in EleutherAI's lm-evaluation-harness: importing this module registers it there as "jaxsvd".

import jaxsvd.evaluate.harness, lm_eval
lm_eval.simple_evaluate("jaxsvd", model_args={"pretrained": "qwen3-4b"}, tasks=["arc_easy"])

On the command line: python -m jaxsvd.evaluate.harness --model jaxsvd --model_args pretrained=qwen3-4b --tasks arc_easy
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from jaxsvd import api
from jaxsvd.errors import UsageError

try:
    import lm_eval.models  # noqa: F401 (or this model would be the only one that the registry knows)
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"the harness can't be imported ({error}): pip install 'jaxsvd[eval]'") from error

logger = logging.getLogger("jaxsvd")

# The harness's names for one thing, and what else it may ask of a text.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("jaxsvd")
class HarnessModel(TemplateLM):
    """What the harness asks of a model: likelihoods of continuations and of whole texts, and generated texts.

    Args:
        pretrained: a loaded model, or a name, Hub id or folder for `jaxsvd.load`.
        batch_size: requests run at a time; "auto" is `max_batch_size`, or 8.
        max_batch_size: see `batch_size`.
        max_length: the tokens that the model may see at once; default all that it has room for. Longer contexts lose
            their beginning, longer texts are scored in windows.
        max_gen_toks: how long a generated text gets where the task does not say.
        dtype: as in `jaxsvd.load`.
        backend: as in `jaxsvd.load`.
        seed: of sampled texts; each request has its own, seed + its number.
        device: not used, but the harness's command line always gives one. JAX chooses (`JAX_PLATFORMS`).

    Raises UsageError for arguments that can't be used, ModelError for a model that can't be loaded.
    """

    def __init__(
        self,
        pretrained: api.LanguageModel | str | os.PathLike[str],
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: Any = None,
        backend: str = "auto",
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device is not None:
            logger.info("device %s is not used: JAX chooses %s (JAX_PLATFORMS)", device, jax.default_backend())
        loaded = isinstance(pretrained, api.LanguageModel)
        if loaded and (dtype is not None or backend != "auto"):
            raise UsageError("the model is loaded already: dtype and backend can't be chosen any more")
        self.model = pretrained if loaded else api.load(pretrained, dtype, backend)
        self.batch_size = _positive("batch_size", (max_batch_size or 8) if batch_size == "auto" else batch_size)
        room = self.model.config.max_positions
        self.max_length = room if max_length is None else _positive("max_length", max_length)
        if self.max_length > room:
            raise UsageError(f"max_length is {max_length}: the model has room for {room} tokens")
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        self._seed = seed
        ends = self.model.tokenizer.bos or self.model.tokenizer.eos, self.model.tokenizer.eos
        if not ends[0]:
            raise UsageError(f"the tokenizer of {self.model.folder} has neither a BOS nor an EOS token to begin a text")
        self._prefix, self._end = ends[0], ends[1] or ends[0]

    # Text and tokens, as the harness's TemplateLM wants them.

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end[1]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS where there is none."""
        return self._prefix[1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Text to ids; by default with the tokenizer's BOS, unless the text (of a chat template) begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix[0])
        return self.model.tokenizer.encode(string, special=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its request cache with."""
        return str(self.model.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, if asked for. Raises UsageError for a name: a model has one template."""
        if isinstance(chat_template, str):
            raise UsageError(f"there is no chat template {chat_template!r}: models here have one; ask for True")
        return self.model.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one text, for an answer or, without `add_generation_prompt`, for more of the last message."""
        return self.model.tokenizer.render(chat_history, add_generation_prompt)

    # Likelihoods. `loglikelihood` itself is TemplateLM's: it encodes context and continuation as one text.

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, in nats, and whether it is what greedy decoding gives."""
        rows, cut = [], 0
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UsageError(
                    f"the continuation {(texts or ('', 'of a text'))[1][:60]!r} has {len(continuation)} tokens: "
                    f"expected 1 to {self.max_length} (max_length)"
                )
            rows.append((context + continuation)[-self.max_length - 1 :])
            cut += len(context) + len(continuation) > self.max_length + 1
        _warn_of_cuts(cut)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(rows), desc="likelihoods", disable=disable_tqdm) as bar:
            for batch in self._batches(range(len(rows)), rows):
                for i, score in zip(batch, self.model.engine.score([rows[i] for i in batch]), strict=True):
                    texts, size, new = requests[i][0], len(requests[i][2]), i not in answers
                    answers[i] = float(score.logprobs[-size:].sum(dtype=float)), bool(score.greedy[-size:].all())
                    if new and texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                    bar.update(new)
        return [answers[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in nats, every token scored once, in windows of `max_length`.

        The first token is predicted from `prefix_token_id` alone, which takes the place of the tokenizer's BOS.
        """
        windows: list[Request] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Texts.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of its `until` strings, the model's end of text or `max_gen_toks`.

        Greedy unless `do_sample` is true or a temperature is given. Raises UsageError for options that are not known.
        """
        arguments: list[Any] = [request.args for request in requests]
        groups: dict[str, list[int]] = {}
        for i, (_, given) in enumerate(arguments):
            groups.setdefault(json.dumps(given, sort_keys=True), []).append(i)
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for indices in groups.values():
                options = self._options(arguments[indices[0]][1])
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise UsageError(
                        f"max_gen_toks is {options['max_new_tokens']}: with a max_length of {self.max_length} no token "
                        "is left for the context; lower it"
                    )
                rows = {i: self.tok_encode(arguments[i][0]) or [self.prefix_token_id] for i in indices}
                _warn_of_cuts(sum(len(row) > room for row in rows.values()))
                rows = {i: row[-room:] for i, row in rows.items()}
                for batch in self._batches(indices, rows):
                    seeds = [self._seed + i for i in batch]
                    texts = self.model.generate([rows[i] for i in batch], seed=seeds, **options)
                    for i, completion in zip(batch, texts, strict=True):
                        if i not in answers:
                            answers[i] = completion.text
                            self.cache_hook.add_partial("generate_until", arguments[i], completion.text)
                            bar.update(1)
        return [answers[i] for i in range(len(requests))]

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The harness's generation arguments as those of `LanguageModel.generate`."""
        unknown = sorted(given.keys() - {"until", "do_sample", *_LENGTHS, *_SAMPLING})
        if unknown:
            known = ", ".join(("until", "max_gen_toks", "do_sample", *_SAMPLING))
            raise UsageError(f"the task wants {', '.join(unknown)}, but texts are made with {known} only")
        until = given.get("until") or []
        stops, stop_ids = [], []
        for stop in [until] if isinstance(until, str) else until:
            ids = self.tok_encode(stop, add_special_tokens=False)
            # A special token never gets into the text that strings are looked for in.
            if len(ids) == 1 and not self.model.tokenizer.decode(ids):
                stop_ids += ids
            elif stop:
                stops.append(stop)
        lengths = [given[name] for name in _LENGTHS if given.get(name) is not None]
        options = {"max_new_tokens": int(lengths[0]) if lengths else self.max_gen_toks}
        options |= {"stop": stops, "stop_token_ids": stop_ids}
        sampled = given.get("do_sample")
        if sampled or (sampled is None and float(given.get("temperature") or 0) > 0):
            options |= {"temperature": 1.0} | {name: given[name] for name in _SAMPLING if given.get(name) is not None}
        return options

    def _batches(self, indices: Sequence[int], rows: Any) -> Iterator[list[int]]:
        """Indices of rows in batches of one size, the longest rows first; the last one is filled by repeating its last.

        Each length bucket then compiles once, and no batch is padded far.
        """
        order = sorted(indices, key=lambda i: -len(rows[i]))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            yield batch + batch[-1:] * (self.batch_size - len(batch))


def _positive(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise UsageError(f"{name} is {value!r}: expected a whole number of at least 1")
    return int(value)


def _warn_of_cuts(count: int) -> None:
    if count:
        logger.warning("contexts too long for max_length, which lose their beginning: %d", count)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
