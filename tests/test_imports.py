"""Who may import whom, what importing costs, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxsvd"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source, name, is_package=False):
    """Every module that a source text may import, in functions too: `a.b` and `a.b.c` of `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


IMPORTS = {
    module_name(path): imports_of(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    for path in FILES
}


def below(name, *parents):
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def importers(*targets):
    """The modules of jaxsvd that import one of the targets or something below them."""
    return {module for module, names in IMPORTS.items() if any(below(name, *targets) for name in names)}


def test_the_walk_sees_every_kind_of_import():
    source = """
import a.b as c
from d import e
def f():
    from . import g
    from ..h import i
    import_module("j")
if TYPE_CHECKING:
    from k.l import m
"""
    names = imports_of(source, "jaxsvd.models.llama")
    assert names >= {"a.b", "d.e", "jaxsvd.models.g", "jaxsvd.h.i", "j", "k.l.m"}
    assert "jaxsvd.models.g" in imports_of("from . import g", "jaxsvd.models", is_package=True)
    assert {"jaxsvd.engine", "jaxsvd.kernels.xla", "jaxsvd.models.qwen3"} <= set(IMPORTS)


def test_kernels_know_arrays_only():
    allowed = ("jaxsvd.kernels", "jaxsvd.errors")
    for module in IMPORTS:
        if below(module, "jaxsvd.kernels"):
            ours = {name for name in IMPORTS[module] if below(name, "jaxsvd") and name != "jaxsvd"}
            assert not {name for name in ours if not below(name, *allowed)}, module


FORBIDDEN = {
    "jaxsvd.models": ("jaxsvd.engine", "jaxsvd.tokenizer", "jaxsvd.hub", "jaxsvd.api", "jaxsvd.checkpoint"),
    "jaxsvd.compression": ("jaxsvd.engine", "jaxsvd.api"),
    "jaxsvd.engine": ("jaxsvd.tokenizer", "jaxsvd.hub", "jaxsvd.api", "jaxsvd.checkpoint"),
    "jaxsvd.steps": ("jaxsvd.engine", "jaxsvd.tokenizer", "jaxsvd.hub", "jaxsvd.api", "jaxsvd.checkpoint"),
    "jaxsvd.sampling": ("jaxsvd.engine", "jaxsvd.models", "jaxsvd.api"),
}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_layers_point_downwards(module):
    assert not {name for name in importers(*FORBIDDEN[module]) if below(name, module)}


def test_evaluation_is_on_top():
    assert {module for module in importers("jaxsvd.evaluate") if not below(module, "jaxsvd.evaluate")} == {
        "jaxsvd.cli.check_accuracy",
        "jaxsvd.cli.perplexity",
    }


def test_benchmarks_are_on_top():
    outside = {module for module in importers("jaxsvd.bench") if not below(module, "jaxsvd.bench")}
    assert outside == {"jaxsvd.cli.bench"}


def test_each_heavy_library_has_one_door():
    assert importers("transformers") == {"jaxsvd.tokenizer", "jaxsvd.evaluate.torch_reference"}
    assert importers("torch") == {"jaxsvd.evaluate.torch_reference"}  # check-accuracy --reference transformers
    assert importers("lm_eval") == {"jaxsvd.evaluate.harness"}
    assert importers("matplotlib") == {"jaxsvd.plots"}
    assert all(below(module, "jaxsvd.kernels.neuron") for module in importers("nki", "neuronxcc", "jax_neuronx"))


def test_no_pickle():
    # jax.experimental.… and numpy have doors to it as well: numpy.load(allow_pickle=True), joblib, dill.
    assert importers("jax.experimental.serialize_executable") == set()  # it pickles; jaxsvd.artifacts says what else
    assert importers("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal") == set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path


def test_only_the_converter_looks_into_pickles():
    assert importers("pickletools") == {"jaxsvd.checkpoint.pickles"}
    assert importers("jaxsvd.checkpoint.pickles") == {"jaxsvd.checkpoint.torchfiles"}
    assert importers("jaxsvd.checkpoint.torchfiles") == {"jaxsvd.checkpoint.convert"}
    assert importers("jaxsvd.checkpoint.convert") == {"jaxsvd.cli.convert"}  # in the function that runs the command
    assert "jaxsvd.checkpoint.pickles" not in loaded_by("import jaxsvd.api, jaxsvd.cli, jaxsvd.checkpoint.read")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path):
    limit = 200 if path.parent.name == "models" else 500
    assert len(path.read_text("utf-8").splitlines()) <= limit


# What importing costs, in fresh interpreters.


def fresh(code):
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()


def seconds(module):
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return min(float(fresh(code)[0]) for _ in range(3))


def test_importing_costs_no_more_than_importing_jax():
    assert seconds("jaxsvd") <= seconds("jax") + 0.5


def loaded_by(code):
    return set(fresh(f"{code}\nimport sys; print(*(name for name in sys.modules))"))


def test_importing_loads_nothing_heavy():
    heavy = {"transformers", "flax", "torch", "safetensors", "tokenizers", "huggingface_hub"}
    assert not heavy & loaded_by("import jaxsvd")


def test_the_engine_needs_no_tokenizer():
    assert not {"transformers", "torch", "tokenizers"} & loaded_by("import jaxsvd.engine, jaxsvd.checkpoint.read")


def test_loading_by_api_imports_transformers_late():
    assert not {"transformers", "torch"} & loaded_by("import jaxsvd; jaxsvd.load")


def test_perplexity_needs_neither_matplotlib_nor_the_harness():
    modules = "jaxsvd.evaluate, jaxsvd.evaluate.report"
    assert not {"matplotlib", "lm_eval", "torch"} & loaded_by(f"import {modules}")


def test_checking_accuracy_needs_no_torch():
    assert not {"matplotlib", "torch", "transformers"} & loaded_by("import jaxsvd.evaluate.accuracy_report")


def test_public_names_are_lazy_but_there():
    import jaxsvd

    assert set(jaxsvd.__all__) == set(jaxsvd._PUBLIC) <= set(dir(jaxsvd))
    assert issubclass(jaxsvd.UsageError, jaxsvd.JaxsvdError)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxsvd.nothing
