"""Every public low-rank family, stored under its own names: it loads, and converts, to the model that it stands for."""

import functools
import json
import re

import jax
import numpy as np
import pytest
import torch
from factored import NAMES, factor, mixed_ranks, read_config, read_tensors, with_weights, write_factored, write_folder
from tiny import make_tiny

import jaxsvd
from jaxsvd import kernels
from jaxsvd.checkpoint.convert import convert
from jaxsvd.checkpoint.files import TensorFiles
from jaxsvd.checkpoint.read import Checkpoint, CheckpointWeights
from jaxsvd.engine import Engine
from jaxsvd.errors import ModelError
from jaxsvd.kernels import Dense
from jaxsvd.lowrank import Projections

PROMPT = [5, 17, 3, 99, 42, 7, 1]
TOLERANCE = 2e-4
torch.set_num_threads(1)


def logits(folder) -> np.ndarray:
    return jaxsvd.load(folder, dtype="float32").logits([PROMPT])


def expected(model, tensors) -> np.ndarray:
    """What torch answers with these dense weights."""
    with torch.no_grad():
        answer = with_weights(model, tensors)(torch.tensor([PROMPT])).logits.numpy()
    assert answer.std() > 0.1
    return answer


def difference(a, b) -> float:
    return float(np.abs(a - b).max())


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint(folder)
    return str(caught.value)


@pytest.fixture(scope="module", params=["llama-untied", "qwen3", "llama-biased"])
def dense(request, tmp_path_factory):
    """(folder, torch model)."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_tiny(request.param, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_tiny("llama-untied", folder)


@pytest.fixture(scope="module")
def reference(dense, tmp_path_factory):
    """Torch's answer for the mixed ranks that every family is written with, and the standard folder of them."""
    folder, model = dense
    standard = tmp_path_factory.mktemp("standard")
    equal = write_factored(folder, standard, mixed_ranks(read_tensors(folder)))
    return expected(model, equal), read_tensors(standard)


# Names.


@pytest.mark.parametrize("family", NAMES)
def test_family_loads_and_converts(dense, reference, family, tmp_path):
    source, target, ranks = tmp_path / "source", tmp_path / "target", mixed_ranks(read_tensors(dense[0]))
    write_factored(dense[0], source, ranks, family, second_bias=family in ("asvd", "dobi-svd"))
    answer, standard = reference
    assert Checkpoint(source).ranks == ranks
    assert difference(logits(source), answer) <= TOLERANCE
    report = convert(source, target)
    assert (report.family, report.factored) == (family, len(ranks))
    assert (report.least_rank, report.greatest_rank) == (min(ranks.values()), max(ranks.values()))
    converted = read_tensors(target)
    assert converted.keys() == standard.keys()
    assert all((converted[name] == standard[name]).all() for name in standard)
    assert Checkpoint(target).ranks == ranks == read_config(target)["low_rank"]["ranks"]


def test_swapped_factors_would_show(llama, tmp_path):
    """The comparison above can fail: with one factor scaled, torch disagrees."""
    equal = write_factored(llama[0], tmp_path, mixed_ranks(read_tensors(llama[0])), "asvd")
    tensors = read_tensors(tmp_path)
    name = next(name for name in tensors if name.endswith("ALinear.weight"))
    write_folder(tmp_path, tensors | {name: 3 * tensors[name]}, read_config(tmp_path))
    assert difference(logits(tmp_path), expected(llama[1], equal)) > 100 * TOLERANCE


def test_bare_parameters_of_dynrank(llama, tmp_path):
    ranks = mixed_ranks(read_tensors(llama[0]))
    write_factored(llama[0], tmp_path, ranks, "dynrank")
    bare = {re.sub(r"\.(first|second)\.weight$", r".\1", name): a for name, a in read_tensors(tmp_path).items()}
    assert Checkpoint(write_folder(tmp_path, bare, read_config(tmp_path))).ranks == ranks


def wrap(folder, prefix, **config):
    """Put a prefix before all names."""
    tensors = {prefix + name: array for name, array in read_tensors(folder).items()}
    return write_folder(folder, tensors, read_config(folder) | config)


