"""What a model folder may look like, and what is said of one that can't be used."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from factored import factor, mixed_ranks, read_config, read_tensors, write_factored, write_folder
from safetensors.numpy import load_file, save_file
from tiny import LLAMA3_ROPE, make_tiny

import jaxsvd
from jaxsvd.checkpoint.read import Checkpoint, CheckpointWeights
from jaxsvd.config import ModelConfig
from jaxsvd.errors import ModelError

ATTENTION = "model.layers.0.self_attn"
V = f"{ATTENTION}.v_proj"
V_SHAPE = (32, 64)  # (out, in)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    make_tiny("llama-untied", folder)
    return folder


@pytest.fixture
def tensors(untied):
    return read_tensors(untied)


@pytest.fixture
def config(untied):
    return read_config(untied)


def refusal(folder: Path, **options) -> str:
    """The message of the ModelError that loading ends with."""
    with pytest.raises(ModelError) as caught:
        jaxsvd.load(folder, **options)
    return str(caught.value)


def config_refusal(config: dict, **changes) -> str:
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf(config | changes)
    return str(caught.value)


# Tensors against config.json.


def test_one_error_lists_all_that_is_wrong(tensors, config, tmp_path):
    del tensors["model.norm.weight"], tensors[f"{ATTENTION}.q_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((96, 63), np.float32)
    tensors["model.layers.1.input_layernorm.weight"] = np.ones(65, np.float32)
    tensors[f"{ATTENTION}.v_v_proj.weight"] = np.ones((3, 64), np.float32)
    tensors[f"{ATTENTION}.v_u_proj.weight"] = np.ones((32, 3), np.float32)
    message = refusal(write_folder(tmp_path, tensors, config))
    assert "6 things are wrong" in message
    for line in (
        "missing: model.norm.weight (64,)",
        f"missing: {ATTENTION}.q_proj.weight (64, 64)",
        "unexpected: model.layers.7.mlp.up_proj.weight (2, 2)",
        "mis-shaped: model.layers.1.mlp.up_proj.weight is (96, 63), expected (96, 64)",
        "mis-shaped: model.layers.1.input_layernorm.weight is (65,), expected (64,)",
        f"duplicate: {V} is given as {V}.weight and as {ATTENTION}.v_v_proj.weight with {ATTENTION}.v_u_proj.weight",
    ):
        assert line in message


def test_a_missing_layer_is_listed_tensor_by_tensor(tensors, config, tmp_path):
    lost = [name for name in tensors if name.startswith("model.layers.1.")]
    message = refusal(write_folder(tmp_path, {n: a for n, a in tensors.items() if n not in lost}, config))
    assert [name for name in lost if name not in message] == []


def test_a_layer_too_many(tensors, config, tmp_path):
    message = refusal(write_folder(tmp_path, tensors, config | {"num_hidden_layers": 1}))
    assert message.count("unexpected: model.layers.1.") == 9


def test_far_more_layers_than_tensors(tensors, config, tmp_path):
    assert "num_hidden_layers" in refusal(write_folder(tmp_path, tensors, config | {"num_hidden_layers": 10**9}))


def test_a_long_list_is_cut(tensors, config, tmp_path):
    extra = {f"extra.{i}": np.ones(1, np.float32) for i in range(80)}
    message = refusal(write_folder(tmp_path, tensors | extra, config))
    assert "80 things are wrong" in message and "and 30 more" in message


def test_old_rotary_frequencies_are_passed_over(tensors, config, tmp_path):
    tensors[f"{ATTENTION}.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    jaxsvd.load(write_folder(tmp_path, tensors, config))


def v_in(form: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The v projection dense or factored: the names differ by a letter or a dot."""
    if form == "dense":
        return {f"{V}.weight": weight}
    down, up = factor(weight, 5)
    middle = {"svd-llm": f"{ATTENTION}.v_{{}}_proj.weight", "svd-llm-hf": f"{V}.{{}}_proj.weight"}[form]
    return {middle.format("v"): down, middle.format("u"): up}


