"""Tokens to text as they come, stop strings, and the tokenizer's edges."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Raw

from jaxsvd.errors import ModelError, UsageError
from jaxsvd.tokenizer import StopMatcher, TextStream, Tokenizer

HALF = "\ufffd"


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return Tokenizer(smollm)


def save(raw, folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def byte_fallback_folder(folder):
    """A tokenizer as Llama 2's: few characters, all others as bytes; a BOS token and a space go in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    raw = Raw(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return save(raw, folder, unk_token="<unk>", chat_template=template)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    return Tokenizer(byte_fallback_folder(tmp_path_factory.mktemp("fallback")))


# TextStream.

TEXTS = {
    "English": "The capital of France is Paris. It's 3,456.78 km² away — isn't it?",
    "emoji": "🙂🙃 family: 👩‍👩‍👧‍👦, flag: 🇨🇭, skin: 👍🏽, old: ☎️ 🦥🦦🧿",
    "Chinese": "法国的首都是巴黎。今天天气很好，我们去公园吧！𠮷野家龘",
    "Arabic": "مرحبا بالعالم، كيف حالك؟ اللُّغَةُ العَرَبِيَّة",
    "combining": "e\u0301a\u0308o\u0302\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢ हिन्दी ไทย 한국어 한국어",
    "newlines": "one\n\ntwo\r\n\n\n\tthree\n \n  \n",
    "spaces": " " * 70 + "x" + " " * 33 + "\t\t\t" + " " * 5,
    "code": 'def f(x: int) -> str:\n    return f"{x!r:>10}"  # ok\n\n\nif __name__ == "__main__":\n    print(f(3))\n',
    "punctuation": "don't . , ! ? ' s 're n't <|x|> </s> -- … “quoted” ‘single’",
    "replacement": "a\ufffdb \ufffd\ufffd c\ufffd",
    "control": "a\x00b\x1f\x7f\u200b\u200d\u2028\ufeff",
    "one": "a",
}


def pieces_of(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in ids], stream.flush()


def check(tokenizer, ids):
    pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    assert not any(piece.endswith(HALF) for piece in pieces)


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_join_to_the_text(tokenizer, name):
    ids = tokenizer.encode(TEXTS[name])
    assert tokenizer.decode(ids) == TEXTS[name]
    check(tokenizer, ids)


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_of_a_byte_fallback_tokenizer_join_to_the_text(fallback, name):
    """Its decoder looks at whole runs of bytes: two characters of several bytes in a row are one run."""
    check(fallback, fallback.encode(TEXTS[name]))


def test_all_texts_in_one(tokenizer):
    ids = tokenizer.encode("".join(TEXTS.values()))
    check(tokenizer, ids)
    for start in range(1, 60, 7):  # a stream may begin within a character
        check(tokenizer, ids[start:])


def test_characters_come_as_soon_as_they_are_whole(tokenizer):
    text = "a🦥b龘c"
    stream = TextStream(tokenizer)
    shown, ids = "", tokenizer.encode(text)
    for i, token in enumerate(ids):
        shown += stream.push(token)
        whole = tokenizer.decode(ids[: i + 1])
        assert shown == (whole.rstrip(HALF) if whole.endswith(HALF) else whole)
    assert (shown, stream.flush()) == (text, "")


@pytest.mark.parametrize("seed", range(8))
def test_random_tokens(tokenizer, seed):
    import numpy as np

    rng = np.random.default_rng(seed)
    check(tokenizer, rng.integers(0, 49152, 200).tolist())


@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_are_no_utf8(tokenizer, seed):
    """Bytes at random from the single-byte tokens: lead bytes without continuation and the reverse."""
    import numpy as np

    table = tokenizer._inner.get_vocab()
    high = [table[token] for token in pre_tokenizers.ByteLevel.alphabet() if token in table]
    rng = np.random.default_rng(seed)
    check(tokenizer, rng.choice(high, 120).tolist())


def test_special_tokens_give_no_text(tokenizer):
    ids = [1, *tokenizer.encode("Hello"), 2, *tokenizer.encode(" there"), 0, 2]
    check(tokenizer, ids)
    assert tokenizer.decode(ids) == "Hello there"


def test_flush_gives_the_incomplete_end(tokenizer):
    ids = tokenizer.encode("a🦥")[:-1]
    pieces, rest = pieces_of(tokenizer, ids)
    assert "".join(pieces) == "a"
    assert rest == tokenizer.decode(ids)[1:]
    assert set(rest) == {HALF}


def test_an_empty_stream(tokenizer):
    assert pieces_of(tokenizer, []) == ([], "")