@pytest.mark.parametrize("prefix", ["wrapped_model.", "module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_are_cut_off(llama, prefix, tmp_path):
    ranks = mixed_ranks(read_tensors(llama[0]))
    write_factored(llama[0], tmp_path, ranks, "kfac-svd")
    before = {name: a.tobytes() for name, a in read_tensors(tmp_path).items()}
    checkpoint = Checkpoint(wrap(tmp_path, prefix))
    assert checkpoint.ranks == ranks
    assert {name: checkpoint.files.read(name).tobytes() for name in checkpoint.files.entries} == before


def test_a_prefix_that_makes_two_names_one(llama, tmp_path):
    tensors = read_tensors(llama[0])
    tensors["module.model.norm.weight"] = tensors["model.norm.weight"]
    message = refusal(write_folder(tmp_path, tensors, read_config(llama[0])))
    assert "duplicate: model.norm.weight" in message


@pytest.mark.parametrize("kind", ["llama-untied", "qwen3"])
def test_kfac_config_around_the_config(kind, tmp_path):
    make_tiny(kind, tmp_path / "dense")
    ranks = mixed_ranks(read_tensors(tmp_path / "dense"))
    folder = tmp_path / "source"
    write_factored(tmp_path / "dense", folder, ranks, "kfac-svd")
    inner = read_config(folder)
    outer = {"model_type": "low_rank_compressed", "base_model_type": inner["model_type"], "base_config": inner}
    write_folder(folder, {f"wrapped_model.{n}": a for n, a in read_tensors(folder).items()}, outer)
    assert Checkpoint(folder).ranks == ranks
    assert convert(folder, tmp_path / "target").family == "kfac-svd"
    config = read_config(tmp_path / "target")
    assert config["model_type"] == inner["model_type"] and "base_config" not in config
    assert config["architectures"] == inner["architectures"]


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [(name, "llama") for name in ("svdllm-llama", "asvd_llama", "svdllama", "lowrank_llama", "basis_sharing_llama")]
    + [("lowrank_qwen3", "qwen3"), ("asvd_qwen3", "qwen3")],
)
def test_model_types_of_the_families(model_type, kind, tmp_path):
    make_tiny({"llama": "llama-untied"}.get(kind, kind), tmp_path / "dense")
    folder = tmp_path / "source"
    write_factored(tmp_path / "dense", folder, mixed_ranks(read_tensors(tmp_path / "dense")), "asvd")
    extra = {"model_type": model_type, "auto_map": {"AutoModel": "x.Y"}, "truncation_ranks": {"a": 1}}
    write_folder(folder, read_tensors(folder), read_config(folder) | extra)
    convert(folder, tmp_path / "target")
    config = read_config(tmp_path / "target")
    assert config["model_type"] == kind and not {"auto_map", "truncation_ranks"} & config.keys()


def test_keys_of_all_heads_in_a_grouped_model(llama, tmp_path):
    tensors = read_tensors(llama[0])
    path = "model.layers.0.self_attn.k_proj"
    del tensors[f"{path}.weight"]
    tensors["model.layers.0.self_attn.k_v_proj.weight"] = np.ones((7, 64), np.float32)
    tensors["model.layers.0.self_attn.k_u_proj.weight"] = np.ones((64, 7), np.float32)
    message = refusal(write_folder(tmp_path, tensors, read_config(llama[0])))
    assert f"{path} has the outputs of 4 heads, config.json has 2 (num_key_value_heads)" in message


# ASVD and Dobi-SVD: the same names, the other way round.

Q = "model.layers.0.self_attn.q_proj"  # (64, 64)


def with_q(llama, folder, a, b, **config):
    """A folder whose projection Q is this pair."""
    tensors = read_tensors(llama[0]) | {f"{Q}.ALinear.weight": a, f"{Q}.BLinear.weight": b}
    del tensors[f"{Q}.weight"]
    return write_folder(folder, tensors, read_config(llama[0]) | config)


def loaded_q(folder) -> np.ndarray:
    """The product of what is loaded for the projection Q, (out, in)."""
    matrix, _ = CheckpointWeights(Checkpoint(folder), np.float32).matrix(Q, 64, 64, bias=False)
    return (matrix.w if isinstance(matrix, Dense) else matrix.u @ matrix.v).T


@pytest.mark.parametrize("rank", [1, 13, 63, 65])
@pytest.mark.parametrize("family", ["asvd", "dobi-svd"])
def test_orders_of_a_square_matrix_are_told_apart(llama, family, rank, tmp_path, rng):
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, 64), (64, rank)))
    folder = with_q(llama, tmp_path, *((up, down) if family == "asvd" else (down, up)))
    assert difference(loaded_q(folder), up @ down) <= TOLERANCE