@pytest.mark.parametrize("form", ["dense", "svd-llm", "svd-llm-hf"])
def test_v_proj_in_each_form(tensors, config, form, tmp_path, rng):
    del tensors[f"{V}.weight"]
    weight = (rng.standard_normal((32, 5)) @ rng.standard_normal((5, 64))).astype(np.float32)  # of rank 5
    checkpoint = Checkpoint(write_folder(tmp_path, tensors | v_in(form, weight), config))
    assert checkpoint.ranks == ({} if form == "dense" else {V: 5})
    matrix, _ = CheckpointWeights(checkpoint, jnp.float32).matrix(V, 64, 32, bias=False)
    product = matrix.w if form == "dense" else matrix.u @ matrix.v
    np.testing.assert_allclose(product.T, weight, atol=1e-4)


@pytest.mark.parametrize("forms", [("dense", "svd-llm"), ("dense", "svd-llm-hf"), ("svd-llm", "svd-llm-hf")])
def test_v_proj_in_two_forms(tensors, config, forms, tmp_path):
    weight = tensors.pop(f"{V}.weight")
    for form in forms:
        tensors |= v_in(form, weight)
    message = refusal(write_folder(tmp_path, tensors, config))
    assert "1 thing is wrong" in message and f"duplicate: {V} " in message


@pytest.mark.parametrize("form", ["svd-llm", "svd-llm-hf"])
@pytest.mark.parametrize("lost", [0, 1])
def test_one_factor_missing(tensors, config, form, lost, tmp_path):
    factors = v_in(form, tensors.pop(f"{V}.weight"))
    name = list(factors)[lost]
    del factors[name]
    message = refusal(write_folder(tmp_path, tensors | factors, config))
    assert "1 thing is wrong" in message and f"missing: {name}" in message


def test_ranks_of_the_factors_disagree(tensors, config, tmp_path):
    factors = v_in("svd-llm", tensors.pop(f"{V}.weight"))
    down, up = factors
    factors[up] = np.ascontiguousarray(factors[up][:, :4])
    message = refusal(write_folder(tmp_path, tensors | factors, config))
    assert f"{down} has rank 5, {up} has rank 4" in message


@pytest.mark.parametrize("shape", [(5,), (0, 64), (5, 63), (5, 64, 1), ()])
def test_mis_shaped_factor(tensors, config, shape, tmp_path):
    factors = v_in("svd-llm", tensors.pop(f"{V}.weight"))
    down, up = factors
    tensors[up] = np.ones((32, 0), np.float32) if shape == (0, 64) else factors[up]
    message = refusal(write_folder(tmp_path, tensors | {down: np.ones(shape, np.float32)}, config))
    assert f"mis-shaped: {down} is {shape}, expected (rank, 64)" in message


def test_biases_without_attention_bias_are_unexpected(tensors, config, tmp_path):
    tensors[f"{V}.bias"] = np.zeros(32, np.float32)
    assert f"unexpected: {V}.bias" in refusal(write_folder(tmp_path, tensors, config))


def test_biases_missing_duplicate_and_mis_shaped(untied, tensors, config, tmp_path):
    biased = tmp_path / "biased"
    make_tiny("llama-biased", biased)
    folder = tmp_path / "broken"
    write_factored(biased, folder, {V: 5}, second_bias=True)
    tensors = read_tensors(folder)
    tensors[f"{V}.bias"] = np.zeros(32, np.float32)
    del tensors[f"{ATTENTION}.o_proj.bias"]
    tensors[f"{ATTENTION}.q_proj.bias"] = np.zeros(63, np.float32)
    message = refusal(write_folder(folder, tensors, read_config(biased)))
    assert "3 things are wrong" in message
    assert f"duplicate: {V} has the biases {V}.bias and {ATTENTION}.v_u_proj.bias" in message
    assert f"missing: {ATTENTION}.o_proj.bias (64,)" in message
    assert f"mis-shaped: {ATTENTION}.q_proj.bias is (63,), expected (64)" in message


# The descriptor of config.json.


def test_descriptor_that_agrees(untied, tensors, config, tmp_path):
    ranks = mixed_ranks(tensors)
    write_factored(untied, tmp_path, ranks)
    (tmp_path / "config.json").write_text(json.dumps(config | {"low_rank": {"ranks": ranks}}))
    assert Checkpoint(tmp_path).ranks == ranks


