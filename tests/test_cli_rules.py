"""The rules that every command keeps, whichever it is; what its own options do, its own tests say."""

import argparse
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsvd import __version__, cli
from jaxsvd.errors import CheckFailed, JaxsvdError, ModelError, UsageError

TESTS = Path(__file__).parent
SCRIPTS = TESTS.parent / "scripts"
COMMON = {"-h", "--help", "--version", "--json", "-q", "--quiet"}
EVERY = pytest.mark.parametrize("name", cli.COMMANDS)


@pytest.fixture
def pretend(monkeypatch):
    """Have a command that takes the common options only do something else."""

    def pretended(does):
        module = type(sys)("pretended")
        module.arguments = lambda parser: cli.common.finish(parser, does)
        monkeypatch.setitem(cli.COMMANDS, "pretended", module)

    return pretended


def options_of(name):
    parser = argparse.ArgumentParser()
    cli.COMMANDS[name].arguments(parser)
    return parser._option_string_actions


@EVERY
def test_every_option_is_in_the_tests_of_its_command(name):
    """Whether these would fail if it were ignored, no test can say: look there when an option is added."""
    texts = [path.read_text("utf-8") for path in TESTS.rglob("test_*.py")]
    own = [text for text in texts if f'cli.run("{name}"' in text]
    assert own, "no test runs it"
    assert {option for option in options_of(name) if not any(f'"{option}"' in text for text in own)} <= COMMON
    assert all(f'"{option}"' in "".join(own) for option in ("--json", "-q"))


@EVERY
def test_every_command_has_the_common_options(name, capsys):
    options = options_of(name)
    assert options.keys() >= COMMON and options["-q"] is options["--quiet"]
    for version in (lambda: cli.run(name, ["--version"]), lambda: cli.main([name, "--version"])):
        with pytest.raises(SystemExit, match="0"):
            version()
        assert capsys.readouterr().out == f"jaxsvd {__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        cli.run(name, ["--no-such-option"])
    out, err = capsys.readouterr()
    assert out == "" and "usage: " in err


@EVERY
def test_every_command_has_a_door(name):
    script = SCRIPTS / f"{name.replace('-', '_')}.py"
    assert f'sys.exit(run("{name}"))' in script.read_text("utf-8")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {script.name}")


def test_there_is_no_other_door():
    """The demo is a command line of two others, and has no options."""
    names = {name.replace("-", "_") for name in cli.COMMANDS}
    assert {path.stem for path in SCRIPTS.glob("*.py")} - {"demo"} == names
    done = subprocess.run([sys.executable, "-m", "jaxsvd.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"jaxsvd {__version__}\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckFailed("why"), 1),
        (UsageError("why"), 2),
        (ModelError("why"), 2),
        (JaxsvdError("why"), 3),
        (OSError("why"), 3),
        (MemoryError("why"), 3),
        (RuntimeError("why"), 3),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_exit_codes(pretend, capsys, error, code):
    def fails(_):
        raise error

    pretend(fails)
    assert cli.run("pretended", []) == code
    out, err = capsys.readouterr()
    assert out == "" and ("why" in err) == (code != 130)
    assert ("Traceback" in err) == isinstance(error, MemoryError | RuntimeError), "what nobody expected"


@pytest.mark.parametrize("quiet", ["-q", "--quiet"])
def test_quiet(pretend, capsys, quiet):
    pretend(lambda _: print("result") or logging.getLogger("jaxsvd.part").info("progress"))
    assert cli.run("pretended", []) == 0
    assert capsys.readouterr() == ("result\n", "progress\n")
    assert cli.run("pretended", [quiet]) == 0
    assert capsys.readouterr() == ("result\n", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_quiet_has_no_bars_on_a_terminal_either(worded, tmp_path, monkeypatch, capsys):
    work = {
        "convert": [worded[0], tmp_path / "converted"],
        "compress": [worded[0], tmp_path / "low", "--method", "svd", "--allocate", "uniform", "--rank-multiple", 1],
        "generate": ["--model", worded[0], "-p", "x", "--max-new-tokens", 1],
    }
    for name, arguments in work.items():
        shown = []
        for extra in ([], ["--quiet"]):
            monkeypatch.setattr(sys, "stderr", Terminal())
            force = ["--force"] if extra and name != "generate" else []
            assert cli.run(name, [str(argument) for argument in (*arguments, *force, *extra)]) == 0
            shown.append(sys.stderr.getvalue())
        assert "%|" in shown[0] and shown[1] == "", name


def test_quiet_silences_the_hubs_bars(worded, monkeypatch):
    """They are read from the environment when its package is imported, so that a process of its own has to tell."""
    code = (
        "import sys; from jaxsvd import cli; code = cli.run('inspect', sys.argv[1:]); "
        "from huggingface_hub.utils import are_progress_bars_disabled as disabled; print(disabled(), file=sys.stderr)"
    )
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    for extra, silent in (([], "False\n"), (["-q"], "True\n")):
        command = [sys.executable, "-c", code, worded[0], "--json", *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == silent and json.loads(done.stdout)
