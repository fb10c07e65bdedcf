"""Tiny models against transformers on torch, in float32: dense, and low-rank in every layout."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from factored import mixed_ranks, projections, read_tensors, with_weights, write_factored
from tiny import make_tiny

import jaxsvd
from jaxsvd import kernels
from jaxsvd.checkpoint.read import Checkpoint, CheckpointWeights
from jaxsvd.engine import Engine
from jaxsvd.kernels import Dense, Factored

VOCAB = 128
LAYOUTS = ("svd-llm", "svd-llm-hf")
torch.set_num_threads(1)  # nothing here is worth two


@pytest.fixture(scope="module")
def pair(tiny):
    """Each tiny model twice: here and in torch."""
    folder, reference = tiny
    return jaxsvd.load(folder, dtype="float32"), reference


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biased")
    return folder, make_tiny("llama-biased", folder)


def random_rows(rng, *lengths):
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def torch_logits(model, rows):
    with torch.no_grad():
        return model(torch.tensor(rows)).logits.numpy()


def torch_greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return out[0, len(prompt) :].tolist()


def check_logits(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= tolerance
    assert expected.std() > 0.1, "a model that answers nearly the same to everything shows nothing"


# Dense models.


def test_logits(pair, rng):
    lm, reference = pair
    rows = random_rows(rng, 50, 50, 50)
    check_logits(lm.logits(rows), torch_logits(reference, rows), 1e-4)


def test_ragged_logits_equal_each_row_alone(pair, rng):
    lm, _ = pair
    rows = random_rows(rng, 50, 39, 1)
    together = lm.logits(rows)
    for row, logits in zip(rows, together, strict=True):
        assert np.abs(logits[: len(row)] - lm.logits(row)[0]).max() <= 1e-5
        assert not logits[len(row) :].any()


def test_greedy_tokens(pair, rng):
    lm, reference = pair
    prompts = random_rows(rng, 50, 39, 1)
    expected = [torch_greedy(reference, prompt, 20) for prompt in prompts]
    assert [lm.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts] == expected
    assert [completion.token_ids for completion in lm.generate(prompts, max_new_tokens=20)] == expected


@pytest.mark.parametrize("kind", ["llama-untied", "qwen3"])
def test_prompts_longer_than_the_largest_bucket(kind, rng, tmp_path):
    folder, reference = tmp_path, make_tiny(kind, tmp_path)
    model = Checkpoint(folder).load(kernels.choose(), jnp.float32)
    engine = Engine(model, lengths="16,32/auto", steps_per_dispatch=4)
    row = random_rows(rng, 3 * 32 + 5)
    check_logits(engine.logits(row), torch_logits(reference, row), 1e-4)
    # One row ends in the first chunk, one with the second, one in the last.
    prompts = random_rows(rng, 9, 64, 101)
    blocks = engine.generate(prompts, [jaxsvd.SamplingParams()] * 3, 12)
    tokens = np.concatenate(list(blocks), axis=1).tolist()
    assert tokens == [torch_greedy(reference, prompt, 12) for prompt in prompts]


# Low-rank models. The oracle is the torch model with the factors multiplied out.


def check_factored(folder, oracle, rng, tolerance=2e-4):
    rows = random_rows(rng, 20, 20)
    check_logits(jaxsvd.load(folder, dtype="float32").logits(rows), torch_logits(oracle, rows), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_rank(tiny, layout, rng, tmp_path):
    folder, reference = tiny
    ranks = mixed_ranks(read_tensors(folder))
    assert {1, 7, 13} <= set(ranks.values()) and len(ranks) < len(projections(read_tensors(folder)))
    oracle = with_weights(reference, write_factored(folder, tmp_path, ranks, layout))
    assert Checkpoint(tmp_path).ranks == ranks
    check_factored(tmp_path, oracle, rng)


def test_low_rank_greedy_tokens(tiny, rng, tmp_path):
    """A decode step of one row multiplies in another way than a prompt does."""
    folder, reference = tiny
    oracle = with_weights(reference, write_factored(folder, tmp_path, mixed_ranks(read_tensors(folder))))
    (prompt,) = random_rows(rng, 9)
    completion = jaxsvd.load(tmp_path, dtype="float32").generate(prompt, max_new_tokens=20)
    assert completion.token_ids == torch_greedy(oracle, prompt, 20)


def test_low_rank_greedy_tokens_of_a_ragged_batch(tiny_llama, rng, tmp_path):
    folder, reference = tiny_llama
    oracle = with_weights(reference, write_factored(folder, tmp_path, mixed_ranks(read_tensors(folder))))
    prompts = random_rows(rng, 50, 9, 1)
    completions = jaxsvd.load(tmp_path, dtype="float32").generate(prompts, max_new_tokens=20)
    assert [completion.token_ids for completion in completions] == [torch_greedy(oracle, p, 20) for p in prompts]


@pytest.mark.parametrize("parts", [("mlp",), ("mlp", "self_attn")], ids=["current", "legacy"])
def test_svd_flash(tiny_llama, parts, rng, tmp_path):
    folder, reference = tiny_llama
    factored = [path for path in projections(read_tensors(folder)) if path.split(".")[-2] in parts]
    ranks = dict(zip(factored, itertools.cycle((13, 7, 20)), strict=False))
    oracle = with_weights(reference, write_factored(folder, tmp_path, ranks, "svd-llm"))
    assert Checkpoint(tmp_path).ranks == ranks
    check_factored(tmp_path, oracle, rng)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("second_bias", [False, True], ids=["bias-of-the-path", "bias-of-the-second-factor"])
def test_biases_of_factored_matrices(biased, layout, second_bias, rng, tmp_path):
    folder, reference = biased
    ranks = dict.fromkeys(projections(read_tensors(folder)), 9)
    equal = write_factored(folder, tmp_path, ranks, layout, second_bias)
    path = "model.layers.0.self_attn.q"
    second = {"svd-llm": f"{path}_u_proj.bias", "svd-llm-hf": f"{path}_proj.u_proj.bias"}[layout]
    assert (second if second_bias else f"{path}_proj.bias") in read_tensors(tmp_path)
    check_factored(tmp_path, with_weights(reference, equal), rng)


@pytest.mark.parametrize("rank", [1, 7, 13])
def test_one_rank_for_all(tiny_llama, rank, rng, tmp_path):
    folder, reference = tiny_llama
    ranks = dict.fromkeys(projections(read_tensors(folder)), rank)
    check_factored(tmp_path, with_weights(reference, write_factored(folder, tmp_path, ranks)), rng)


def test_mixed_dtypes_in_shards(tiny_llama, rng, tmp_path):
    folder, reference = tiny_llama
    dtypes = (np.float32, ml_dtypes.bfloat16, np.float16)
    ranks = mixed_ranks(read_tensors(folder))
    equal = write_factored(folder, tmp_path, ranks, dtypes=dtypes, shards=3)
    assert not (tmp_path / "model.safetensors").exists()
    stored = Checkpoint(tmp_path).files.entries.values()
    assert {entry.dtype for entry in stored} == {"F32", "BF16", "F16"}
    assert len({entry.file for entry in stored}) == 3
    check_factored(tmp_path, with_weights(reference, equal), rng)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_rank_equals_dense(tiny_llama, layout, rng, tmp_path):
    folder, _ = tiny_llama
    dense = read_tensors(folder)
    ranks = {path: min(dense[f"{path}.weight"].shape) for path in projections(dense)}
    write_factored(folder, tmp_path, ranks, layout)
    weights = CheckpointWeights(Checkpoint(tmp_path), jnp.float32)
    for path in ranks:
        outputs, inputs = dense[f"{path}.weight"].shape
        assert isinstance(weights.matrix(path, inputs, outputs, bias=False)[0], Dense)
    rows = random_rows(rng, 20, 20)
    factored, dense = (jaxsvd.load(path, dtype="float32").logits(rows) for path in (tmp_path, folder))
    check_logits(factored, dense, 1e-3)


# A rank r costs r·(in + out) parameters: 64×64 breaks even at exactly 32, 64×32 at 21.3, 64×96 at 38.4.
@pytest.mark.parametrize(
    ("matrix", "rank", "kind"),
    [
        ("self_attn.q_proj", 31, Factored),
        ("self_attn.q_proj", 32, Dense),
        ("self_attn.q_proj", 33, Dense),
        ("self_attn.k_proj", 21, Factored),
        ("self_attn.k_proj", 22, Dense),
        ("mlp.down_proj", 38, Factored),
        ("mlp.down_proj", 39, Dense),
    ],
)
def test_break_even(tiny_llama, matrix, rank, kind, tmp_path):
    folder, _ = tiny_llama
    path = f"model.layers.0.{matrix}"
    equal = write_factored(folder, tmp_path, {path: rank})
    checkpoint = Checkpoint(tmp_path)
    outputs, inputs = equal[f"{path}.weight"].shape
    found, _ = CheckpointWeights(checkpoint, jnp.float32).matrix(path, inputs, outputs, bias=False)
    assert type(found) is kind
    product = found.w if isinstance(found, Dense) else found.u @ found.v
    np.testing.assert_allclose(product.T, equal[f"{path}.weight"], atol=1e-5)
    if isinstance(found, Factored):
        assert found.u.shape == (inputs, rank) and found.v.shape == (rank, outputs)
