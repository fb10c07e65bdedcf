"""The building blocks against plain NumPy in float64, and RoPE against transformers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsvd.attention import attend
from jaxsvd.cache import write
from jaxsvd.config import ModelConfig, Rope
from jaxsvd.errors import UsageError
from jaxsvd.kernels import Dense, Factored, choose, shape_of
from jaxsvd.kernels.xla import MANY, RANK_MULTIPLE, XLA
from jaxsvd.layers import Embedding, RMSNorm, rope_angles, rope_frequencies, rotate
from jaxsvd.weights import AbstractWeights, RandomWeights, break_even, uniform_ranks

# RoPE.

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    "llama3 short": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3, "original_max_position_embeddings": 64},
}


def hf_config(rope, head_dim, **options):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim, "vocab_size": 8}
    return LlamaConfig(**sizes, intermediate_size=8, num_hidden_layers=1, rope_parameters=rope, **options)


def our_rope(hf):
    return ModelConfig.from_hf(hf.to_dict()).rope


@pytest.mark.parametrize("head_dim", [2, 64, 128])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_are_those_of_transformers(kind, head_dim):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = hf_config(ROPES[kind], head_dim, max_position_embeddings=131072)
    wanted = LlamaRotaryEmbedding(hf).inv_freq.numpy()  # by ROPE_INIT_FUNCTIONS, and itself where it is the default
    np.testing.assert_allclose(rope_frequencies(our_rope(hf), head_dim), wanted, rtol=3e-6)


def test_rotation_is_that_of_transformers(rng):
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    hf = hf_config(ROPES["llama3"], 64, max_position_embeddings=131072)
    q = rng.standard_normal((2, 4, 5, 64)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [95, 96, 97, 98, 99]])
    tensor = torch.from_numpy(q)
    wanted = apply_rotary_pos_emb(tensor, tensor, *LlamaRotaryEmbedding(hf)(tensor, torch.from_numpy(positions)))[0]
    got = rotate(jnp.asarray(q), *rope_angles(jnp.asarray(positions), our_rope(hf), 64))
    np.testing.assert_allclose(got, wanted.numpy(), atol=5e-5)  # angles near 100 are float32


def test_rotation_keeps_the_dtype_and_position_zero(rng):
    x = jnp.asarray(rng.standard_normal((1, 2, 1, 8)), jnp.bfloat16)
    y = rotate(x, *rope_angles(jnp.zeros((1, 1), jnp.int32), Rope(), 8))
    assert y.dtype == jnp.bfloat16
    assert (y == x).all()


# RMSNorm and embedding.


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(rng, dtype, tolerance, scale):
    norm = RMSNorm(RandomWeights(dtype), "norm", 96, 1e-5)
    x = (scale * rng.standard_normal((2, 3, 96))).astype(dtype)
    wide, weight = x.astype(np.float64), np.asarray(norm.weight[...], np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    got = norm(jnp.asarray(x))
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=tolerance, atol=tolerance)


def test_embedding_clips_ids():
    embedding = Embedding(RandomWeights(), XLA("cpu"), "embed", 7, 4)
    table = np.asarray(embedding.weight[...])
    np.testing.assert_array_equal(embedding(jnp.array([0, 6, 7, -1, 100])), table[[0, 6, 6, 0, 6]])


# Attention.


def reference_attention(q, k, v, positions):
    """q (batch, heads, tokens, d), k and v (batch, kv_heads, capacity, d), in float64, one query at a time."""
    batch, heads, tokens, width = q.shape
    result = np.zeros(q.shape)
    for b, h, t in np.ndindex(batch, heads, tokens):
        kv = h * k.shape[1] // heads
        visible = positions[b, t] + 1
        scores = k[b, kv, :visible] @ q[b, h, t] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        result[b, h, t] = weights @ v[b, kv, :visible] / weights.sum()
    return result


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 3), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (ml_dtypes.bfloat16, 3e-2)])
def test_attention(rng, heads, kv_heads, tokens, dtype, tolerance):
    batch, capacity, width = 3, 24, 16
    q = rng.standard_normal((batch, heads, tokens, width)).astype(dtype)
    k, v = (rng.standard_normal((batch, kv_heads, capacity, width)).astype(dtype) for _ in range(2))
    starts = np.array([0, 7, capacity - tokens])  # rows of different lengths
    positions = (starts[:, None] + np.arange(tokens)).astype(np.int32)
    wanted = reference_attention(*(x.astype(np.float64) for x in (q, k, v)), positions)
    # What lies behind a row's positions must not matter, however large.
    for row, last in enumerate(positions[:, -1]):
        k[row, :, last + 1 :] = v[row, :, last + 1 :] = 1e30
    flat = (x.reshape(-1, capacity, width) for x in (k, v))
    got = jax.jit(attend)(q, *flat, positions)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=tolerance, atol=tolerance)


# The cache.


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """Where rows are written one by one, and where all together."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


