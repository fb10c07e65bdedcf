"""Perplexity from Python, against transformers."""

import math

import numpy as np
import pytest
from evaluating import KEPT, TEXT, copy_model, reference, with_rank, write_tokenizer

import jaxsvd
from jaxsvd.evaluate import compare, measure, perplexity

WINDOW = 32


@pytest.fixture(scope="module")
def lm(worded):
    return jaxsvd.load(worded[0])


@pytest.fixture(scope="module")
def expected(worded, lm):
    """The mean negative log-likelihood of every window, by transformers."""
    ids = lm.tokenizer.encode(TEXT, special=False)
    assert lm.encode(TEXT) == [0, *ids]  # the tokenizer would add a BOS
    return np.array(
        [-reference(worded[1], ids[i : i + WINDOW])[0].mean() for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    )


def test_all_windows(lm, expected):
    result = perplexity(lm, TEXT, WINDOW, batch_size=4)
    assert (result.windows, result.tokens) == (len(expected), len(expected) * (WINDOW - 1))
    np.testing.assert_allclose(result.nlls, expected, atol=1e-4)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    error = result.perplexity * expected.std(ddof=1) / math.sqrt(len(expected))
    assert result.standard_error == pytest.approx(error, rel=1e-3)
    assert result.tokens_per_second > 0


@pytest.mark.parametrize("count", [1, 3, 7])
def test_windows_are_evenly_spaced(lm, expected, count):
    result = perplexity(lm, TEXT, WINDOW, windows=count)
    chosen = [i * len(expected) // count for i in range(count)]
    np.testing.assert_allclose(result.nlls, expected[chosen], atol=1e-4)
    assert math.isnan(result.standard_error) == (count == 1)


def test_batches_change_nothing_and_have_one_size(worded, expected):
    for batch_size in (1, 5, 100):
        lm = jaxsvd.load(worded[0])
        np.testing.assert_allclose(perplexity(lm, TEXT, WINDOW, batch_size=batch_size).nlls, expected, atol=1e-4)
        assert len(lm.engine.compiled) == 2  # a prefill and its scores


def test_a_folder_and_a_file_will_do(worded, tmp_path, expected):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, "utf-8")
    np.testing.assert_allclose(perplexity(worded[0], file, WINDOW).nlls, expected, atol=1e-4)


def test_comparison_is_paired(worded, tmp_path, lm):
    other = with_rank(worded[0], tmp_path / "other")
    base, low = perplexity(lm, TEXT, WINDOW), perplexity(other, TEXT, WINDOW)
    found = compare(base, low)
    assert found.ratio == pytest.approx(low.perplexity / base.perplexity, rel=1e-6)
    differences = low.nlls - base.nlls
    assert found.log_error == pytest.approx(differences.std(ddof=1) / math.sqrt(base.windows))
    assert abs(found.ratio - 1) > 0.01 and compare(base, base) == (1.0, 0.0)
    for unlike in (perplexity(lm, TEXT, WINDOW, windows=3), perplexity(lm, TEXT[::-1], WINDOW)):
        with pytest.raises(jaxsvd.UsageError, match="same windows"):
            compare(base, unlike)
    rows = measure([str(worded[0]), str(other)], [TEXT, TEXT[:200]], WINDOW)
    assert [(row.model, row.text) for row in rows] == [
        (model, text) for model in (str(worded[0]), str(other)) for text in (TEXT, TEXT[:200])
    ]
    assert [row.comparison is None for row in rows] == [True, True, False, False]
    assert rows[2].comparison.ratio == pytest.approx(found.ratio, rel=1e-5)
    assert rows[3].comparison.ratio == pytest.approx(rows[3].result.perplexity / rows[1].result.perplexity, rel=1e-5)
    assert [row.keep for row in rows] == pytest.approx([1, 1, KEPT, KEPT])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window is 1: expected at least 2"),
        ({"window": 513}, "window is 513: the model has room for 512"),
        ({"windows": 0}, "windows is 0"),
        ({"windows": 1000}, "windows of 32 tokens: 1000 were asked for"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"text": "short"}, "the text has 5 tokens: less than one window of 32"),
        ({"text": ""}, "0 tokens"),
    ],
    ids=str,
)
def test_what_is_refused(lm, options, message):
    with pytest.raises(jaxsvd.UsageError, match=message):
        perplexity(lm, **{"text": TEXT, "window": WINDOW} | options)


def test_files_that_are_refused(lm, tmp_path):
    for name, content in (("missing.txt", None), ("binary.txt", b"\xff\xfe\xff")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(jaxsvd.UsageError, match=f"{name} can't be read as UTF-8"):
            perplexity(lm, tmp_path / name)


def test_models_with_other_tokens_are_not_compared(worded, tmp_path, monkeypatch):
    upside_down = copy_model(worded[0], tmp_path / "order")
    write_tokenizer(upside_down, order="".join(reversed("abcdefghijklmnopqrstuvwxyz ")))
    merged = copy_model(worded[0], tmp_path / "cut")
    write_tokenizer(merged, lowercase=True)
    monkeypatch.setattr("jaxsvd.api.load", lambda *_: pytest.fail("loaded before the check"))
    for other, reason in ((upside_down, "other tokens"), (merged, "cut the text differently")):
        with pytest.raises(jaxsvd.UsageError, match=f"can't be compared with .*{reason}"):
            measure([str(worded[0]), str(other)], [TEXT], WINDOW)


def test_smollm_against_transformers(smollm):
    import torch
    import transformers

    torch.set_num_threads(1)
    lm = jaxsvd.load(smollm, dtype="float32")
    text = "The history of the printing press begins in the fifteenth century, in Mainz on the Rhine. " * 4
    result = perplexity(lm, text, 32, windows=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    ids = lm.tokenizer.encode(text, special=False)
    starts = [0, len(ids) // 32 // 2 * 32]
    np.testing.assert_allclose(result.nlls, [-reference(model, ids[i : i + 32])[0].mean() for i in starts], atol=1e-4)