def test_a_stream_costs_the_same_at_every_token(tokenizer, monkeypatch):
    """Only a short window is decoded again, however long the text is."""
    longest = 0
    decode = tokenizer.decode

    def watched(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", watched)
    stream = TextStream(tokenizer)
    for token in tokenizer.encode(TEXTS["code"] * 5):
        stream.push(token)
    assert longest < 12


# StopMatcher.


def cut(text, *stops):
    """What should be shown of a text: all before the first stop string."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


STOPS = [
    ("one stop here", ["stop"]),
    ("stop", ["stop"]),
    ("nothing", ["stop"]),
    ("almost sto", ["stop"]),
    ("aaab", ["aab"]),
    ("aaaaaaab!", ["aaab"]),
    ("abababac", ["ababac"]),
    ("sstosstop", ["stop"]),
    ("x END y STOP z", ["STOP", "END"]),
    ("abcx", ["abcd", "bce"]),
    ("a\n\nb", ["\n\n"]),
    ("a\n b\n\n\nc", ["\n\n", "b\n\n\n\n"]),
    ("你好世界", ["世"]),
    ("no stops", []),
    ("", ["stop"]),
]


def chunks(text, sizes):
    at = 0
    for size in sizes:
        yield text[at : at + size]
        at += size
    yield text[at:]


@pytest.mark.parametrize(("text", "stops"), STOPS)
@pytest.mark.parametrize(
    "sizes", [(), (1,) * 40, (2,) * 20, (3, 1, 0, 4), (0, 5, 1)], ids=["whole", "1", "2", "3", "5"]
)
def test_stop_strings(text, stops, sizes):
    matcher = StopMatcher(stops)
    shown = ""
    for piece in chunks(text, sizes):
        shown += matcher.push(piece)
        assert cut(text, *stops).startswith(shown)  # never more than may be shown
    shown += matcher.flush()
    assert (shown, matcher.stopped) == (cut(text, *stops), any(stop in text for stop in stops))
    assert matcher.flush() == ""


def test_nothing_is_held_without_reason():
    matcher = StopMatcher(["stop"])
    assert matcher.push("hello s") == "hello "
    assert matcher.push("un") == "sun"
    assert matcher.push("st") == ""
    assert matcher.push("sto") == "st"
    assert matcher.flush() == "sto"


def test_nothing_comes_after_the_stop():
    matcher = StopMatcher(["b"])
    assert [matcher.push("abc"), matcher.push("d"), matcher.flush(), matcher.stopped] == ["a", "", "", True]


@pytest.mark.parametrize("stops", [["bcd", "c"], ["c", "bcd"], ["bc", "abcd"]], ids=str)
def test_a_stop_string_inside_another_counts_whatever_the_pieces(stops):
    """Which of them ends the text must not hang on how the tokens cut it."""
    results = set()
    for sizes in ((), (1,) * 4, (2,), (3,), (1, 2)):
        matcher = StopMatcher(stops)
        results.add("".join(map(matcher.push, chunks("abcde", sizes))) + matcher.flush())
        assert matcher.stopped
    assert len(results) == 1


# Tokenizer.


def test_encoding_and_decoding(tokenizer):
    ids = tokenizer.encode("Hello")
    assert all(type(token) is int for token in ids)
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_a_chat_has_the_template_of_the_model(tokenizer):
    assert tokenizer.has_chat_template
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    text = tokenizer._inner.decode(ids)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(1) == text.count("<|im_start|>")


def test_a_chat_has_one_bos(fallback):
    assert fallback.encode("ab")[0] == 1
    assert fallback.encode("ab").count(1) == 1
    ids = fallback.encode_chat([{"role": "user", "content": "ab"}])
    assert (ids[0], ids.count(1)) == (1, 1)


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"content": 3}], [{}], ["hello"]], ids=str)
def test_messages_that_a_template_refuses(tmp_path, messages):
    folder = byte_fallback_folder(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = (
        "{% for m in messages %}{% if m.content is not string or not m.role %}"
        "{{ raise_exception('roles and strings, please') }}{% endif %}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(UsageError, match="refuses these messages"):
        Tokenizer(folder).encode_chat(messages)


def test_no_chat_template(tmp_path):
    folder = byte_fallback_folder(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    tokenizer = Tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "content", [None, "", "{ broken", "[]", "{}", '{"model": {"type": "BPE"}}', "\x00\xff"], ids=repr
)
def test_a_missing_or_damaged_tokenizer(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(ModelError, match=f"{tmp_path.name} has no tokenizer that works"):
        Tokenizer(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer that works"):
        Tokenizer(tmp_path / "nothing")


def test_a_truncated_tokenizer(tmp_path):
    folder = byte_fallback_folder(tmp_path)
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(folder)