@pytest.mark.usefixtures("platform")
def test_write_puts_each_row_where_it_belongs():
    new = jnp.arange(2 * 3 * 2 * 4, dtype=jnp.float32).reshape(2, 3, 2, 4)
    buffer = np.asarray(write(jnp.full((6, 10, 4), -1.0), new, jnp.array([1, 7])))
    for row, start in enumerate([1, 7]):
        rows = buffer[3 * row : 3 * row + 3]
        np.testing.assert_array_equal(rows[:, start : start + 2], new[row])
        assert (np.delete(rows, [start, start + 1], axis=1) == -1).all()


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("start", [-5, 0, 3, 8, 9, 10, 100])
def test_write_clamps_into_the_buffer(start):
    new = jnp.ones((2, 3, 2, 4))
    at = int(
        np.clip(start if start >= 0 else 10 + start, 0, 8)
    )  # as every lax slice, negative starts count from the end
    for starts in (jnp.int32(start), jnp.full((2,), start, jnp.int32)):
        buffer = np.asarray(write(jnp.zeros((6, 10, 4)), new, starts))
        assert (buffer[:, at : at + 2] == 1).all()
        assert buffer.sum() == new.size


@pytest.mark.parametrize(("platform", "operations"), [("cpu", (8, 0)), ("gpu", (0, 1))], indirect=["platform"])
def test_on_a_gpu_rows_are_written_together(platform, operations):
    """There each operation is a kernel."""
    made = jax.make_jaxpr(lambda *given: write(*given))(jnp.zeros((16, 10, 4)), jnp.ones((8, 2, 1, 4)), jnp.arange(8))
    names = [equation.primitive.name for equation in made.eqns]
    assert (names.count("dynamic_update_slice"), names.count("scatter")) == operations


def test_write_casts():
    assert write(jnp.zeros((3, 4, 2), jnp.bfloat16), jnp.ones((1, 3, 1, 2)), jnp.int32(0)).dtype == jnp.bfloat16


# The XLA backend.

INPUTS = 48
GROUPS = {
    "one dense": [(64, None)],
    "three dense": [(64, None), (32, None), (32, None)],
    "rank 1": [(64, 1)],
    "rank 7": [(80, 7)],
    "rank 16": [(40, 16)],
    "rank 100": [(160, 100)],  # more than the inputs
    "ranks": [(64, 7), (32, 16), (32, 1)],
    "mixed": [(64, None), (32, 7), (24, None), (160, 100)],
    "prime": [(37, None), (53, 7)],
}


def make_group(rng, members, dtype):
    def draw(inputs, outputs):
        return (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(dtype)

    return [
        Dense(draw(INPUTS, outputs)) if rank is None else Factored(draw(INPUTS, rank), draw(rank, outputs))
        for outputs, rank in members
    ]


def exact(x, matrix):
    y = x.astype(np.float64)
    for factor in matrix:
        y = y @ factor.astype(np.float64)
    return y


def magnitude(x, matrix):
    """What the rounding errors of a product are relative to: the product of absolute values."""
    return exact(np.abs(x.astype(np.float64)), [np.abs(factor.astype(np.float64)) for factor in matrix])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 1e-2)])
