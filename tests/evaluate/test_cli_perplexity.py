"""jaxsvd perplexity: what it prints, draws and refuses."""

import json
import math
import sys

import numpy as np
import pytest
from evaluating import KEPT, TEXT, with_rank, write_texts

import jaxsvd
from jaxsvd import cli
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.evaluate import Result, Row, perplexity, report
from jaxsvd.tokenizer import Tokenizer


def run(*arguments):
    return cli.run("perplexity", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def low(worded, tmp_path_factory):
    """The same model, one matrix of it factored."""
    return with_rank(worded[0], tmp_path_factory.mktemp("low") / "model")


@pytest.fixture(scope="module")
def lm(worded):
    return jaxsvd.load(worded[0])


def answer(capfd):
    return json.loads(capfd.readouterr().out)


def test_json_is_one_object(worded, low, texts, lm, capfd):
    arguments = [worded[0], "--text", texts[0], "--text", texts[1], "--compare", low, "--window", 32, "--json", "-q"]
    assert run(*arguments) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["window"] == 32
    assert [(row["model"], row["text"]) for row in found["results"]] == [
        (str(model), str(text)) for model in (worded[0], low) for text in texts
    ]
    base, backwards, factored, _ = found["results"]
    expected = perplexity(lm, TEXT, 32)
    assert base["perplexity"] == pytest.approx(expected.perplexity)
    assert base["standard_error"] == pytest.approx(expected.standard_error)
    assert (base["windows"], base["tokens"]) == (expected.windows, expected.tokens)
    assert base["tokens_per_second"] > 0
    assert abs(backwards["perplexity"] / base["perplexity"] - 1) > 1e-3
    assert (base["keep"], factored["keep"]) == (1, pytest.approx(KEPT))
    assert (base["ratio"], base["ratio_log_error"]) == (None, None)
    assert factored["ratio"] == pytest.approx(factored["perplexity"] / base["perplexity"])
    assert 0 < factored["ratio_log_error"] < 0.1


def test_every_option_changes_what_it_says(worded, texts, lm, capfd, monkeypatch):
    seen = []
    load = jaxsvd.api.load
    monkeypatch.setattr("jaxsvd.api.load", lambda *args: seen.append(args[1:3]) or load(*args))
    base = [worded[0], "--text", texts[0], "--json", "-q"]
    assert run(*base) == 2  # 372 tokens: the default window is 512
    assert "less than one window of 512" in capfd.readouterr().err
    assert run(*base, "--window", 16, "--windows", 3, "--batch-size", 2) == 0
    (row,) = answer(capfd)["results"]
    assert (row["windows"], row["tokens"]) == (3, 45)
    assert row["perplexity"] == pytest.approx(perplexity(lm, TEXT, 16, windows=3).perplexity)
    assert run(*base, "--window", 64, "--windows", 1) == 0
    (row,) = answer(capfd)["results"]
    assert (row["windows"], row["tokens"], row["standard_error"]) == (1, 63, None)
    assert run(*base, "--window", 64, "--windows", 1, "--dtype", "bfloat16", "--backend", "xla") == 0
    assert answer(capfd)["results"][0]["perplexity"] != row["perplexity"]
    assert seen == [(None, "auto"), (None, "auto"), ("bfloat16", "xla")]


def test_batch_size_arrives(worded, texts, capfd, monkeypatch):
    sizes, score = [], jaxsvd.engine.Engine.score
    monkeypatch.setattr(jaxsvd.engine.Engine, "score", lambda self, rows: sizes.append(len(rows)) or score(self, rows))
    assert run(worded[0], "--text", texts[0], "--window", 64, "--batch-size", 3, "-q") == 0
    assert sizes == [3, 3]  # five windows: the last batch is filled up
    sizes.clear()
    assert run(worded[0], "--text", texts[0], "--window", 64, "-q") == 0
    assert sizes == [5]


def test_the_table_is_on_stdout_and_progress_on_stderr(worded, low, texts, capfd):
    assert run(worded[0], "--text", texts[0], "--window", 32, "--compare", low) == 0
    out, err = capfd.readouterr()
    head, first, second = out.splitlines()
    for word in ("model", "keep", "perplexity", "ratio", "windows", "tokens", "tokens/s"):
        assert word in head.split()
    assert str(worded[0]) in first and "1.000" in first and "±" in first
    assert str(low) in second and "0.942" in second and second.count("±") == 2
    assert "compiled prefill" in err


def test_a_plot(worded, low, texts, tmp_path, capfd):
    file = tmp_path / "plot.png"
    base = [worded[0], "--window", 64, "--plot", file, "-q"]
    assert run(*base, "--text", texts[0], "--compare", low) == 0
    image = file.read_bytes()
    assert image.startswith(b"\x89PNG") and "perplexity" in capfd.readouterr().out
    assert run(*base, "--text", texts[0], "--text", texts[1], "--compare", low) == 0
    assert file.read_bytes() != image  # a second line


def test_what_the_plot_shows(worded, low, texts, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from jaxsvd.evaluate import measure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0]))
    rows = measure([str(worded[0]), str(low)], texts, 64)
    report.plot(rows, tmp_path / "plot.png")
    (axes,) = drawn
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [str(text) for text in texts]
    for container, text in zip(axes.containers, texts, strict=True):
        points = {row.keep: row.result for row in rows if row.text == str(text)}
        x, y = container.lines[0].get_data()
        keeps = sorted(points)
        assert keeps == [pytest.approx(KEPT), 1] == list(x) and list(y) == [points[keep].perplexity for keep in keeps]
        (bars,) = container.lines[2]
        heights = [np.ptp(segment[:, 1]) / 2 for segment in bars.get_segments()]
        np.testing.assert_allclose(heights, [points[keep].standard_error for keep in keeps])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL"], "no text"),
        (["MODEL", "--text", "/no/such/file"], "can't be read as UTF-8"),
        (["MODEL", "--text", "TEXT", "--window", "1"], "at least 2"),
        (["MODEL", "--text", "TEXT", "--window", "513"], "room for 512"),
        (["MODEL", "--text", "TEXT", "--windows", "0"], "windows is 0"),
        (["MODEL", "--text", "TEXT", "--window", "64", "--windows", "6"], "has 5 windows of 64 tokens: 6 were"),
        (["MODEL", "--text", "TEXT", "--window", "64", "--batch-size", "0"], "batch_size is 0"),
        (["MODEL", "--text", "TEXT", "--window", "64", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["MODEL", "--text", "TEXT", "--window", "64", "--backend", "abacus"], "backend"),
        (["MODEL", "--text", "TEXT", "--window", "64", "--compare", "no-such-model"], "no-such-model"),
        (["MODEL", "--text", "TEXT", "--plot", "/no/such/folder/plot.png"], "can't be written"),
        (["MODEL", "--text", "TEXT", "--plot", "plot.xyz"], "ends in .png, .pdf, .svg"),
        (["TINY", "--text", "TEXT"], "tokenizer"),
        (["no-such-model", "--text", "TEXT"], "qwen3-4b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    worded, tiny_llama, texts, tmp_path, capfd, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    named = {"MODEL": worded[0], "TINY": tiny_llama[0], "TEXT": texts[0]}
    assert run(*[named.get(argument, argument) for argument in arguments], "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and "Traceback" not in err and len(err.splitlines()) == 1
    assert not (tmp_path / "plot.png").exists()


def test_without_matplotlib_a_plot_is_refused_before_the_work(worded, texts, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("jaxsvd.api.load", lambda *_: pytest.fail("loaded before the check"))
    assert run(worded[0], "--text", texts[0], "--plot", "plot.png", "-q") == 2
    assert "pip install 'jaxsvd[plot]'" in capfd.readouterr().err


def test_a_plot_that_fails_comes_after_the_numbers(worded, texts, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert run(worded[0], "--text", texts[0], "--window", 64, "--plot", tmp_path / "plot.png", "-q") == 3
    out, err = capfd.readouterr()
    assert "perplexity" in out and "No space left on device" in err and len(err.splitlines()) == 1


def test_infinite_is_not_undefined():
    result = Result(math.inf, math.nan, 1, 31, 5.0, np.array([np.inf]), "d")
    (row,) = report.as_json([Row("model", 1.0, "text", result, None)])["results"]
    assert (row["perplexity"], row["standard_error"], row["ratio"]) == ("Infinity", None, None)
    assert float(row["perplexity"]) == math.inf


def test_every_model_is_opened_once_and_every_text_read_once_by_each(worded, low, texts, tmp_path, capfd, monkeypatch):
    opened, tokenized = [], []
    for kind, method, seen in ((Checkpoint, "__init__", opened), (Tokenizer, "encode", tokenized)):
        plain = getattr(kind, method)
        monkeypatch.setattr(
            kind,
            method,
            lambda self, *args, _seen=seen, _plain=plain, **kw: _seen.append(1) or _plain(self, *args, **kw),
        )
    arguments = ["--text", texts[0], "--text", texts[1], "--window", 64, "--plot", tmp_path / "plot.png", "-q"]
    assert run(worded[0], "--compare", low, *arguments) == 0
    assert len(opened) == 2 and len(tokenized) == 2 * 2