def test_descriptor_that_disagrees(untied, config, tmp_path):
    key, query, output = (f"{ATTENTION}.{name}_proj" for name in "kqo")
    write_factored(untied, tmp_path, {query: 7, key: 5})
    stated = {query: 8, output: 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"low_rank": {"ranks": stated}}))
    message = refusal(tmp_path)
    assert "3 things are wrong" in message
    assert f"{query} has rank 8, the tensors have 7" in message
    assert f"{output} has rank 3, the tensors have none: dense" in message
    assert f"{key} has rank none: dense, the tensors have 5" in message


@pytest.mark.parametrize("descriptor", [7, [], "x", {}, {"ranks": [1]}, {"ranks": {V: [[5]]}}, {"ranks": {V: "5"}}])
def test_descriptor_without_sense(tensors, config, descriptor, tmp_path):
    assert "low_rank" in refusal(write_folder(tmp_path, tensors, config | {"low_rank": descriptor}))


# The head.


def test_tied_head_stored_as_well(tensors, config, tmp_path):
    tensors[HEAD] = tensors[EMBEDDING].copy()
    lm = jaxsvd.load(write_folder(tmp_path, tensors, config | {"tie_word_embeddings": True}))
    assert lm.config.tied is True


@pytest.mark.parametrize("shape", [(128, 64), (127, 64)])
def test_tied_head_stored_and_different(tensors, config, shape, tmp_path):
    tensors[HEAD] = tensors[EMBEDDING][: shape[0]] + np.float32(0.001)
    message = refusal(write_folder(tmp_path, tensors, config | {"tie_word_embeddings": True}))
    assert HEAD in message and "tie_word_embeddings" in message


@pytest.mark.parametrize("with_head", [True, False])
def test_where_config_does_not_say_the_head_decides(tensors, config, with_head, tmp_path):
    del config["tie_word_embeddings"]
    if not with_head:
        del tensors[HEAD]
    assert Checkpoint(write_folder(tmp_path, tensors, config)).config.tied is not with_head


def test_untied_head_missing(tensors, config, tmp_path):
    del tensors[HEAD]
    assert f"missing: {HEAD} (128, 64)" in refusal(write_folder(tmp_path, tensors, config))


# Files.


def write_index(folder: Path, weight_map) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_equal_one_file(tensors, config, tmp_path):
    sharded = Checkpoint(write_folder(tmp_path, tensors, config, shards=3))
    assert len({entry.file for entry in sharded.files.entries.values()}) == 3
    for name, array in tensors.items():
        assert np.array_equal(sharded.files.read(name), array)


def test_index_naming_a_missing_shard(tensors, config, tmp_path):
    write_folder(tmp_path, tensors, config, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "..", ".", ""])
def test_index_naming_a_file_outside(tensors, config, name, tmp_path):
    folder = write_folder(tmp_path / "model", tensors, config)
    save_file(tensors, tmp_path / "x.safetensors")
    write_index(folder, dict.fromkeys(tensors, name))
    refusal(folder)


def test_a_tensor_in_two_shards(tensors, config, tmp_path):
    write_folder(tmp_path, tensors, config, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    held = load_file(second)
    twice = next(name for name in tensors if name not in held)
    save_file(held | {twice: tensors[twice]}, second)
    assert f"duplicate: {twice} is in model-00001-of-00002.safetensors and {second.name}" in refusal(tmp_path)


def test_an_index_that_disagrees_with_the_shards(tensors, config, tmp_path):
    write_folder(tmp_path, tensors, config, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(weight_map.items()))
    other = next(file for file in weight_map.values() if file != shard)
    write_index(tmp_path, weight_map | {name: other})
    assert f"misplaced: {name} is in {shard}, the index says {other}" in refusal(tmp_path)
    write_index(tmp_path, weight_map | {"model.ghost.weight": shard})
    assert "model.ghost.weight" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], 5, {"a": 5}, {"a": None}, {}])
def test_index_without_sense(tensors, config, weight_map, tmp_path):
    write_folder(tmp_path, tensors, config)
    write_index(tmp_path, weight_map)
    refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unread(config, name, tmp_path):
    write_folder(tmp_path, {"a": np.ones(1, np.float32)}, config)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    message = refusal(tmp_path)
    assert name in message and "pickle" in message


def test_folder_without_weights_or_config(config, tmp_path):
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "model.safetensors" in refusal(tmp_path)