@pytest.mark.parametrize(
    ("key", "asvd"), [("truncation_ranks", True), ("low_rank_modules", True), ("dobi_target_modules", False)]
)
def test_square_factors_are_read_as_config_says(llama, key, asvd, tmp_path, rng):
    a, b = rng.standard_normal((2, 64, 64)).astype(np.float32)
    folder = with_q(llama, tmp_path, a, b, **{key: {Q: 64}})
    assert difference(loaded_q(folder), a @ b if asvd else b @ a) <= TOLERANCE
    assert difference(loaded_q(folder), b @ a if asvd else a @ b) > 1


@pytest.mark.parametrize("config", [{}, {"truncation_ranks": {}, "dobi_target_modules": {}}])
def test_square_factors_without_a_word_are_refused(llama, config, tmp_path):
    ones = np.ones((64, 64), np.float32)
    folder = with_q(llama, tmp_path, ones, ones, **config)
    message = refusal(folder)
    assert f"ambiguous: {Q}.ALinear.weight" in message and "dobi_target_modules" in message


def test_factors_that_fit_in_no_order(llama, tmp_path):
    folder = with_q(llama, tmp_path, np.ones((64, 5), np.float32), np.ones((6, 64), np.float32))
    assert "has rank 6" in refusal(folder) and "has rank 5" in refusal(folder)


@pytest.mark.parametrize("lost", ["A", "B"])
def test_half_a_pair(llama, lost, tmp_path):
    folder = with_q(llama, tmp_path, np.ones((64, 5), np.float32), np.ones((5, 64), np.float32))
    tensors = read_tensors(folder)
    del tensors[f"{Q}.{lost}Linear.weight"]
    assert f"missing: {Q}.{lost}Linear.weight" in refusal(write_folder(folder, tensors, read_config(folder)))


# Basis Sharing.

KINDS = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
RANK = 20


@functools.cache
def share(dense) -> tuple[dict, dict, dict]:
    """A dense folder of two layers to the coefficients (and all else), the bases, and the dense model of both."""
    tensors = read_tensors(dense)
    rest = {name: a for name, a in tensors.items() if not name.endswith("_proj.weight")}
    coefficients, bases, equal = {}, {}, dict(rest)
    for module, kinds in KINDS.items():
        for kind in kinds:
            names = [f"model.layers.{layer}.{module}.{kind}_proj.weight" for layer in range(2)]
            _, _, vt = np.linalg.svd(np.concatenate([tensors[name] for name in names]), full_matrices=False)
            bases[module, kind] = vt[:RANK]
            for name in names:
                coefficients[name] = tensors[name] @ vt[:RANK].T
                equal[name] = coefficients[name] @ vt[:RANK]
    return rest | coefficients, bases, equal


GROUPS = {f"{kind}_groups": [[0, 1]] for kinds in KINDS.values() for kind in kinds}
NUMBERS = {f"num_basis_{kind}": RANK for kinds in KINDS.values() for kind in kinds}
# Where the bases are: (a template of the name, the layers of it that are there).
PLACES = {
    "in each layer": [("model.layers.{layer}.{module}.{kind}_basis.weight", (0, 1))],
    "everywhere": [
        ("model.layers.{layer}.{module}.{kind}_basis.weight", (0, 1)),
        ("model.{kind}_basis.{layer}.weight", (0, 1)),
    ],
    "in the first layer": [("model.layers.{layer}.{module}.{kind}_basis.weight", (0,))],
    "in the second layer": [("model.layers.{layer}.{module}.{kind}_basis.weight", (1,))],
    "at the top, once": [("model.{kind}_basis.{layer}.weight", (0,))],
    "at the top, the last": [("model.{kind}_basis.{layer}.weight", (1,))],
}


