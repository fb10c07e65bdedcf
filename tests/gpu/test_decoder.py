"""The backend for GPUs: its kernel on such a GPU where there is one, else in Pallas' interpreter.

The kernel's tests want jax 0.11, hence Python 3.12: `make test PYTHON=python3.12` in a fresh clone. Interpreted they
take half an hour on two cores.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsvd
from jaxsvd import kernels
from jaxsvd.bench.contenders import ranks_of
from jaxsvd.cache import KVCache
from jaxsvd.config import ModelConfig
from jaxsvd.engine import Engine
from jaxsvd.errors import JaxsvdError
from jaxsvd.kernels.gpu import GPU, JAX, layer_shapes, obstacle
from jaxsvd.kernels.gpu.shape import WIDEST
from jaxsvd.kernels.xla import XLA
from jaxsvd.models import build
from jaxsvd.models.check import LAST, check
from jaxsvd.models.llama import Llama
from jaxsvd.named import CONFIGS as CONFIGS_OF_MODELS
from jaxsvd.sampling import SamplingParams, mode_of, sampler_of
from jaxsvd.steps import Steps
from jaxsvd.weights import AbstractWeights, RandomWeights

kernel = pytest.mark.skipif(jax.__version_info__ < JAX, reason="the kernel is written for jax 0.11")

COMMON = {
    "vocab_size": 128,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "llama": {"model_type": "llama", "head_dim": 64, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},
    "narrow": {"model_type": "llama", "head_dim": 32},
}
# For many rows in the interpreter, which has one block for everything.
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 128}
# Ranks of the projections that are not dense.
RANKS = {
    "dense": {},
    "low-rank": {"q": 100, "k": 64, "v": 30, "o": 64, "gate": 64, "up": 100, "down": 128},
    "mixed": {"k": 64, "up": 40, "down": 7},  # members of one group dense and low-rank, in either order
    "mixed-again": {"q": 64, "v": 64, "gate": 64},
}


def gpu() -> GPU:
    """The backend, interpreted where there is no such GPU."""
    device = jax.local_devices()[0]
    if obstacle(device) is None:
        return GPU(cores=device.core_count)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return GPU(cores=1, interpret=plgpu.InterpretGPUParams() if jax.__version_info__ >= JAX else None)


def engine_of(architecture, ranks, backend, dtype=jnp.bfloat16, layers=2, **changes):
    """An engine of random weights, which are the same for every backend and dtype."""
    config = ModelConfig.from_hf(COMMON | CONFIGS[architecture] | {"num_hidden_layers": layers} | changes)

    class Rounded(RandomWeights):
        def make(self, name, *shape):
            return super().make(name, *shape).astype(jnp.bfloat16).astype(self.dtype)

    def rank(path, inputs, outputs):
        return RANKS[ranks].get(path.rpartition(".")[2].removesuffix("_proj"))

    return Engine(build(config, Rounded(dtype, rank), backend), steps_per_dispatch=3)


def followed(engine, prompt, forced):
    """The logits of decoded tokens: those behind each token of a forced text, but the last."""
    return followed_all(engine, [prompt], [forced])[1:, 0]


def followed_all(engine, prompts, forced):
    """The same of several rows, and of the last tokens of their prompts: (tokens, rows, vocab)."""
    return np.stack(list(engine.follow(prompts, len(forced[0]), lambda i, _: [row[i] for row in forced])))


def distance(actual, expected):
    """Relative."""
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@kernel
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_logits(architecture, ranks, rng):
    prompt, forced = rng.integers(0, 128, 21).tolist(), rng.integers(0, 128, 6).tolist()
    engine = engine_of(architecture, ranks, gpu())
    assert engine.model.decoder(1, 128) is not None
    exact = followed(engine_of(architecture, ranks, XLA("cpu"), jnp.float32), prompt, forced)
    plain = followed(engine_of(architecture, ranks, XLA("cpu")), prompt, forced)
    found = followed(engine, prompt, forced)
    assert distance(found, exact) < 1.2 * distance(plain, exact)


@kernel
def test_generation_goes_on_across_dispatches_and_longer_caches(rng):
    prompt = rng.integers(0, 128, 126).tolist()
    texts = [
        np.concatenate(list(engine_of("qwen3", "low-rank", backend).generate([prompt], [SamplingParams()], 8)), axis=1)
        for backend in (gpu(), XLA("cpu"))
    ]
    assert texts[0].shape == (1, 8)
    np.testing.assert_array_equal(*texts)


@kernel
@pytest.mark.parametrize(
    ("position", "capacity", "layers"),
    [(0, 512, 2), (1, 512, 2), (31, 512, 2), (32, 512, 2), (33, 512, 2), (511, 512, 2), (1100, 2048, 1)],
)
def test_positions(position, capacity, layers, rng):
    """Whatever part of the cache is there, and beside it numbers that are not to be read.

    At the last one a block attends to more than one piece of it, and the last piece is not full.
    """
    engine = engine_of("qwen3", "low-rank", gpu(), layers=layers)
    exact = engine_of("qwen3", "low-rank", XLA("cpu"), jnp.float32, layers)
    size = (2, capacity, 128)
    values = rng.standard_normal((2 * layers, *size)).astype(jnp.bfloat16)
    values[:, :, position:] = 1e4
    logits, caches = [], []
    for one in (engine, exact):
        keys, contents = (list(array) for array in jnp.asarray(values, one.dtype).reshape(2, layers, *size))
        cache = KVCache(keys, contents, jnp.array([position], jnp.int32))
        found, cache = jax.jit(one.decode_logits)(one.leaves, cache, jnp.array([5], jnp.int32))
        logits.append(np.asarray(found))
        caches.append(np.asarray([*cache.keys, *cache.values], np.float32).reshape(values.shape))
        assert cache.lengths == position + 1
    assert distance(*logits) < 2e-2
    # The new token is in the cache, and nothing else has changed.
    written = np.s_[:, :, position]
    assert distance(caches[0][written], caches[1][written]) < 2e-2
    untouched = np.arange(capacity) != position
    np.testing.assert_array_equal(caches[0][:, :, untouched], values.astype(np.float32)[:, :, untouched])


@kernel
@pytest.mark.parametrize("batch", [1, 2, 8, 16])
@pytest.mark.parametrize("keep", [0.8, None])
@pytest.mark.parametrize("name", CONFIGS_OF_MODELS)
def test_the_kernel_of_every_named_model_fits_into_shared_memory(name, keep, batch):
    """Pallas refuses it where it does not, without a GPU too."""
    config = CONFIGS_OF_MODELS[name]
    weights = AbstractWeights(jnp.bfloat16, ranks_of(config, keep, 16) if keep else None)
    steps = Steps(build(config, weights, GPU()))
    assert steps.model.decoder(batch, 128) is not None
    cache = jax.eval_shape(lambda: steps.empty_cache(batch, 128))
    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    jax.jit(steps.decode_logits).trace(steps.leaves, cache, token).lower(lowering_platforms=("cuda",))


@kernel
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("group", ["o", "gate_up", "down"])
def test_a_group_alone_is_lowered(group, batch):
    from jaxsvd.kernels.gpu.layers import make_layers

    config = CONFIGS_OF_MODELS["qwen3-0.6b"]
    heads, plans = build(config, AbstractWeights(jnp.bfloat16, ranks_of(config, 0.8, 128)), GPU())._form
    whole, alone = (make_layers(tuple(layer_shapes(heads, plans)), batch, 132, alone=one) for one in (None, group))

    def lowered(kernel):
        def run(x, positions, angles, norms, arrays, *caches):
            return kernel(
                x, positions, *angles, norms, arrays, *([jax.new_ref(one) for one in kind] for kind in caches)
            )

        return jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    layers, half = config.num_layers, config.head_dim // 2
    widths = *[config.hidden_size] * 2, *[config.head_dim] * 2
    given = (
        *(array(batch, config.hidden_size), array(batch, dtype=jnp.int32)),
        [array(batch, half, dtype=jnp.float32)] * 2,
        [array(layers, width) for width in widths],
        [[array(*shape) for plan in layer for shape in plan.array_shapes] for layer in plans],
        *[[array(batch * config.num_kv_heads, 128, config.head_dim)] * layers] * 2,
    )
    assert len(lowered(alone)) < len(lowered(whole))


@kernel
def test_one_layer(rng):
    prompt, forced = rng.integers(0, 128, 9).tolist(), [1, 2]
    engines = [engine_of("llama", "low-rank", backend, layers=1) for backend in (gpu(), XLA("cpu"))]
    assert distance(*(followed(engine, prompt, forced) for engine in engines)) < 2e-2


@kernel
@pytest.mark.parametrize(("ranks", "rows"), [((64, 176), 1), ((1040, 16), 1), ((64, 176), 3), ((1040, 176), 9)])
def test_layers_of_different_ranks(ranks, rows, rng):
    """A member is wider in one layer, another in the other. Of many rows not all that V read is held at once."""

    def rank(path, *_):
        return ranks[(".1." in path) == ("v_proj" in path)]

    config = ModelConfig.from_hf(COMMON | CONFIGS["qwen3"] | (SMALL if rows > 8 else {}))
    engines = [Engine(build(config, RandomWeights(jnp.bfloat16, rank), backend)) for backend in (gpu(), XLA("cpu"))]
    assert engines[0].model.decoder(rows, 128) is not None
    prompts, forced = rng.integers(0, 128, (rows, 9)).tolist(), [[1, 2, 3]] * rows
    assert distance(*(followed_all(engine, prompts, forced)[1:] for engine in engines)) < 3e-2


@pytest.mark.parametrize(
    ("architecture", "dtype", "capacity", "reason"),
    [
        ("qwen3", jnp.bfloat16, 120, "a multiple of 32 tokens, not 120"),
        ("qwen3", jnp.bfloat16, 2**23, "less than 2^31 elements: 1 rows of 8388608 tokens"),
        ("qwen3", jnp.float32, 128, "in bfloat16, and the model is in float32"),
        ("narrow", jnp.bfloat16, 128, "64 or 128 wide, not 32"),
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_xla(architecture, dtype, capacity, reason):
    model = engine_of(architecture, "low-rank", gpu(), dtype).model
    assert reason in model.obstacle(1, capacity)
    assert model.decoder(1, capacity) is None


@kernel
@pytest.mark.parametrize(
    ("odd", "rows"), [("o_proj", 1), ("gate_proj", 1), ("qkv", 1), ("mlp", 1), ("layer", 1), ("qkv", 3), ("mlp", 3)]
)
def test_layers_with_other_matrices_dense(odd, rows, rng):
    """Some are low-rank in the second layer only, and some in the first; the others are in both."""
    members = {"qkv": "q_proj v_proj", "mlp": "gate_proj up_proj down_proj", "layer": "proj"}.get(odd, odd).split()

    def rank(path, *_):
        second = any(name in path for name in members)
        return None if second == (".1." in path) and (second or "k_proj" in path) else 64

    config = ModelConfig.from_hf(COMMON | CONFIGS["qwen3"])
    engines = [Engine(build(config, RandomWeights(jnp.bfloat16, rank), backend)) for backend in (gpu(), XLA("cpu"))]
    assert engines[0].model.decoder(rows, 128) is not None
    prompts, forced = rng.integers(0, 128, (rows, 9)).tolist(), [[1, 2, 3]] * rows
    assert distance(*(followed_all(engine, prompts, forced)[1:] for engine in engines)) < 3e-2


@kernel
def test_what_is_no_number_does_not_stop_it():
    """The kernel waits for some that are not there; others are."""
    engine = engine_of("qwen3", "low-rank", gpu())
    table = engine.model.embed_tokens.weight.shape
    leaves = [leaf.at[7].set(jnp.nan) if leaf.shape == table else leaf for leaf in engine.leaves]
    cache = engine.empty_cache(1, 128)
    logits, cache = jax.jit(engine.decode_logits)(leaves, cache, jnp.array([7], jnp.int32))
    assert np.isnan(logits).all() and np.isnan(np.asarray(cache.keys[1], np.float32)[:, 0]).all()


@kernel
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_at_first_only_the_embedding_is_there(rows, rng):
    from jaxsvd.kernels.gpu.layers import _sent

    x, gain = jnp.asarray(rng.standard_normal((max(1, rows - 2), 48)), jnp.bfloat16), jnp.full((48,), 2.0, jnp.bfloat16)
    residual, vectors, squares = map(np.asarray, jax.jit(_sent, static_argnums=(2, 3))(x, gain, rows, 160))
    size = x.shape[0]
    np.testing.assert_array_equal(residual[:size], np.asarray(x, np.float32))
    np.testing.assert_array_equal(vectors[:size, :48], np.asarray(x * 2))
    assert (vectors[:, 48:].view(np.int16) == -1).all() and vectors.shape[1] >= 320
    np.testing.assert_allclose(squares[:size, :6].sum(1), (residual[:size] ** 2).sum(1), rtol=1e-5)
    parts = squares.view(np.int32)[:, :512].reshape(rows, 4, 128)
    assert (parts[:, 1:, :6] == -1).all() and not parts[:, :, 6:].any() and not squares[:, 512:].any()
    assert not residual[size:].any() and not vectors[size:, :48].any() and not squares[size:, :6].any()


def test_layers_of_other_widths_are_left_to_xla():
    config = ModelConfig.from_hf(COMMON | CONFIGS["qwen3"])
    config = dataclasses.replace(config, mlp_widths=((1, 256),))
    model = build(config, RandomWeights(jnp.bfloat16), gpu())
    assert "not differ in more than their ranks" in model.obstacle(1, 128)
    assert model.decoder(1, 128) is None


@kernel
@pytest.mark.parametrize(
    ("architecture", "ranks", "rows"),
    [
        ("qwen3", "low-rank", 2),
        ("qwen3", "dense", 3),
        ("llama", "low-rank", 5),
        ("qwen3", "mixed", 8),
        ("llama", "mixed-again", 8),
        ("qwen3", "low-rank", 9),
        ("llama", "mixed", 16),
    ],
)
def test_logits_of_several_rows(architecture, ranks, rows, rng):
    """Their prompts are of different lengths, some longer than what a block attends to at once."""
    prompts = [rng.integers(0, 128, 1 + 77 * row // (rows - 1)).tolist() for row in range(rows)]
    forced = rng.integers(0, 128, (rows, 3)).tolist()
    changes = SMALL if rows > 8 else {}
    engine = engine_of(architecture, ranks, gpu(), **changes)
    assert engine.model.decoder(rows, 128) is not None
    found, plain, exact = (
        followed_all(one, prompts, forced)[1:]
        for one in (
            engine,
            engine_of(architecture, ranks, XLA("cpu"), **changes),
            engine_of(architecture, ranks, XLA("cpu"), jnp.float32, **changes),
        )
    )
    for row in range(rows):
        assert distance(found[:, row], exact[:, row]) < 1.5 * distance(plain[:, row], exact[:, row])
    assert distance(found, exact) < 1.2 * distance(plain, exact)


@kernel
@pytest.mark.parametrize(
    ("ranks", "wide", "width", "rows"),
    [
        ("dense", "intermediate_size", WIDEST[8] + 16, 2),
        ("low-rank", "intermediate_size", 2 * WIDEST[8] + 1040, 2),
        ("mixed", "hidden_size", WIDEST[8] + 16, 2),
        ("dense", "hidden_size", WIDEST[16] + 16, 9),
    ],
)
def test_several_rows_too_wide_to_be_held_at_once(ranks, wide, width, rows, rng):
    """Of down, or behind the norms: what is held is filled twice or three times, last with less than whole slots."""
    prompts = [rng.integers(0, 128, 3 + 6 * (row % 2)).tolist() for row in range(rows)]
    changes = SMALL | {"layers": 1, wide: width}
    engines = [engine_of("qwen3", ranks, backend, **changes) for backend in (gpu(), XLA("cpu"))]
    assert engines[0].model.decoder(rows, 128) is not None
    found, expected = (followed_all(engine, prompts, [[1, 2 + row] for row in range(rows)])[1:] for engine in engines)
    assert distance(found, expected) < 2e-2


@kernel
@pytest.mark.parametrize(
    ("heads", "queries", "width", "rows"),
    [(32, 1, 64, 3), (32, 1, 64, 2), (32, 2, 128, 2), (32, 12, 64, 2), (4, 3, 64, 12)],
)
def test_many_heads_of_several_rows(heads, queries, width, rows, rng):
    """So many that the cache of a head is not cut, or else has two parts: those of a pair of blocks."""
    sizes = {"num_attention_heads": heads * queries, "num_key_value_heads": heads, "head_dim": width}
    prompts = [rng.integers(0, 128, 3 + 90 * row // (rows - 1)).tolist() for row in range(rows)]
    engines = [engine_of("llama", "low-rank", backend, layers=2, **sizes) for backend in (gpu(), XLA("cpu"))]
    assert engines[0].model.decoder(rows, 128) is not None
    found, expected = (followed_all(engine, prompts, [[1, 2, 3]] * rows)[1:] for engine in engines)
    assert distance(found, expected) < 2e-2


@pytest.mark.parametrize("ranks", ["dense", "low-rank", "mixed"])
def test_prompts_and_larger_batches_are_as_with_xla(ranks, rng):
    prompts = [rng.integers(0, 128, length).tolist() for length in (5, 21) * 9]
    backends = (gpu(), jnp.bfloat16), (XLA("cpu"), jnp.bfloat16), (XLA("cpu"), jnp.float32)
    engines = [engine_of("qwen3", ranks, *chosen) for chosen in backends]
    found, plain, exact = (engine.logits(prompts) for engine in engines)
    assert distance(found, exact) < 1.2 * distance(plain, exact)
    rows = [SamplingParams()] * 18
    texts = [np.concatenate(list(engine.generate(prompts, rows, 8)), axis=1) for engine in engines[:2]]
    np.testing.assert_array_equal(*texts)


def test_many_rows_are_left_to_xla():
    assert engine_of("qwen3", "low-rank", gpu()).model.decoder(17, 128) is None


def test_norms_are_put_together_before_the_loop_over_tokens(monkeypatch):
    given = []

    def run(x, positions, cosines, sines, norms, arrays, keys, values):
        given.extend(norm.shape for norm in norms)
        return x.astype(jnp.float32) + sum(norm.sum() for norm in norms)

    monkeypatch.setattr(GPU, "obstacle", lambda *_: None)
    monkeypatch.setattr(GPU, "decoder", lambda *_: run)
    engine, rows = engine_of("qwen3", "low-rank", gpu()), [SamplingParams()]
    cache, token = engine.empty_cache(1, 128), jnp.zeros((1,), jnp.int32)
    call = engine._decode_call(cache, token, None, sampler_of(rows), mode_of(rows))
    steps = jax.make_jaxpr(partial(call.step, **call.static))(*call.args).eqns
    (loop,) = [step.params["jaxpr"].eqns for step in steps if step.primitive.name == "scan"]
    assert given[:4] == [(2, 192), (2, 192), (2, 128), (2, 128)]
    assert not {step.primitive.name for step in loop} & {"stack", "concatenate"}


@kernel
def test_the_check_lets_a_right_kernel_pass():
    check(engine_of("qwen3", "mixed", gpu()).model)


@pytest.mark.parametrize("wrong", [None, "zero", "nan", "state", "keys", "values", "several"])
def test_a_wrong_kernel_is_found(wrong, monkeypatch):
    """XLA in the kernel's place, and one thing changed."""

    def together(self, run, x, keys, values, step):
        for i, layer in enumerate(self.layers):
            x, keys[i], values[i] = layer(x, keys[i], values[i], step)
        if wrong in ("keys", "values"):
            buffers = {"keys": keys, "values": values}[wrong]
            buffers[1] = buffers[1].at[:, LAST].multiply(0.5)
        if wrong == "several" and x.shape[0] > 1:
            return x[::-1]
        return x * {"zero": 0.0, "nan": jnp.nan, "state": -1.0}.get(wrong, 1.0)

    model = engine_of("qwen3", "low-rank", gpu()).model
    monkeypatch.setattr(GPU, "decoder", lambda *_: "never called")
    monkeypatch.setattr(Llama, "_together", together)
    if wrong is None:
        check(model)
    else:
        with pytest.raises(JaxsvdError, match=r"differ by .* use backend xla"):
            check(model)


