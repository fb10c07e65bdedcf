"""The whole way from a dense folder to a low-rank one, on SmolLM2's first two layers: real matrices in little time."""

import json
import shutil

import numpy as np
import pytest

import jaxsvd
from jaxsvd import demo
from jaxsvd.checkpoint.files import TensorFiles
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.checkpoint.write import write_json
from jaxsvd.compression.text import calibration_windows
from jaxsvd.errors import ModelError, UsageError
from jaxsvd.hub import cache_folder

TOKENS = 1024


@pytest.fixture(scope="session")
def make(source, text, tmp_path_factory):
    """Compress with options, each set of them once; the analysis is shared as far as it is the same."""
    made = {}

    def compress(keep=0.8, **options):
        key = (keep, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("compressed")
            analysis = {
                name: options.get(name) for name in ("method", "allocate", "width", "only", "refit", "dense_layers")
            }
            work = folder.parent / ("analysis-" + "-".join(map(str, analysis.values())))
            made[key] = jaxsvd.compress(
                source, folder / "model", keep, calibration=[text], tokens=TOKENS, work=work, progress=False, **options
            )
        return made[key]

    return compress


def error_against(source, target, text):
    """The mean squared error of the logits on text that calibrated nothing."""
    dense, smaller = (jaxsvd.load(folder) for folder in (source, target))
    rows = [dense.encode(text.read_text()[-3000:])[:256]]
    return np.square(smaller.logits(rows) - dense.logits(rows)).mean()


def descriptor(report):
    return json.loads((report.target / "config.json").read_text())["low_rank"]


def test_the_target_is_an_ordinary_folder(make, source):
    report = make()
    entry = descriptor(report)
    assert entry["method"] == "kfac" and entry["allocate"] == "global" and entry["keep"]["asked"] == 0.8
    assert entry["keep"]["linears"] == pytest.approx(report.keep_linears, abs=1e-6)
    assert entry["predicted_loss"] == report.plan.loss > 0
    assert len(entry["calibration"]["digest"]) == len(entry["base"]["digest"]) == 64
    assert all(rank % 16 == 0 for rank in entry["ranks"].values())
    assert Checkpoint(report.target).ranks == entry["ranks"] == report.plan.ranks
    size = sum(path.stat().st_size for path in report.target.glob("*.safetensors"))
    dense = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size / dense == pytest.approx(report.keep_bytes, abs=1e-3)
    files, whole = TensorFiles(report.target), TensorFiles(source)
    assert files.parameters / whole.parameters == pytest.approx(report.keep_parameters, abs=1e-9)
    assert jaxsvd.load(report.target).tokenizer.encode("Hello") == jaxsvd.load(source).tokenizer.encode("Hello")


@pytest.mark.parametrize("options", [{}, {"allocate": "uniform", "method": "svd-llm"}, {"width": True}])
def test_the_keep_is_met(make, options):
    report = make(**options)
    # Two layers have few places to round to; test_plan.py has thirty.
    assert 0.78 < report.keep_linears < 0.82
    assert Checkpoint(report.target).keep == pytest.approx(report[2:5]), "as counted from what was written"


def test_the_default_beats_whitening_beats_plain_svd(make, source, text):
    settings = ({}, {"allocate": "uniform", "method": "svd-llm"}, {"allocate": "uniform", "method": "svd"})
    errors = [error_against(source, make(**options).target, text) for options in settings]
    assert errors[0] < errors[1] < 0.5 * errors[2]


def test_refit_brings_it_nearer(make, source, text):
    plain, refitted = make(0.6), make(0.6, refit=True)
    assert refitted.plan == plain.plan and descriptor(refitted)["refit"] is True
    errors = [error_against(source, report.target, text) for report in (plain, refitted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("keep", "options", "moves"),
    [(0.6, {}, True), (0.75, {}, False), (0.6, {"dense_layers": (0,)}, True), (0.6, {"only": "mlp"}, True)],
)
def test_refit_moves_dense_matrices_where_little_is_kept(make, source, keep, options, moves):
    report = make(keep, refit=True, **options)
    given, made = TensorFiles(source), TensorFiles(report.target)
    moved = {
        name for name in made.entries if name in given.entries and not np.array_equal(made.read(name), given.read(name))
    }
    selected = {
        path
        for path in Checkpoint(source).matrices
        if not (options.get("only") and ".mlp." not in path)
        and not (options.get("dense_layers") and path.startswith("model.layers.0."))
    }
    left = {f"{path}.weight" for path in selected - set(report.plan.ranks)}
    assert left or options, "the plan must leave something dense"
    assert moved == (left if moves else set())


@pytest.mark.parametrize("method", ["fwsvd", "asvd"])
def test_every_method_makes_a_model(make, method):
    report = make(method=method, allocate="uniform")
    assert descriptor(report)["method"] == method and len(report.plan.ranks) == 14
    assert np.isfinite(jaxsvd.load(report.target).logits([[1, 2, 3]])).all()


def test_any_method_can_be_planned_globally(make):
    report = make(method="svd-llm")
    assert report.plan.loss > make().plan.loss  # kfac's factors are the best for this loss


def test_narrower_mlps(make, source, text):
    report = make(0.6, width=True)
    assert report.plan.widths and report.plan.loss < make(0.6).plan.loss
    assert descriptor(report)["widths"] == report.plan.widths
    model = jaxsvd.load(report.target)
    (path, width), *_ = report.plan.widths.items()
    layer = int(path.split(".")[2])
    assert model.config.of_layer(layer).intermediate_size == width < model.config.intermediate_size
    files = TensorFiles(report.target).entries
    assert files[f"{path}.gate_proj.weight"].shape == (width, 576)
    assert files[f"{path}.down_proj.weight"].shape == (576, width)
    assert error_against(source, report.target, text) < error_against(source, make(0.6).target, text)
    assert model.generate("The Congress of the United States", max_new_tokens=4).token_ids


def test_narrower_mlps_can_be_refitted(make, source, text):
    refitted = make(0.6, width=True, refit=True)
    assert refitted.plan.widths
    assert error_against(source, refitted.target, text) < error_against(source, make(0.6, width=True).target, text)
    given, made = TensorFiles(source), TensorFiles(refitted.target)
    dense = [name for name in made.entries if "self_attn" in name and name in given.entries]
    assert all(np.array_equal(made.read(name), given.read(name)) for name in dense)


@pytest.mark.parametrize("widths", [{"model.layers.0.mlp": 1000}, {"model.layers.9.mlp": 10}, {"mlp": 3}, [1], 5])
def test_widths_that_disagree_with_the_tensors_are_refused(make, tmp_path, widths):
    shutil.copytree(make(0.6, width=True).target, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["low_rank"]["widths"] = widths
    write_json(tmp_path / "model" / "config.json", config)
    with pytest.raises(ModelError, match=r"mis-shaped|low_rank.widths"):
        Checkpoint(tmp_path / "model")


def test_only_and_dense_layers_choose_what_is_compressed(make):
    assert all(".mlp." in path for path in make(only="mlp").plan.ranks)
    assert all(".self_attn." in path for path in make(only="attention").plan.ranks)
    assert all(".layers.0." in path for path in make(dense_layers=(1,)).plan.ranks)
    report = make(only="mlp", allocate="uniform", method="svd")
    kept, total = report.plan.cost, report.plan.dense_cost
    assert kept / total == pytest.approx(0.8, abs=0.01) and total == 2 * 3 * 576 * 1536
    assert report.keep_linears > 0.8, "the fraction of all projections"


def test_the_rank_multiple_is_kept(make):
    assert all(rank % 40 == 0 for rank in make(rank_multiple=40).plan.ranks.values())


def test_another_cost(source, text, tmp_path):
    """Any cost will do: here attention is dear, so it is what shrinks."""

    def cost(inputs, outputs, rank):
        parameters = inputs * outputs if rank is None else rank * (inputs + outputs)
        return parameters * (100 if inputs == outputs else 1)

    report = jaxsvd.compress(
        source, tmp_path / "t", 0.5, calibration=[text], tokens=TOKENS, cost=cost, dry_run=True, progress=False
    )
    assert report.plan.cost <= 0.5 * report.plan.dense_cost
    assert {f"model.layers.{i}.self_attn.q_proj" for i in range(2)} <= report.plan.ranks.keys()


def test_plain_svd_needs_no_text(tiny_llama, tmp_path):
    """Nor a tokenizer, which this folder has not."""
    report = jaxsvd.compress(
        tiny_llama[0], tmp_path / "t", method="svd", allocate="uniform", rank_multiple=1, progress=False
    )
    assert len(report.plan.ranks) == 14 and descriptor(report)["calibration"]["digest"] is None


def test_the_report_draws_the_plan(source, text, tmp_path):
    pytest.importorskip("matplotlib")
    options = {"calibration": [text], "tokens": TOKENS, "progress": False, "dry_run": True}
    jaxsvd.compress(source, tmp_path / "t", report=tmp_path / "plan.png", **options)
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name, words in (("plan.txt", "no picture"), ("nowhere/plan.png", "no folder")):
        with pytest.raises(UsageError, match=words):
            jaxsvd.compress(source, tmp_path / "u", report=tmp_path / name, **options)
    assert not (tmp_path / ".u.work").exists(), "said before the work begins"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 1.2}, "keep is 1.2"),
        ({"rank_multiple": 0}, "rank_multiple"),
        ({"tokens": 3}, "tokens is 3"),
        ({"calibration": ["/nowhere/none.txt"]}, "can't be read"),
        ({"method": "magic"}, "method is 'magic'.*kfac"),
        ({"allocate": "magic"}, "allocate is 'magic'"),
        ({"only": "magic"}, "only is 'magic'"),
        ({"dense_layers": (2,)}, "layers 0 to 1"),
        ({"dense_layers": (0, 1)}, "nothing to compress"),
        ({"width": True, "allocate": "uniform"}, "global"),
        ({"width": True, "only": "attention"}, "MLPs"),
        ({"keep": 0.01, "tokens": TOKENS}, "raise keep"),
    ],
)
def test_usage_errors(source, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        jaxsvd.compress(source, tmp_path / "target", progress=False, **options)
    assert not (tmp_path / "target").exists()


def test_targets_are_not_overwritten(make, source, tmp_path):
    report = make()
    with pytest.raises(UsageError, match="low-rank already"):
        jaxsvd.compress(report.target, tmp_path / "target", 0.8)
    with pytest.raises(UsageError, match="exists"):
        jaxsvd.compress(source, report.target, 0.8)
    assert not list(tmp_path.iterdir()), "nothing half-written stays"


def test_only_a_model_folder_is_replaced(source, tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a model folder"):
        jaxsvd.compress(source, precious, 0.8, force=True)
    assert (precious / "letter.txt").read_text() == "dear"


# Calibration text.


def test_too_little_text_is_said(smollm, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 50)
    with pytest.raises(UsageError, match="give more text"):
        calibration_windows(smollm, [short], 2048)


def test_default_text_needs_no_file(smollm):
    windows, digest = calibration_windows(smollm, [], 1024)
    assert windows.shape == (2, 512) and len(digest) == 64


def test_texts_share_the_tokens_and_the_seed_moves_them(smollm, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("One two three four five six seven. " * 3000)
    windows, digest = calibration_windows(smollm, [text, other], 4 * 512)
    repeated = [len(set(row)) < 30 for row in windows.tolist()]
    assert repeated == [False, False, True, True]
    assert calibration_windows(smollm, [text, other], 4 * 512)[1] == digest
    assert calibration_windows(smollm, [text, other], 4 * 512, seed=1)[1] != digest


def test_speeches_are_cached():
    path = demo.get_speeches(1950, 1999)
    assert path.is_relative_to(cache_folder()) and path.stat().st_size > 100_000