def write_shared(dense, folder, place="everywhere", **config):
    """A Basis Sharing folder; returns the dense tensors that it stands for."""
    tensors, bases, equal = share(dense)
    tensors = dict(tensors)
    for template, layers in PLACES[place]:
        for (module, kind), basis in bases.items():
            for layer in layers:
                tensors[template.format(layer=layer, module=module, kind=kind)] = basis
    write_folder(folder, tensors, read_config(dense) | GROUPS | NUMBERS | config)
    return equal


@pytest.mark.parametrize("place", PLACES)
def test_basis_sharing(llama, place, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    answer = expected(llama[1], write_shared(llama[0], source, place))
    assert set(Checkpoint(source).ranks.values()) == {RANK} and len(Checkpoint(source).shared) == 7
    assert difference(logits(source), answer) <= TOLERANCE
    report = convert(source, target)
    assert (report.family, report.factored, report.shared) == ("basis-sharing", 14, 7)
    if place == "everywhere":
        assert difference(logits(target), answer) <= TOLERANCE
    names = read_tensors(target).keys()
    assert sum(name.endswith("_v_proj.weight") and ".layers.1." in name for name in names) == 0
    low_rank = read_config(target)["low_rank"]
    assert low_rank["shared"] == {
        f"model.layers.1.{module}.{kind}_proj": f"model.layers.0.{module}.{kind}_proj"
        for module, kinds in KINDS.items()
        for kind in kinds
    }
    assert not any(key in read_config(target) for key in GROUPS | NUMBERS)


def test_shared_factors_are_counted_once(llama, tmp_path):
    write_shared(llama[0], tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "target")
    tensors, dense = read_tensors(tmp_path / "target"), read_tensors(llama[0])
    sizes = [sum(a.size for a in model.values()) for model in (tensors, dense)]
    linears = sum(a.size for name, a in dense.items() if name.endswith("_proj.weight"))
    assert report.keep_parameters == pytest.approx(sizes[0] / sizes[1])
    assert report.keep_bytes == pytest.approx(sizes[0] / sizes[1])
    assert report.keep_linears == pytest.approx(1 - (sizes[1] - sizes[0]) / linears)


def test_basis_sharing_of_qwen3(tmp_path):
    model = make_tiny("qwen3", tmp_path / "dense")
    equal = write_shared(tmp_path / "dense", tmp_path / "source", "at the top, once")
    assert difference(logits(tmp_path / "source"), expected(model, equal)) <= TOLERANCE


def test_a_basis_that_is_nowhere(llama, tmp_path):
    write_shared(llama[0], tmp_path, "in the first layer", k_groups=[[0], [1]])
    message = refusal(tmp_path)
    assert "model.layers.1.self_attn.k_proj.weight is (32, 20), expected (32, 64)" in message


def test_each_copy_of_a_basis_is_read_once(llama, tmp_path, monkeypatch):
    write_shared(llama[0], tmp_path)
    seen, read = [], TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", lambda self, name: seen.append(name) or read(self, name))
    Checkpoint(tmp_path)
    assert len(seen) == len(set(seen)) == 7 * 4


def test_a_basis_that_differs_within_its_group(llama, tmp_path):
    write_shared(llama[0], tmp_path)
    tensors = read_tensors(tmp_path)
    tensors["model.layers.1.self_attn.k_basis.weight"] += 1
    message = refusal(write_folder(tmp_path, tensors, read_config(tmp_path)))
    assert "model.layers.1.self_attn.k_basis.weight differs from model.layers.0.self_attn.k_basis.weight" in message


@pytest.mark.parametrize("groups", [5, [5], [[0, 7]], [[0, 1], [1]], [["x"]], [[[0]]]])
def test_groups_without_sense(llama, groups, tmp_path):
    write_shared(llama[0], tmp_path, k_groups=groups)
    assert "config.json: k_groups" in refusal(tmp_path)


@pytest.fixture
def converted(llama, tmp_path):
    write_shared(llama[0], tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "target")
    return tmp_path / "target"


K0, K1 = (f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1))


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        (5, "low_rank.shared is no object"),
        ({K1: 5}, "which it can't"),
        ({K1: K1}, "which it can't"),
        ({K1: "model.layers.9.self_attn.k_proj"}, "which it can't"),
        ({"nothing": K0}, "which it can't"),
        ({K0: K1, K1: K0}, "which it can't"),
        ({K0: K1}, "missing: model.layers.1.self_attn.k_v_proj.weight"),
        ({}, "missing: model.layers.1.self_attn.k_v_proj.weight"),
        (
            {K1: "model.layers.0.mlp.down_proj"},
            "model.layers.0.mlp.down_v_proj.weight is (20, 96), expected (rank, 64)",
        ),
    ],
)
def test_shared_entry_that_disagrees(converted, shared, words):
    config = read_config(converted)
    config["low_rank"]["shared"] = shared
    (converted / "config.json").write_text(json.dumps(config))
    assert words in refusal(converted)


