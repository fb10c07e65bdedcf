"""Text to token ids and back: the only place that imports transformers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsvd.errors import ModelError, UsageError

Message = dict[str, Any]
_HALF = "\ufffd"  # what incomplete bytes decode to


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has one, working or not."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


class Tokenizer:
    """The tokenizer of a model folder. Raises ModelError where the folder has none that works."""

    def __init__(self, folder: Path) -> None:
        # Without torch, which jaxsvd never needs, transformers advises at import to install it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()

        try:
            self._inner: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # it raises whatever its parsers do
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"{folder} has no tokenizer that works ({reason}): copy tokenizer.json and tokenizer_config.json "
                "there from the original model, or prompt with token ids"
            ) from None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of a model that was made to chat."""
        return getattr(self._inner, "chat_template", None) or None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made to chat."""
        return self.chat_template is not None

    @property
    def bos(self) -> tuple[str, int] | None:
        """The token that begins a text, and its id."""
        return None if self._inner.bos_token_id is None else (self._inner.bos_token, self._inner.bos_token_id)

    @property
    def eos(self) -> tuple[str, int] | None:
        """The token that ends a text, and its id."""
        return None if self._inner.eos_token_id is None else (self._inner.eos_token, self._inner.eos_token_id)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token."""
        return self._inner.get_vocab()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to ids, with the BOS token where the model's tokenizer adds one; without `special`, never with one."""
        return list(self._inner(text, add_special_tokens=special)["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Messages `{"role": …, "content": …}` to the ids of `render`."""
        return self.encode(self.render(messages), special=False)  # the template has the BOS already

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """Messages as the text of the model's chat template, ready for an `answer`, or for more of the last message.

        Raises UsageError where there is no template or it does not take the messages.
        """
        if not self.has_chat_template:
            raise UsageError("this model has no chat template: prompt it with plain text (--raw)")
        try:
            return self._inner.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer, continue_final_message=not answer
            )
        except Exception as error:  # templates raise what they like
            raise UsageError(
                f"the model's chat template refuses these messages ({error}): expected role and content in each"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, without special tokens."""
        return self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Text as its tokens come: pieces that join to the whole text, never half a character.

    A window of ids is decoded with and without the newest; what they differ in is new. The window begins with the
    tokens of the piece before: the text of a token may depend on its neighbour, and byte tokens are judged in runs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._old = 0  # so many of them belong to the piece before
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_HALF) or not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        if piece:
            self._ids = self._ids[self._old :]
            self._old = len(self._ids)
            self._shown = self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come, incomplete bytes as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        piece, self._ids, self._old, self._shown = text[len(self._shown) :], [], 0, ""
        return piece


class StopMatcher:
    """Cuts text at the stop string that is complete first, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that can be shown; after a stop string, nothing."""
        if self.stopped:
            return ""
        self._held += piece
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _overlap(self, stop: str) -> int:
        """How long an end of the held text is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
