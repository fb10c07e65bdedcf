"""What is measured: the shapes of named models, and models of random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from evaluating import with_rank

from jaxsvd import hub, inspection, kernels
from jaxsvd.bench import contenders
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.config import ModelConfig, read_json
from jaxsvd.errors import UsageError
from jaxsvd.models import build
from jaxsvd.named import CONFIGS
from jaxsvd.weights import AbstractWeights, RandomWeights, break_even

QUIET = {"dtype": "float32", "progress": False}

# As the Hub counts them, from the headers of the files.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "smollm2-135m": 134_515_008,
}


def leaves(config, weights):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(build(config, weights, kernels.choose("xla"))))


@pytest.mark.parametrize("name", CONFIGS)
def test_named_models_have_the_parameters_that_the_hub_counts(name):
    assert sum(leaf.size for leaf in leaves(CONFIGS[name], AbstractWeights())) == PARAMETERS[name]


def test_every_registered_name_has_a_shape():
    assert set(hub.REGISTRY) < set(CONFIGS)


def test_a_named_shape_is_that_of_its_config(smollm):
    assert ModelConfig.from_hf(read_json(smollm / "config.json")) == CONFIGS["smollm2-135m"]


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen/Qwen3-4B", "qwen3-4b"])
def test_names_and_hub_ids_are_known(name):
    assert contenders.config_of(name) is CONFIGS["qwen3-4b"]


def test_a_folders_shape_is_its_configs(tiny):
    raw = read_json(tiny[0] / "config.json")
    assert contenders.config_of(str(tiny[0])).hidden_size == raw["hidden_size"]


def test_an_unknown_shape_is_refused():
    with pytest.raises(UsageError, match=r"'gpt-2' is not known: .* one of qwen3-0.6b"):
        contenders.config_of("gpt-2")


def test_all_projections_are_factored_as_the_compressor_would():
    config = CONFIGS["qwen3-4b"]
    shapes, rank = contenders.projections(config), contenders.ranks_of(config, 0.8, 128)
    assert len(shapes) == 7 * 36 and sum(a * b for a, b in shapes.values()) == contenders.dense_parameters(config)
    ranks = {path: rank(path, *shape) for path, shape in shapes.items()}
    assert {path.rpartition(".")[2] for path, r in ranks.items() if r} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    assert all(r % 128 == 0 and r < break_even(*shapes[path]) for path, r in ranks.items() if r)
    kept = sum((r * sum(shapes[path]) if r else np.prod(shapes[path])) for path, r in ranks.items())
    assert kept / contenders.dense_parameters(config) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(
    ("keep", "multiple", "words"),
    [(1.0, 8, "between 0 and 1"), (0.0, 8, "between 0 and 1"), (0.5, 0, "at least 1"), (0.5, 128, "below break-even")],
)
def test_ranks_that_there_are_not(tiny_llama, keep, multiple, words):
    with pytest.raises(UsageError, match=words):
        contenders.ranks_of(contenders.config_of(str(tiny_llama[0])), keep, multiple)


@pytest.mark.parametrize(("keep", "dtype"), [(None, "float32"), (0.6, "bfloat16")])
def test_random_models_are_laid_out_as_real_ones_and_compute_numbers(tiny, keep, dtype):
    made = contenders.random("model", str(tiny[0]), keep, 8, "xla", dtype)
    config = contenders.config_of(str(tiny[0]))
    ranks = contenders.ranks_of(config, keep, 8) if keep else None
    packed = leaves(config, RandomWeights(jnp.dtype(dtype), ranks))
    assert [(leaf.shape, leaf.dtype) for leaf in made.engine.leaves] == [(leaf.shape, leaf.dtype) for leaf in packed]
    logits = made.engine.logits([[1, 2, 3, 4]])
    assert 0.01 < logits.std() < 100
    assert len({leaf.tobytes() for leaf in map(np.asarray, made.engine.leaves) if leaf.ndim > 1}) > 2
    assert (made.keep < 1) == (keep is not None)


def test_random_models_go_through_the_backends_checks(tiny_llama, monkeypatch):
    checked = []
    monkeypatch.setattr("jaxsvd.kernels.xla.XLA.check", lambda self, plan, arrays: checked.append("group"))
    monkeypatch.setattr("jaxsvd.kernels.xla.XLA.check_mlp", lambda self, *given: checked.append("mlp"))
    contenders.random("model", str(tiny_llama[0]), 0.6, 8, "xla", None)
    assert sorted(checked) == ["group"] * 4 + ["mlp"] * 2  # qkv, o and the MLP of two layers


def test_bytes_and_keep_are_those_that_inspection_counts(tiny_llama, tmp_path):
    low = with_rank(tiny_llama[0], tmp_path / "low")
    loaded = contenders.load("model", low, "xla", **QUIET)
    found = inspection.inspect(Checkpoint(low), "float32")
    assert loaded.engine.step_bytes(0) == found.step_bytes
    assert loaded.dense_step_bytes(0) == found.dense_step_bytes
    assert loaded.keep == pytest.approx(found.kept.linears)
    assert loaded.dense_step_bytes(10) - loaded.engine.step_bytes(10) == found.dense_step_bytes - found.step_bytes
    dense = contenders.load("compare", tiny_llama[0], "xla", **QUIET)
    assert dense.keep == 1 and dense.dense_step_bytes(0) == dense.engine.step_bytes(0) == found.dense_step_bytes
    assert dense.weight_bytes == dense.engine.step_bytes(0)  # tied


def test_xla_runs_beside_any_other_backend(monkeypatch):
    assert contenders.backends_of("auto") == ["xla"] == contenders.backends_of("xla")
    assert contenders.backends_of("neuron-emulated") == ["neuron-emulated", "xla"]
    with pytest.raises(UsageError, match="abacus"):
        contenders.backends_of("abacus")
