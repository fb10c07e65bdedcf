import json
import shutil

import numpy as np
import pytest
from jaxsvd.compression.calibrate import calibration_windows, input_moments
from jaxsvd.compression.svd import Moment, whitened_factors
from safetensors.numpy import save_file

import jaxsvd
from jaxsvd import demo
from jaxsvd.checkpoint.files import TensorFiles
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.checkpoint.write import TensorWriter, copy_companions, write_json
from jaxsvd.errors import UsageError
from jaxsvd.hub import cache_folder


@pytest.fixture
def moment(rng):
    """Of correlated inputs of very different scale, one channel dead."""
    x = rng.standard_normal((300, 24)) @ rng.standard_normal((24, 24)) * np.logspace(0, -3, 24)
    x[:, 5] = 0
    return Moment(x.T @ x, len(x)), x


@pytest.mark.parametrize("outputs", [12, 24, 60])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_factors_reach_the_whitened_optimum(moment, rng, outputs, rank):
    moment, x = moment
    weight = rng.standard_normal((outputs, 24)).astype(np.float32)
    up, down = whitened_factors(weight, moment, rank)
    assert up.shape == (outputs, rank) and down.shape == (rank, 24)
    # Eckart-Young: the least error on these inputs is the tail of the singular values of the outputs.
    singular = np.linalg.svd(x @ weight.T.astype(np.float64), compute_uv=False)
    error = np.linalg.norm(x @ (weight - up @ down).T)
    assert error == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), rel=1e-6)


def test_factors_have_one_scale(moment, rng):
    up, down = whitened_factors(rng.standard_normal((24, 24)), moment[0], 8)
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1), rtol=1e-9)


def test_moments_are_those_of_the_inputs(tiny_llama):
    """Against transformers' own activations, by hooks."""
    import torch

    folder, model = tiny_llama
    windows = np.random.default_rng(0).integers(0, 128, (3, 40)).astype(np.int32)
    seen = {}

    def hook(name):
        return lambda module, args, output: seen.__setitem__(
            name, args[0].detach().double().reshape(-1, args[0].shape[-1])
        )

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name.endswith("_proj")
    ]
    with torch.no_grad():
        model(torch.tensor(windows))
    for handle in handles:
        handle.remove()
    moments = input_moments(Checkpoint(folder), windows, lambda count: None)
    assert moments.keys() == seen.keys()
    for name, x in seen.items():
        want = (x.T @ x / len(x)).numpy()
        np.testing.assert_allclose(moments[name].matrix, want, atol=1e-5 * abs(want).max())


@pytest.fixture(scope="session")
def source(smollm, tmp_path_factory):
    """SmolLM2's first two layers, with its tokenizer: real matrices in little time (the notebook has the whole)."""
    folder = tmp_path_factory.mktemp("two-layers")
    files = TensorFiles(smollm)
    writer = TensorWriter(folder)
    for name in files.entries:
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < 2:
            writer.add(name, files.read(name))
    writer.close()
    copy_companions(smollm, folder)
    config = json.loads((smollm / "config.json").read_text())
    write_json(folder / "config.json", config | {"num_hidden_layers": 2})
    return folder


@pytest.fixture(scope="session")
def compressed(source, tmp_path_factory):
    """It at keep 0.8 from few tokens, and the report."""
    target = tmp_path_factory.mktemp("compressed") / "keep-0.8"
    text = demo.get_speeches(1950, 1999)
    return target, jaxsvd.compress(source, target, 0.8, calibration=[text], tokens=1024, progress=False)


def test_the_target_is_an_ordinary_folder(compressed, source):
    target, report = compressed
    config = json.loads((target / "config.json").read_text())
    low_rank = config["low_rank"]
    assert low_rank["method"] == "svd-llm" and low_rank["keep"]["asked"] == 0.8
    assert abs(report.keep_linears - 0.8) < 0.04
    assert low_rank["keep"]["linears"] == pytest.approx(report.keep_linears, abs=1e-6)
    assert all(rank % 16 == 0 for rank in low_rank["ranks"].values())
    assert Checkpoint(target).ranks == low_rank["ranks"]
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    dense = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size / dense == pytest.approx(report.keep_bytes, abs=1e-3)


def test_the_target_is_nearer_than_plain_svd(compressed, source, tmp_path):
    """On text from other years than those that calibrated it, by the model's own logits."""
    plain, ranks = tmp_path / "plain", compressed[1].target
    shutil.copytree(ranks, plain)
    _factor_plainly(source, plain)
    text = demo.get_speeches(1950, 1999).read_text()
    dense, whitened, plain = (jaxsvd.load(folder) for folder in (source, compressed[0], plain))
    rows = [dense.encode(text[-3000:])[:256]]
    want = dense.logits(rows)
    errors = [np.square(model.logits(rows) - want).mean() for model in (whitened, plain)]
    assert errors[0] < 0.2 * errors[1]


def _factor_plainly(source, target):
    """Replace the factors by those of the plain truncated SVD, of the same ranks."""
    before, after = TensorFiles(source), TensorFiles(target)
    tensors = {name: after.read(name) for name in after.entries}
    for name in [name for name in tensors if name.endswith("_v_proj.weight") and not name.endswith(".v_proj.weight")]:
        other = name.replace("_v_proj.weight", "_u_proj.weight")
        weight = before.read(name.replace("_v_proj.weight", "_proj.weight")).astype(np.float32)
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        rank = tensors[name].shape[0]
        tensors[name] = (values[:rank, None] * right[:rank]).astype(tensors[name].dtype)
        tensors[other] = left[:, :rank].astype(tensors[other].dtype)
    save_file(tensors, target / "model.safetensors")


def test_usage_errors(source, compressed, tmp_path):
    for options, words in (
        ({"keep": 1.2}, "keep is 1.2"),
        ({"keep": 0.8, "rank_multiple": 0}, "rank_multiple"),
        ({"keep": 0.8, "tokens": 3}, "tokens is 3"),
        ({"keep": 0.8, "calibration": [tmp_path / "none.txt"]}, "can't be read"),
    ):
        with pytest.raises(UsageError, match=words):
            jaxsvd.compress(source, tmp_path / "target", **options)
    with pytest.raises(UsageError, match="low-rank already"):
        jaxsvd.compress(compressed[0], tmp_path / "target", 0.8)
    with pytest.raises(UsageError, match="exists"):
        jaxsvd.compress(source, compressed[0], 0.8)
    assert not list(tmp_path.iterdir()), "nothing half-written stays"


def test_too_little_text_is_said(smollm, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 50)
    with pytest.raises(UsageError, match="give more text"):
        calibration_windows(smollm, [short], 2048)


def test_default_text_needs_no_file(smollm):
    windows, digest = calibration_windows(smollm, [], 1024)
    assert windows.shape == (4, 256) and len(digest) == 64


def test_only_a_model_folder_is_replaced(smollm, tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a model folder"):
        jaxsvd.compress(smollm, precious, 0.8, force=True)
    assert (precious / "letter.txt").read_text() == "dear"


def test_speeches_are_cached():
    path = demo.get_speeches(1950, 1999)
    assert path.is_relative_to(cache_folder()) and path.stat().st_size > 100_000