def test_project(rng, dtype, tolerance, cores, platform):
    backend = XLA(platform, cores)
    groups = {name: make_group(rng, members, dtype) for name, members in GROUPS.items()}
    plans = {name: backend.plan(tuple(map(shape_of, group))) for name, group in groups.items()}
    arrays = {name: backend.pack(plan, groups[name]) for name, plan in plans.items()}
    xs = [rng.standard_normal(shape).astype(dtype) for shape in ((1, 1, INPUTS), (5, INPUTS), (2, MANY, INPUTS))]

    @jax.jit  # one compilation for all of them
    def project(xs, arrays):
        return {name: [backend.project(plan, x, arrays[name]) for x in xs] for name, plan in plans.items()}

    for name, results in project(xs, arrays).items():
        assert tuple(array.shape for array in arrays[name]) == plans[name].array_shapes
        assert {array.dtype for array in arrays[name]} == {np.dtype(dtype)}
        for x, ys in zip(xs, results, strict=True):
            for y, matrix in zip(ys, groups[name], strict=True):
                wanted = exact(x, matrix)
                assert (y.shape, y.dtype) == (wanted.shape, dtype)
                error = np.abs(np.asarray(y, np.float64) - wanted)
                assert (error <= tolerance * magnitude(x, matrix)).all(), name


def test_plans_are_hashable():
    shapes = (shape_of(Dense(np.zeros((4, 8)))), shape_of(Factored(np.zeros((4, 2)), np.zeros((2, 8)))))
    assert hash(XLA("cpu", 2).plan(shapes)) == hash(XLA("cpu", 2).plan(shapes))


def test_project_sums_bfloat16_in_float32():
    # 1 + 255·2⁻⁸ needs more bits than bfloat16 sums have: they would stay at 1.
    w = np.full((256, 8), 2.0**-8, ml_dtypes.bfloat16)
    w[0] = 1
    for platform in ("cpu", "gpu"):
        backend = XLA(platform, 2)
        plan = backend.plan((shape_of(Dense(w)),))
        for rows in (1, MANY):
            (y,) = backend.project(plan, jnp.ones((rows, 256), jnp.bfloat16), backend.pack(plan, [Dense(w)]))
            np.testing.assert_array_equal(np.asarray(y, np.float32), 2.0)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize("vocab", [128, 97])
def test_attend_gives_float32_logits(rng, vocab, cores, platform):
    table = rng.standard_normal((vocab, INPUTS)).astype(ml_dtypes.bfloat16)
    for shape in ((1, INPUTS), (5, INPUTS), (1, 3, INPUTS)):
        x = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        logits = XLA(platform, cores).attend(jnp.asarray(x), jnp.asarray(table))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact(x, [table.T]), atol=1e-4)


def test_ranks_are_padded():
    plan = XLA("cpu").plan((shape_of(Factored(np.zeros((INPUTS, 7)), np.zeros((7, 64)))),))
    assert plan.widths == (RANK_MULTIPLE,)


def test_backends_are_chosen_by_name():
    if jax.default_backend() == "cpu":
        assert choose() == choose("xla")
    assert choose(platform="cpu") == choose("xla", "cpu")
    assert choose("xla", platform="gpu").platform == "gpu"
    with pytest.raises(UsageError, match=r"fast.*auto, xla"):
        choose("fast")


# Weights without a checkpoint.


def test_uniform_ranks():
    ranks = uniform_ranks(0.8, 128)
    assert break_even(2560, 9728) == pytest.approx(2026.67, abs=0.01)
    assert ranks("any", 2560, 9728) == 1664  # 0.8 · 2026.67 = 1621.3, and 13 · 128 is nearest
    assert uniform_ranks(0.8)("any", 2560, 9728) == 1621
    assert uniform_ranks(1.0)("any", 64, 64) is None
    assert uniform_ranks(0.01, 16)("any", 64, 64) == 16
    assert uniform_ranks(0.5, 64)("any", 64, 64) is None  # the least rank is beyond the break-even of 32


def test_random_weights_depend_on_name_and_seed():
    weights = RandomWeights()
    np.testing.assert_array_equal(weights.array("a", 4, 5), RandomWeights().array("a", 4, 5))
    assert (weights.array("a", 4, 5) != weights.array("b", 4, 5)).any()
    assert (weights.array("a", 4, 5) != RandomWeights(seed=1).array("a", 4, 5)).any()


def test_abstract_weights_hold_nothing():
    matrix, bias = AbstractWeights(jnp.bfloat16, uniform_ranks(0.5)).matrix("a", 64, 64, bias=True)
    assert shape_of(matrix) == (64, 64, 16)
    assert (bias.shape, bias.dtype) == ((64,), jnp.bfloat16)