@pytest.fixture
def device(monkeypatch):
    """Pretend that JAX's device is another one."""

    def pretend(capability, version=JAX):
        found = SimpleNamespace(compute_capability=capability, core_count=132, device_kind="a GPU")
        monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [found])
        monkeypatch.setattr(jax, "__version_info__", version)

    return pretend


def test_auto_takes_the_kernel_where_it_runs(device):
    device("9.0")
    assert kernels.choose("auto", "gpu").name == kernels.choose("gpu", "gpu", jnp.float32).name == "gpu"
    assert kernels.choose("auto", "gpu", jnp.float32).name == "xla"
    assert kernels.choose("auto", "gpu", jnp.float16).name == "xla"
    assert kernels.choose("auto", "cpu").name == "xla"


@pytest.mark.parametrize(
    ("capability", "version", "message"),
    [
        ("8.0", JAX, r"compute capability 9\.0, and this is a GPU"),
        ("10.0", JAX, "capability"),
        ("9.0", (0, 10), "jax 0.11"),
    ],
)
def test_elsewhere_it_is_refused_and_auto_takes_xla(capability, version, message, device):
    device(capability, version)
    assert kernels.choose("auto", "gpu").name == "xla"
    with pytest.raises(kernels.UsageError, match=message):
        kernels.choose("gpu", "gpu")


@pytest.mark.parametrize("failure", ["kind", "kernel"])
def test_auto_goes_back_to_xla(failure, tiny_llama, monkeypatch, caplog):
    """Where the kernel can't run a model, and where it fails with it."""
    monkeypatch.setattr(kernels, "choose", lambda name="auto", *_, **__: XLA("cpu") if name == "xla" else gpu())
    if failure == "kind":
        monkeypatch.setattr(GPU, "obstacle", lambda *_: "of no reason")
    else:
        monkeypatch.setattr(GPU, "obstacle", lambda *_: None)
        monkeypatch.setattr(GPU, "decoder", lambda *_: 1 / 0)
    model = jaxsvd.load(tiny_llama[0], dtype="bfloat16", progress=False)
    assert {"kind": "of no reason", "kernel": "division by zero"}[failure] in caplog.text
    assert model.engine.model.layers[0].self_attn.o.backend.name == "xla"
    if failure == "kernel":
        with pytest.raises(ZeroDivisionError):
            jaxsvd.load(tiny_llama[0], dtype="bfloat16", backend="gpu", progress=False)
