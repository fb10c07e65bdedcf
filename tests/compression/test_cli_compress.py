"""jaxsvd compress: every flag changes what it says, one object of JSON, errors in one line."""

import json

import pytest
from evaluating import write_texts

from jaxsvd import cli

SMALL = ["--tokens", 1024, "--keep", 0.5]


def run(*arguments):
    return cli.run("compress", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"), times=100)


@pytest.fixture
def made(worded, texts, tmp_path, capfd):
    """The JSON of a run, and what the target's config.json says of it (None for a dry run)."""
    targets = (tmp_path / str(i) for i in range(99))

    def ask(*arguments, text=("--calibration", texts[0]), small=SMALL):
        target = next(targets)
        assert run(worded[0], target, *small, *text, *arguments, "--json", "-q") == 0
        out, err = capfd.readouterr()
        assert err == "" and len(out.splitlines()) == 1
        found, config = json.loads(out), target / "config.json"
        assert found["target"] == str(target)
        return found, json.loads(config.read_text("utf-8"))["low_rank"] if config.exists() else None

    return ask


def test_how_much_is_kept_and_of_what(made):
    found, said = made("--keep", 0.7)
    assert found["keep_linears"] == pytest.approx(0.7, abs=0.05) and said["keep"]["asked"] == 0.7
    assert made(small=["--tokens", 1024])[1]["keep"]["asked"] == 0.8
    base, said = made()
    assert found["keep_linears"] > base["keep_linears"] and found["matrices"] == 14
    assert {path.split(".")[2] for path in said["ranks"]} == {"0", "1"}
    assert any(rank % 24 for rank in said["ranks"].values())
    assert all(".mlp." in path for path in made("--only", "mlp")[1]["ranks"])
    assert all(".self_attn." in path for path in made("--only", "attention", "--keep", 0.8)[1]["ranks"])
    assert all(".layers.1." in path for path in made("--dense-layers", 0)[1]["ranks"])
    assert all(rank % 24 == 0 for rank in made("--rank-multiple", 24, "--keep", 0.8)[1]["ranks"].values())


def test_how_it_is_chosen(made):
    base, said = made()
    assert (said["method"], said["allocate"], said["refit"]) == ("kfac", "global", False)
    other, said = made("--method", "svd-llm")
    assert said["method"] == "svd-llm" and other["plan"]["loss"] > base["plan"]["loss"]
    other, said = made("--allocate", "uniform")
    assert said["allocate"] == "uniform" and other["plan"]["loss"] is None
    other, said = made("--refit")
    assert said["refit"] is True and other["plan"] == base["plan"]
    other, _ = made("--width", "--only", "mlp", "--keep", 0.4)
    assert other["plan"]["widths"] and not base["plan"]["widths"]


def test_the_text(made, texts):
    def calibration(*arguments, **options):
        return made(*arguments, **options)[1]["calibration"]

    base = calibration()
    assert base["tokens"] == 1024 and calibration() == base
    assert calibration("--tokens", 2048)["tokens"] == 2048
    both = calibration(text=("--calibration", *texts))
    assert both == calibration(text=("--calibration", texts[0], "--calibration", texts[1]))
    digests = [base, both, calibration("--seed", 1), calibration(text=())]
    assert len({found["digest"] for found in digests}) == 4
    half, whole = made("--gradient-tokens", 512), made("--gradient-tokens", 1024)
    assert made()[1] == half[1], "half of them is the default"
    assert half[1]["predicted_loss"] != whole[1]["predicted_loss"]


def test_a_dry_run_is_gone_on_with(worded, texts, tmp_path, capfd):
    base = [worded[0], tmp_path / "target", *SMALL, "--calibration", texts[0]]
    assert run(*base, "--dry-run", "-q") == 0
    head, *rows, last = capfd.readouterr().out.splitlines()
    assert head.split() == ["layer", "q", "k", "v", "o", "gate", "up", "down"] and len(rows) == 2
    assert last.startswith("plan: ") and not (tmp_path / "target").exists()
    assert run(*base, "-q") == 2
    assert "--resume" in capfd.readouterr().err
    assert run(*base, "--resume") == 0
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    assert f"plan: {line}" == last and "peak memory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert run(*base, "-q") == 2
    assert "exists" in capfd.readouterr().err
    assert run(*base, "--keep", 0.7, "--force", "-q") == 0
    assert json.loads((tmp_path / "target" / "config.json").read_text("utf-8"))["low_rank"]["keep"]["asked"] == 0.7


def test_the_analysis_can_be_kept(made, tmp_path, monkeypatch):
    first = made("--work", tmp_path / "work")
    assert any((tmp_path / "work").iterdir())
    monkeypatch.setattr("jaxsvd.compression.passes.LayerPass.forward", None)  # the analysis must not run again
    assert made("--work", tmp_path / "work", "--keep", 0.7)[0]["keep_linears"] > first[0]["keep_linears"]


def test_the_report(made, tmp_path):
    pytest.importorskip("matplotlib")
    made("--report", tmp_path / "plan.png", "--dry-run")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "1.5"], "keep is 1.5"),
        (["--method", "magic"], "kfac"),
        (["--only", "magic"], "attention"),
        (["--rank-multiple", "0"], "rank_multiple is 0"),
        (["--tokens", "3"], "tokens is 3"),
        (["--gradient-tokens", "3"], "expected 512 to the"),
        (["--gradient-tokens", "99999"], "expected 512 to the"),
        (["--report", "plan.xyz"], "ends in .png"),
        # What nothing would read is not accepted.
        (["--method", "asvd", "--allocate", "uniform", "--gradient-tokens", "512"], "takes no gradients"),
        *(
            (["--method", "svd", "--allocate", "uniform", *option], f"{option[0]} would change nothing")
            for option in (["--calibration", "x.txt"], ["--tokens", "512"], ["--seed", "0"])
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_message_and_exit_code_2(worded, tmp_path, capfd, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run(worded[0], "target", *arguments, "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_text_needs_a_tokenizer_and_the_target_a_place(tiny_llama, worded, tmp_path, capfd):
    assert run(tiny_llama[0], tmp_path / "target", "-q") == 2
    assert "tokenizer" in capfd.readouterr().err  # the tiny model has none, and it is needed to read the text
    assert not list(tmp_path.iterdir())
    assert run(worded[0], tmp_path, "-q") == 2
    assert "exists" in capfd.readouterr().err
