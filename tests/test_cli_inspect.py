"""jaxsvd inspect: what it says of a checkpoint; and that no script hides the standard library's inspect."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluating import KEPT, with_rank
from factored import mixed_ranks, projections, read_config, read_tensors, write_factored, write_folder
from tiny import open_engine

from jaxsvd import cli, inspection
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.errors import UsageError

SCRIPTS = Path(__file__).parents[1] / "scripts"
LOW = "model.layers.0.mlp.up_proj"


def run(*arguments):
    return cli.run("inspect", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def low(tiny_llama, tmp_path_factory):
    """One matrix of rank 16."""
    return with_rank(tiny_llama[0], tmp_path_factory.mktemp("low") / "model", LOW)


def found(folder, **options):
    return inspection.inspect(Checkpoint(folder), **options)


def test_a_dense_model_is_its_own_bound(tiny_llama):
    dense = found(tiny_llama[0])
    assert dense.speedup_bound == 1 and dense.kept == (1, 1, 1)
    assert {matrix.path for matrix in dense.matrices} == set(projections(read_tensors(tiny_llama[0])))
    for matrix in dense.matrices:
        assert (matrix.kind, matrix.rank, matrix.keep) == ("dense", None, 1)
        assert matrix.nbytes == 4 * matrix.inputs * matrix.outputs


def test_a_low_rank_matrix_is_counted(tiny_llama, low):
    each = next(matrix for matrix in found(low).matrices if matrix.path == LOW)
    assert (each.inputs, each.outputs, each.rank, each.kind, each.dtype) == (64, 96, 16, "low rank", "F32")
    assert each.break_even == pytest.approx(64 * 96 / 160)
    assert each.nbytes == 4 * 16 * (64 + 96) and each.keep == pytest.approx(16 * 160 / (64 * 96))
    assert found(low).kept.linears == pytest.approx(KEPT)
    difference = found(tiny_llama[0]).step_bytes - found(low).step_bytes
    assert difference == 2 * (64 * 96 - 16 * 160)  # in bfloat16
    assert found(low).dense_step_bytes == found(tiny_llama[0]).step_bytes


def test_a_step_reads_what_the_engine_says(tiny):
    assert found(tiny[0], dtype="float32").step_bytes == open_engine(tiny[0]).step_bytes(0)


def test_a_step_reads_no_more_than_dense_matrices(tiny, tmp_path):
    ranks = mixed_ranks(read_tensors(tiny[0])) | {LOW: 60}  # above break-even: it runs dense
    write_factored(tiny[0], tmp_path / "mixed", ranks)
    mixed, dense = found(tmp_path / "mixed", dtype="float32"), found(tiny[0], dtype="float32")
    saved = sum(
        matrix.inputs * matrix.outputs - ranks[matrix.path] * (matrix.inputs + matrix.outputs)
        for matrix in dense.matrices
        if matrix.path in ranks and matrix.path != LOW
    )
    assert mixed.step_bytes == dense.step_bytes - 4 * saved
    assert mixed.step_bytes <= open_engine(tmp_path / "mixed").step_bytes(0)  # which pads so odd ranks
    above = next(matrix for matrix in mixed.matrices if matrix.path == LOW)
    assert above.keep > 1 and "runs dense" in inspection.table(mixed)


def test_narrowed_mlps(tiny_llama, tmp_path):
    tensors, config = read_tensors(tiny_llama[0]), read_config(tiny_llama[0])
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = tensors[f"model.layers.0.mlp.{name}_proj.weight"][:40]
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"][:, :40]
    config["low_rank"] = {"format_version": 1, "ranks": {}, "widths": {"model.layers.0.mlp": 40}}
    narrow = found(write_folder(tmp_path / "narrow", tensors, config))
    kinds = {matrix.path: (matrix.kind, matrix.keep) for matrix in narrow.matrices}
    assert kinds["model.layers.0.mlp.down_proj"] == ("narrowed", pytest.approx(40 / 96))
    assert kinds["model.layers.1.mlp.down_proj"] == ("dense", 1)
    assert narrow.step_bytes == narrow.dense_step_bytes - 2 * 3 * 64 * 56


def test_a_shared_factor_is_counted_where_it_lies(tiny_llama, tmp_path):
    paths = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    write_factored(tiny_llama[0], tmp_path / "model", dict.fromkeys(paths, 8))
    tensors, config = read_tensors(tmp_path / "model"), read_config(tmp_path / "model")
    del tensors["model.layers.1.mlp.up_v_proj.weight"]
    config["low_rank"] = {"format_version": 1, "ranks": dict.fromkeys(paths, 8), "shared": {paths[1]: paths[0]}}
    shared = found(write_folder(tmp_path / "shared", tensors, config))
    owner, sharer = (next(matrix for matrix in shared.matrices if matrix.path == path) for path in paths)
    assert (owner.shared, sharer.shared) == (None, paths[0])
    assert (owner.nbytes, sharer.nbytes) == (4 * 8 * (64 + 96), 4 * 8 * 96)
    assert shared.step_bytes == shared.dense_step_bytes - 2 * (2 * 64 * 96 - 8 * (64 + 2 * 96))
    assert f"shares the factor of {paths[0]}" in inspection.table(shared)


def test_floors_are_bytes_over_bandwidth(low):
    seen = found(low, bandwidths={"slow": 1.0, "fast": 4.0})
    slow, fast = seen.floors
    assert slow.seconds == seen.step_bytes / 1e9 == pytest.approx(4 * fast.seconds)
    assert slow.dense_seconds / slow.seconds == pytest.approx(seen.speedup_bound)
    assert seen.speedup_bound > 1
    assert found(low, dtype="float32").step_bytes == 2 * seen.step_bytes


def test_named_hardware():
    assert inspection.bandwidths([]) == inspection.HARDWARE
    assert inspection.bandwidths(["H200", "trn1"], 100.0) == {"h200": 4800, "trn1": 410, "given": 100}
    assert inspection.bandwidths([], 100.0) == {"given": 100}
    with pytest.raises(UsageError, match="choose one of h200, h100"):
        inspection.bandwidths(["abacus"])


def test_no_weight_is_read(low, monkeypatch):
    from jaxsvd.checkpoint.files import TensorFiles

    monkeypatch.setattr(TensorFiles, "read", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("jax.device_put", lambda *_: pytest.fail("put on a device"))
    assert run(low, "-q") == 0


def test_the_table(low, capfd):
    assert run(low) == 0
    out, err = capfd.readouterr()
    line = next(line for line in out.splitlines() if line.startswith(LOW))
    assert line.split() == [LOW, "64", "96", "16", "38", "0.417", "0.01", "F32", "low", "rank"]
    for words in (
        "llama, 2 layers of 64",
        "low rank   1 of 14",
        f"{KEPT:.4f} of the projections",
        "at most 1.0",
        "tied",
    ):
        assert words in out
    assert all(name in out for name in inspection.HARDWARE) and err == ""


def test_every_flag_changes_what_it_says(low, capfd):
    def answer(*extra):
        assert run(low, "--json", "-q", *extra) == 0
        return json.loads(capfd.readouterr().out)

    base = answer()
    assert [floor["hardware"] for floor in base["floors"]] == list(inspection.HARDWARE)
    assert (base["dtype"], len(base["matrices"]), base["config"]["architecture"]) == ("bfloat16", 14, "llama")
    assert base["speedup_bound"] == base["dense_step_bytes"] / base["step_bytes"]
    assert [m["rank"] for m in base["matrices"] if m["stored"] == "low rank"] == [16]
    assert answer("--dtype", "float32")["step_bytes"] == 2 * base["step_bytes"]
    assert [floor["hardware"] for floor in answer("--hardware", "trn2", "--hardware", "h100")["floors"]] == [
        "trn2",
        "h100",
    ]
    (floor,) = answer("--bandwidth", 50)["floors"]
    assert (floor["hardware"], floor["bandwidth"]) == ("given", 50) and floor["seconds"] == base["step_bytes"] / 5e10


def test_the_plot(tiny_llama, low, tmp_path, monkeypatch, capfd):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self.axes[0]) or save(self, path))
    file = tmp_path / "plot.png"
    assert run(low, "--plot", file, "-q") == 0
    assert file.read_bytes().startswith(b"\x89PNG") and LOW in capfd.readouterr().out
    kept = drawn[0].images[0].get_array()
    assert kept.shape == (7, 2)
    assert kept[5, 0] == pytest.approx(16 * 160 / (64 * 96)) and (kept == 1).sum() == 13


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "qwen3-4b"),
        (["MODEL", "--hardware", "abacus"], "--bandwidth in GB/s"),
        (["MODEL", "--bandwidth", "0"], "above 0"),
        (["MODEL", "--bandwidth", "nan"], "above 0"),
        (["MODEL", "--dtype", "int8"], "bfloat16, float16"),
        (["MODEL", "--plot", "plot.xyz"], "ends in .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_message_and_exit_code_2(low, capfd, arguments, words):
    assert run(*[low if argument == "MODEL" else argument for argument in arguments], "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


# The doors: scripts/inspect.py must not be what `import inspect` finds.


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_door_takes_its_folder_off_the_path_before_it_imports(path):
    text = path.read_text("utf-8")
    line = 'sys.path[:] = [folder for folder in sys.path if folder != __file__.rpartition("/")[0]]'
    head, _, tail = text.partition(line)
    assert tail and [found for found in head.splitlines() if "import" in found] == ["import sys"]


def test_a_model_is_inspected_by_script(low):
    command = [sys.executable, SCRIPTS / "inspect.py", low, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["speedup_bound"] > 1, done.stderr