def test_shared_entry_beside_another_factor(converted):
    tensors = read_tensors(converted)
    tensors["model.layers.1.self_attn.k_v_proj.weight"] = 1 + tensors["model.layers.0.self_attn.k_v_proj.weight"]
    message = refusal(write_folder(converted, tensors, read_config(converted)))
    assert "k_v_proj.weight differs from" in message and K1 in message


def packed(model):
    """The first array of every group, by layer."""
    groups = [(layer.self_attn.qkv, layer.self_attn.o, layer.mlp.gate_up, layer.mlp.down) for layer in model.layers]
    assert all(isinstance(group, Projections) for layer in groups for group in layer)
    return [[group.arrays[0][...] for group in layer] for layer in groups]


def test_a_shared_basis_is_one_buffer(converted, llama):
    model = Checkpoint(converted).load(kernels.choose(), np.float32)
    first, second = packed(model)
    assert all(a is b for a, b in zip(first, second, strict=True))
    pointers = [[array.unsafe_buffer_pointer() for array in layer] for layer in (first, second)]
    assert pointers[0] == pointers[1] and len(set(pointers[0])) == 4
    leaves = jax.tree.leaves(Engine(model).leaves)
    table = model.embed_tokens.weight[...].nbytes
    assert Engine(model).step_bytes(0) == sum(leaf.nbytes for leaf in leaves) - table  # as often as it is read
    plain, other = packed(Checkpoint(llama[0]).load(kernels.choose(), np.float32))
    assert not any(a is b for a, b in zip(plain, other, strict=True))


def test_progress_counts_every_tensor_once(converted):
    checkpoint, told = Checkpoint(converted), []
    checkpoint.load(kernels.choose(), np.float32, told.append)
    assert sum(told) == checkpoint.files.nbytes


def test_equal_arrays_without_sharing_stay_apart(llama, tmp_path):
    """Hashing every array would slow down loading for nothing."""
    tensors = read_tensors(llama[0])
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)]
    tensors[names[1]] = tensors[names[0]]
    model = Checkpoint(write_folder(tmp_path, tensors, read_config(llama[0]))).load(kernels.choose(), np.float32)
    first, second = packed(model)
    assert first[1] is not second[1]


# What only the converter puts together says so.


def test_a_factored_head_points_to_the_converter(llama, tmp_path):
    tensors = read_tensors(llama[0])
    down, up = factor(tensors.pop("lm_head.weight"), 30)
    tensors |= {"lm_head.BLinear.weight": down, "lm_head.ALinear.weight": up}
    folder = write_folder(tmp_path, tensors, read_config(llama[0]) | {"truncation_ranks": {"lm_head": 30}})
    assert "jaxsvd convert" in refusal(folder)


def test_lora_pairs_point_to_the_converter(llama, tmp_path):
    tensors = read_tensors(llama[0]) | {f"{Q}.lora_A.weight": np.ones((2, 64), np.float32)}
    assert "jaxsvd convert" in refusal(write_folder(tmp_path, tensors, read_config(llama[0])))
