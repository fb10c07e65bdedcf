import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsvd import cli

ROOT = Path(__file__).parent.parent


def generate(*arguments):
    return cli.run("generate", [str(argument) for argument in arguments])


def test_text_goes_to_stdout_and_statistics_to_stderr(smollm, capfd):
    assert generate("--model", smollm, "-p", "What is the capital of France?", "--max-new-tokens", 16) == 0
    out, err = capfd.readouterr()
    assert out == "The capital of France is Paris.\n"
    for word in ("tokens/s", "GB/s", "loaded in", "compiled in", "first token", "peak memory", "float32"):
        assert word in err


def test_quiet_is_quiet(source, capfd):
    assert generate("--model", source, "-p", "The capital of France is", "--raw", "--max-new-tokens", 4, "-q") == 0
    out, err = capfd.readouterr()
    assert out.strip() and err == ""


def test_json_is_one_object(source, capfd, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time")
    monkeypatch.setattr("sys.stdin", io.StringIO("The capital of France is"))
    arguments = ["--model", source, "-p", "-", "--prompt-file", file, "--raw", "--max-new-tokens", 5, "--json", "-q"]
    assert generate(*arguments) == 0
    answer = json.loads(capfd.readouterr().out)
    assert [result["prompt"] for result in answer["results"]] == ["The capital of France is", "Once upon a time"]
    assert all(len(result["token_ids"]) == 5 for result in answer["results"])
    assert all(result["finish_reason"] == "length" for result in answer["results"])
    assert answer["statistics"]["new_tokens"] == 10


def test_several_prompts_are_printed_whole(source, capfd):
    assert generate("--model", source, "-p", "One, two,", "-p", "A, B,", "--raw", "--max-new-tokens", 4, "-q") == 0
    out = capfd.readouterr().out
    assert out.index("=== One, two,") < out.index("=== A, B,")


def test_stop_and_sampling_options_arrive(source, capfd):
    base = ["--model", source, "-p", "One, two, three,", "--raw", "--max-new-tokens", 12, "--json", "-q"]
    texts = []
    for extra in ([], ["--temperature", 1.5, "--seed", 1], ["--temperature", 1.5, "--seed", 2]):
        assert generate(*base, *extra) == 0
        texts.append(json.loads(capfd.readouterr().out)["results"][0]["text"])
    assert len(set(texts)) == 3
    assert generate(*base, "--temperature", 1.5, "--seed", 1) == 0
    assert json.loads(capfd.readouterr().out)["results"][0]["text"] == texts[1]
    stop = texts[0][5:9]
    assert generate(*base, "--stop", stop) == 0
    assert json.loads(capfd.readouterr().out)["results"][0]["text"] == texts[0][: texts[0].index(stop)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model", "-p", "x"], "qwen3-4b"),
        (["--model", "no-such/model", "-p", "x"], "Hub can't be reached"),
        (["--model", "MODEL"], "no prompt"),
        (["--model", "MODEL", "-p", " "], "empty"),
        (["--model", "MODEL", "--prompt-file", "/no/such/file"], "can't be read"),
        (["--model", "MODEL", "-p", "x", "--top-p", "2"], "top_p"),
        (["--model", "MODEL", "-p", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--model", "MODEL", "-p", "x", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["--model", "MODEL", "-p", "x", "--backend", "abacus"], "backend"),
        (["--model", "MODEL", "-p", "x", "--max-new-tokens", "100000"], "room for"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(smollm, capfd, arguments, words):
    assert generate(*[smollm if argument == "MODEL" else argument for argument in arguments], "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and "Traceback" not in err and len(err.splitlines()) == 1


def test_compress_writes_a_model_that_generate_runs(tmp_path, tiny_llama, smollm, capfd):
    import shutil

    source = tmp_path / "source"
    shutil.copytree(tiny_llama[0], source)
    assert cli.run("compress", [str(source), str(tmp_path / "target"), "--keep", "0.5", "-q"]) == 2
    assert "tokenizer" in capfd.readouterr().err  # the tiny model has none, and it is needed to read the text
    assert not (tmp_path / "target").exists()
    assert cli.run("compress", [str(smollm), str(tmp_path), "--keep", "0.5", "-q"]) == 2
    assert "exists" in capfd.readouterr().err


@pytest.mark.parametrize("script", ["generate", "compress", "compile"])
def test_scripts_are_doors(script):
    command = [sys.executable, ROOT / "scripts" / f"{script}.py"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout
    done = subprocess.run([*command, "--no-such-option"], capture_output=True, text=True)
    assert done.returncode == 2
    done = subprocess.run([sys.executable, "-m", "jaxsvd.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0


def test_version_and_subcommands(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert "jaxsvd 0." in capsys.readouterr().out
    assert cli.main(["generate", "--model", "no-such-model", "-p", "x", "-q"]) == 2
