"""Kernel files are loaded against the emulated nki, and nothing else changes."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

import jaxsvd.kernels.neuron
from jaxsvd.kernels.neuron import emulator

TILES = "jaxsvd.kernels.neuron.tiles"
SHAPE = jax.ShapeDtypeStruct((4, 8), "bfloat16")
KERNEL = """
import nki
import nki.isa as nisa
import nki.language as nl
{imports}

@nki.jit
def kernel(x):
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=y, src=x)
    return y
"""


@pytest.fixture
def write(tmp_path):
    """A kernel file, with more imports or in other words."""

    def write(imports="", text=KERNEL):
        path = tmp_path / "kernel.py"
        path.write_text(text.format(imports=imports))
        return path

    return write


@pytest.fixture
def unchanged():
    """sys.modules and the package are the same after the test."""
    modules, attributes = dict(sys.modules), dict(vars(jaxsvd.kernels.neuron))
    yield
    assert dict(sys.modules) == modules
    assert vars(jaxsvd.kernels.neuron) == attributes


def test_kernels_of_the_package(unchanged):
    module = emulator.load("xuv")
    assert emulator.load("xuv") is module
    assert type(module.xuv).__module__.startswith("jaxsvd.kernels.neuron.emulator")


def test_files_from_elsewhere(unchanged, write):
    path = write()
    module = emulator.load(path)
    assert emulator.load(path) is module
    run = emulator.run(module.kernel, SHAPE, values=False)
    assert run.outputs[0].shape == (4, 8) and run.cost.hbm_bytes == 2 * 64


def test_an_installed_nki_stays(monkeypatch, write):
    placeholder = ModuleType("nki")
    monkeypatch.setitem(sys.modules, "nki", placeholder)
    monkeypatch.setitem(sys.modules, "nki.language", ModuleType("nki.language"))
    module = emulator.load(write())
    assert sys.modules["nki"] is placeholder and module.nki is not placeholder
    emulator.run(module.kernel, SHAPE, values=False)


def test_siblings_are_loaded_against_the_emulated_nki_too(monkeypatch, write):
    mine = ModuleType(TILES)
    monkeypatch.setitem(sys.modules, TILES, mine)
    monkeypatch.setattr(jaxsvd.kernels.neuron, "tiles", mine, raising=False)
    module = emulator.load(write("from jaxsvd.kernels.neuron import tiles"))
    assert module.tiles is emulator.load("tiles") and module.tiles is not mine
    assert module.tiles.nl is module.nl
    assert sys.modules[TILES] is mine and jaxsvd.kernels.neuron.tiles is mine
    assert importlib.import_module(TILES) is mine


def test_what_does_not_load(unchanged, write):
    with pytest.raises(emulator.EmulationError, match=r"^load: expected a kernel file, found none at .*nothing\.py"):
        emulator.load("nothing")
    with pytest.raises(ZeroDivisionError):
        emulator.load(write("1 / 0"))
    with pytest.raises(emulator.EmulationError, match=r"nki\.language\.mgrid"):
        emulator.load(write("from nki.language import mgrid"))
    with pytest.raises(emulator.EmulationError, match="mode"):
        emulator.load(write(text=KERNEL.replace("@nki.jit", "@nki.jit(mode='jax')")))


LINTED = {
    "if x is None:\n        pass": "`is`",
    "if x is not None:\n        pass": "`is`",
    "import math": "import inside",
    "from math import pi": "import inside",
    "d = {1: 2}": "keys of a dictionary",
    "d = {(1, 2): 2}": "keys of a dictionary",
    "global state": "global",
    "nisa.dma_copy(dst=x, src=x, mask=m)": "mask=",
    "t = nl.ndarray((1, 1), dtype=x.dtype, buffer='sbuf')": "buffers",
    "y = other(x)": "other is under @nki.jit",
    "y = STATE[0]": "STATE is mutable",
}
LINTED_FILE = """
import nki
STATE = [1]
TUPLE = (1,)

@nki.jit
def other(x):
    return x

@nki.jit
def kernel(x, sizes=(1, 2)):
    {}
    d = {{"a": TUPLE[0]}}
    return x
"""


@pytest.mark.parametrize("line", LINTED)
def test_lint_finds(line, tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(LINTED_FILE.format(line))
    (finding,) = emulator.lint(path)
    assert LINTED[line] in finding.text and finding.line == 12


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("import neuronxcc.nki as nki", "neuronxcc"),
        ("class State:\n    x = 1", "NKIObject"),
        ("@nki.jit\ndef kernel(x, *, flag=True):\n    return x", "no `*`"),
        ("def helper(*tensors):\n    return tensors", "no `*`"),
        ("def helper(**options):\n    return options", "no `*`"),
        ("@nki.jit\ndef kernel(x, sizes=[1]):\n    return x", "not lists"),
        ("@nki.jit(mode='jax')\ndef kernel(x):\n    return x", "no options"),
    ],
)
def test_lint_finds_in_declarations(line, text, tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(line)
    (finding,) = emulator.lint(path)
    assert text in finding.text


def test_lint_passes_what_nki_takes(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(LINTED_FILE.format("STATE = [2]\n    y = STATE") + "\nclass A(nl.NKIObject):\n    x = 1\n")
    assert emulator.lint(path) == []
    for name in ("tutorial", "counted"):
        assert emulator.lint(Path(__file__).with_name(f"{name}.py")) == []