# Numbers.


@pytest.mark.parametrize("name", [f"{V}.weight", "model.norm.weight", EMBEDDING])
@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.int64, np.bool_, np.uint16])
def test_unsupported_dtypes(tensors, config, name, dtype, tmp_path):
    tensors[name] = tensors[name].astype(dtype)
    message = refusal(write_folder(tmp_path, tensors, config))
    assert name in message and "jaxsvd reads F32, F16 and BF16" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [f"{V}.weight", "model.norm.weight"])
def test_values_that_are_not_numbers(tensors, config, name, dtype, value, tmp_path):
    broken = tensors[name].astype(dtype)
    broken.reshape(-1)[-1] = value
    assert name in refusal(write_folder(tmp_path, tensors | {name: broken}, config))


def test_values_that_are_not_numbers_in_a_factor(tensors, config, tmp_path):
    factors = v_in("svd-llm", tensors.pop(f"{V}.weight"))
    name = list(factors)[1]
    factors[name][3, 2] = np.nan
    assert name in refusal(write_folder(tmp_path, tensors | factors, config))


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [f"{V}.weight", "model.norm.weight"])
def test_overflow_of_float16(tensors, config, name, stored, tmp_path):
    large = tensors[name].astype(stored)
    large.reshape(-1)[7] = 1e6
    folder = write_folder(tmp_path, tensors | {name: large}, config)
    message = refusal(folder, dtype="float16")
    assert name in message and "load it as" in message
    jaxsvd.load(folder, dtype="float32")
    jaxsvd.load(folder, dtype="bfloat16")


def test_overflow_of_a_product(tensors, config, tmp_path):
    """Factors that are multiplied out: each is finite, the product is not."""
    del tensors[f"{V}.weight"]
    tensors[f"{ATTENTION}.v_v_proj.weight"] = np.full((32, 64), 1e30, np.float32)
    tensors[f"{ATTENTION}.v_u_proj.weight"] = np.full((32, 32), 1e30, np.float32)
    assert V in refusal(write_folder(tmp_path, tensors, config), dtype="float32")


# config.json.


@pytest.mark.parametrize("value", ["gpt2", "qwen2", None, 5, ["llama"], {}])
def test_unsupported_model_type(config, value):
    message = config_refusal(config, model_type=value)
    assert "model_type" in message and "llama" in message and "qwen3" in message


@pytest.mark.parametrize("value", ["gelu", "relu", None, 5, ["silu"]])
def test_unsupported_activation(config, value):
    assert "hidden_act" in config_refusal(config, hidden_act=value)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", 5, ["llama3"]])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_unsupported_rope(config, kind, key):
    del config["rope_parameters"]
    message = config_refusal(config, rope_scaling={key: kind, "factor": 2.0})
    assert "rope" in message and str(kind) in message


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"type": "default"},
        {"type": "linear", "factor": 4.0},
        {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
    ],
    ids=["none", "default", "linear", "llama3"],
)
def test_rope_spellings(config, scaling):
    del config["rope_parameters"]
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
    new = ModelConfig.from_hf(config | {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5} | rest})
    assert new.rope.kind == kind and new.rope.theta == 5e5 and new.rope.factor == rest.get("factor", 1.0)
    for key in ("type", "rope_type"):
        old = config | {"rope_theta": 5e5, "rope_scaling": {key: kind} | rest if scaling else None}
        assert ModelConfig.from_hf(old) == new


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "64", True, [64], 2**40])
def test_fields_that_must_be_positive_integers(config, field, value):
    assert field in config_refusal(config, **{field: value})


@pytest.mark.parametrize(
    "value",
    [0, -1.0, "1e-6", True, [1], float("nan"), float("inf"), pytest.param(10**400, id="googol-to-the-fourth")],
)
def test_epsilon_must_be_a_positive_number(config, value):
    assert "rms_norm_eps" in config_refusal(config, rms_norm_eps=value)


def test_heads_that_do_not_divide(config):
    assert "key-value heads" in config_refusal(config, num_key_value_heads=3)


@pytest.mark.parametrize("value", [1, "yes", [True]])
def test_flags_must_be_booleans(config, value):
    for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert field in config_refusal(config, **{field: value})
