"""The rule of lengths."""

import pytest

from jaxsvd.buckets import buckets
from jaxsvd.errors import UsageError


@pytest.mark.parametrize(
    ("rule", "positions", "max_length", "platform", "expected"),
    [
        ("auto", 1024, None, "neuron", ((128, 256, 512), (128, 256, 512, 1024), 1024)),
        ("auto", 8192, 300, "gpu", ((128, 256, 320), (128, 256, 320), 300)),  # caches are of whole 32 tokens
        ("off", 8192, 50, "gpu", ((64,), (64,), 50)),
        ("auto", 1024, None, "cpu", ((16, 32, 64, 128, 256, 512), (128, 256, 512, 1024), 1024)),
        ("auto", 8192, 640, "neuron", ((128, 256, 512), (128, 256, 512, 640), 640)),
        ("auto", 8192, 1000, "neuron", ((128, 256, 512), (128, 256, 512, 1024), 1000)),  # whole chunks must fit
        ("auto", 8192, 513, "neuron", ((128, 256, 512), (128, 256, 512, 640), 513)),
        ("auto", 8192, 128, "neuron", ((128,), (128,), 128)),
        ("auto", 8192, 129, "neuron", ((128, 129), (128, 129), 129)),
        ("auto", 8192, 64, "neuron", ((64,), (64,), 64)),  # NxD Inference: a length below 128 is the only bucket
        ("auto", 8192, 1, "cpu", ((1,), (1,), 1)),
        ("off", 8192, None, "cpu", ((512,), (8192,), 8192)),
        ("off", 8192, 300, "cpu", ((300,), (300,), 300)),
        ("128,1024", 8192, None, "cpu", ((128, 1024), (128, 1024), 1024)),
        ("64, 512 / 1024,4096", 8192, None, "cpu", ((64, 512), (1024, 4096), 4096)),
        ("off/auto", 1024, None, "cpu", ((512,), (128, 256, 512, 1024), 1024)),
        ("auto/off", 1024, 256, "neuron", ((128, 256), (256,), 256)),
        ("16,32/auto", 512, None, "cpu", ((16, 32), (128, 256, 512), 512)),
        ("1024/auto", 1024, 1000, "cpu", ((1024,), (128, 256, 512, 1024), 1000)),
        ("512/1024", 1000, None, "cpu", ((512,), (1024,), 1000)),
    ],
)
def test_rules(rule, positions, max_length, platform, expected):
    assert buckets(rule, positions, platform, max_length) == expected


@pytest.mark.parametrize("lengths", ["auto", "off", "16,32/auto", "1,2,4,8/auto"])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 127, 128, 129, 300, 511, 512, 513, 1023, 1500])
def test_every_prompt_fits(lengths, length):
    try:
        found = buckets(lengths, 2048, "cpu", length)
    except UsageError as error:
        assert "never used" in str(error) and length < 32
        return
    assert found.length == length
    for tokens in range(1, length + 1):
        padded = found.padded(tokens)
        assert tokens <= padded <= found.capacity(padded) <= found.decode[-1]
        assert padded - (tokens - 1) // found.chunk * found.chunk in found.prefill
        assert tokens not in found.prefill or padded == tokens  # equality is allowed
        assert tokens not in found.decode or found.capacity(tokens) == tokens


@pytest.mark.parametrize(
    ("rule", "max_length", "message"),
    [
        ("automatic", None, "'automatic' in it: expected auto, off"),
        ("", None, "'' in it"),
        ("128,", None, "in it"),
        ("128;256", None, "in it"),
        ("256,128", None, "do not ascend"),
        ("128,128", None, "do not ascend"),
        ("0,128", None, "do not ascend"),
        ("-1", None, "do not ascend"),
        ("auto/off/auto", None, "more than one /"),
        ("auto", 0, "max_length is 0.*give 1 to 512"),
        ("auto", 513, "max_length is 513"),
        ("128,256", 256, "the last bucket is the longest text"),
        ("auto/256", 256, "the last bucket is the longest text"),
        ("64/100", None, "a prompt of 100 tokens is padded to 128"),
        ("512/128", None, "padded to 512"),
        ("128,512,600", None, "600 is never used behind 512"),
        ("128,512,600/auto", None, "600 is never used behind 512"),
        ("auto/512,1024", None, "1024 is never used behind 512"),
    ],
)
def test_what_is_refused(rule, max_length, message):
    with pytest.raises(UsageError, match=message):
        buckets(rule, 512, "cpu", max_length)


def lives(found, steps):
    """What happens to texts of all lengths: extensions and growths."""
    extensions, growths = set(), set()

    def room(size, tokens):
        capacity = found.capacity(max(size, tokens))
        growths.add((size, capacity))
        return capacity

    for prompt in range(1, found.length):
        padded = found.padded(prompt)
        size = min(padded, found.chunk)
        if padded > size:
            size = room(size, padded)
        extensions |= {(min(found.chunk, padded - start), size) for start in range(found.chunk, padded, found.chunk)}
        for most in range(prompt + 1, min(prompt + steps, found.length)):  # texts of one block, which ends anywhere
            room(size, most)
        for filled in range(prompt + steps, found.length, steps):
            size = room(size, filled)
        room(size, found.length - 1)
    return extensions, {(size, capacity) for size, capacity in growths if size < capacity}


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize(
    ("rule", "length"),
    [("auto", 300), ("auto", 1500), ("off", 700), ("16,32/auto", 300), ("8/9,10,11,16,40", None), ("5/5,6,50", None)],
)
def test_nothing_else_can_happen(rule, length, steps):
    found = buckets(rule, 2048, "cpu", length)
    extensions, growths = lives(found, steps)
    assert set(found.extensions()) == extensions
    assert set(found.growths(steps)) >= growths
    assert len(found.growths(steps)) <= len(growths) + 2 or rule == "8/9,10,11,16,40"


def test_other_chunks():
    assert buckets("auto", 4096, "gpu", chunk=2048).prefill == (128, 256, 512, 1024, 2048)
    assert buckets("off", 4096, "gpu", 1000, chunk=2048) == ((1024,), (1024,), 1000)
    assert buckets("64,256/auto", 4096, "gpu", chunk=2048).prefill == (64, 256)
