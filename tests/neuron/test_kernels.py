"""The Trainium kernels on the emulator: values against float64 products, traffic and costs against closed forms."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsvd.kernels.neuron import emulator

TARGETS = ("trn1", "trn2", "trn3")
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
TOLERANCE = {"bf16": 2.5e-3, "f16": 1e-3, "f32": 1e-5}
GIB = 2**30
FOLDER = Path(emulator.__file__).parents[1]
XUV, MLP, BASELINES = (emulator.load(name) for name in ("xuv", "mlp", "baselines"))

# M, K, r, N: around every tile's edge, and at random.
EDGES = [1, 2, 31, 127, 128, 129, 255, 257, 511, 513]


def shapes(count, seed=0):
    rng = np.random.default_rng(seed)
    found = [(1, 1, 1, 1), (1, 128, 128, 512), (128, 576, 208, 1536), (129, 640, 129, 513), (640, 300, 260, 700)]
    while len(found) < count:
        m, k, r, n = (int(rng.choice(EDGES) if rng.random() < 0.5 else rng.integers(1, 600)) for _ in range(4))
        found.append((m, k, min(r, 300), n))
    return found


def draw(rng, dtype, *shape):
    """Normal numbers; of a matrix (in, out) scaled so that products keep the size of x."""
    return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(DTYPES[dtype])


def tokens_of(rng, dtype, m, k):
    return rng.standard_normal((m, k)).astype(DTYPES[dtype])


def exact(*matrices):
    product = matrices[0].astype(np.float64)
    for matrix in matrices[1:]:
        product = product @ matrix.astype(np.float64)
    return product


def silu(x):
    return x / (1 + np.exp(-x))


def error(found, want):
    """Frobenius norm of the error, relative."""
    assert found.shape == want.shape
    return np.linalg.norm(found.astype(np.float64) - want) / np.linalg.norm(want)


def as_tiles(x):
    """(M, K) in the layout "tiles", zero behind feature K."""
    m, k = x.shape
    tiles = -(-k // 128)
    padded = np.zeros((tiles * 128, m), x.dtype)
    padded[:k] = x.T
    return np.ascontiguousarray(padded.reshape(tiles, 128, m).swapaxes(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_xuv_of_60_ragged_shapes(target, dtype, rng):
    errors, sizes = [], []
    for m, k, r, n in shapes(60):
        x, u, v = tokens_of(rng, dtype, m, k), draw(rng, dtype, k, r), draw(rng, dtype, r, n)
        (y,) = emulator.run(XUV.xuv, x, u, v, target=target).outputs
        assert y.dtype == x.dtype
        want = exact(x, u, v)
        # Rounding is random: a norm over few numbers, or few ranks, scatters around that over many.
        assert error(y, want) <= TOLERANCE[dtype] * (1 + min(r, m * n) ** -0.5), (m, k, r, n)
        errors.append(np.square(y - want).sum() / np.square(want).mean())
        sizes.append(y.size)
    assert (sum(errors) / sum(sizes)) ** 0.5 <= TOLERANCE[dtype]


LAYOUTS = {"rows": lambda x: x, "columns": lambda x: np.ascontiguousarray(x.T), "tiles": as_tiles}


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("y_layout", ["rows", "columns"])
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_xuv_of_every_layout(x_layout, y_layout, activation, rng):
    # The last is more tokens than a block has.
    for m, k, r, n in [
        (1, 576, 80, 192),
        (37, 130, 70, 300),
        (300, 257, 130, 515),
        (700, 200, 64, 130),
        (2300, 40, 9, 70),
    ]:
        x, u, v = tokens_of(rng, "bf16", m, k), draw(rng, "bf16", k, r), draw(rng, "bf16", r, n)
        (y,) = emulator.run(
            XUV.xuv, LAYOUTS[x_layout](x), u, v, x_layout=x_layout, y_layout=y_layout, silu=activation
        ).outputs
        want = exact(x, u, v)
        want = silu(want) if activation else want
        assert error(y if y_layout == "rows" else y.T, want) <= 3e-3


GROUPS = {
    "low-rank": (None, None, None),
    "middle dense": (None, 300, None),
    "ends dense": (200, None, 130),
    "all dense": (64, 520, 1),
    "single": (None,),
    "single dense": (700,),
    "pair": (None, None),
}


@pytest.mark.parametrize("tokens", [1, 50, 300, 2100])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_low_rank_and_dense_members(name, tokens, rng):
    k, ranks, outputs = 450, (130, 64, 7), (600, 129, 256)
    x, firsts, vs, wants = tokens_of(rng, "f32", tokens, k), [], [], []
    for dense, rank, n in zip(GROUPS[name], ranks, outputs, strict=False):
        first = draw(rng, "f32", k, dense or rank)
        firsts.append(first)
        vs.append(None if dense else draw(rng, "f32", rank, n))
        wants.append(exact(x, first) if dense else exact(x, first, vs[-1]))
    widths = tuple(first.shape[1] for first in firsts)
    for target in TARGETS:
        ys = emulator.run(XUV.xuv_group, x, np.concatenate(firsts, 1), *vs, widths=widths, target=target).outputs
        assert all(error(y, want) <= 1e-5 for y, want in zip(ys, wants, strict=True))


@pytest.mark.parametrize("dense", ["", "gate", "up", "down", "gate up down"])
@pytest.mark.parametrize("tokens", [1, 16, 300, 1100])
def test_the_gated_mlp(tokens, dense, rng):
    k, n, ranks = 260, 450, {"gate": 70, "up": 130, "down": 40}
    x, firsts, vs, whole = tokens_of(rng, "bf16", tokens, k), {}, {}, {}
    for name, rank in ranks.items():
        inputs, outputs = (n, k) if name == "down" else (k, n)
        low_rank = name not in dense
        firsts[name] = draw(rng, "bf16", inputs, rank if low_rank else outputs)
        vs[name] = draw(rng, "bf16", rank, outputs) if low_rank else None
        whole[name] = exact(firsts[name], vs[name]) if low_rank else exact(firsts[name])
    act = silu(x.astype(np.float64) @ whole["gate"]) * (x.astype(np.float64) @ whole["up"])
    u, widths = np.concatenate([firsts["gate"], firsts["up"]], 1), (firsts["gate"].shape[1], firsts["up"].shape[1])
    for target in TARGETS:
        (tiles,) = emulator.run(MLP.swiglu_xuv, x, u, vs["gate"], vs["up"], widths=widths, target=target).outputs
        found = tiles.swapaxes(0, 1).reshape(-1, tokens)
        assert error(found[:n].T, act) <= 4e-3
        assert not found[n:].any()
        (y,) = emulator.run(
            MLP.mlp_xuv, x, u, firsts["down"], vs["gate"], vs["up"], vs["down"], widths=widths, target=target
        ).outputs
        assert error(y, act @ whole["down"]) <= 5e-3


@pytest.mark.parametrize("shape", [(1, 130, 60, 70), (200, 300, 129, 520), (513, 128, 64, 1100)])
def test_baselines(shape, rng):
    m, k, r, n = shape
    x, u, v, w = tokens_of(rng, "f32", m, k), draw(rng, "f32", k, r), draw(rng, "f32", r, n), draw(rng, "f32", k, n)
    for kernel in (BASELINES.matmul, BASELINES.matmul_tiled):
        assert error(emulator.run(kernel, x, w).outputs[0], exact(x, w)) <= 1e-5
    assert error(emulator.run(BASELINES.unfused_pair, x, u, v).outputs[0], exact(x, u, v)) <= 1e-5


def cost(kernel, *shapes, target="trn2", dtype=ml_dtypes.bfloat16, **options):
    """What a kernel costs on operands of these shapes, without their values."""
    import jax

    arrays = [None if shape is None else jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return emulator.run(kernel, *arrays, target=target, values=False, **options).cost


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(5, 300, 77, 450), (1000, 257, 130, 515), (3000, 2048, 1280, 1000)])
def test_traffic_is_the_closed_form_to_the_byte(shape, target):
    m, k, r, n = shape
    found = cost(XUV.xuv, (m, k), (k, r), (r, n), target=target)
    block = found_block(found, k * r * 2, m)
    assert found.hbm_bytes == 2 * (m * k + m * n + -(-m // block) * r * (k + n))


def found_block(found, once, m):
    """The tokens of a block, from how often u was read."""
    times = found.traffic["u"].read // once
    assert found.traffic["u"].read == times * once
    return -(-m // times)


# The bars: each is asked for on every target unless it names one. Times are modelled lower bounds.

GATE_1B = ((1024, 2048), (2048, 1280), (1280, 8192))
CHAIN_32K = ((32768, 8192), (8192, 4096), (4096, 16384))


@pytest.mark.parametrize("target", TARGETS)
def test_prefill_keeps_the_array_busy(target):
    found = cost(XUV.xuv, *GATE_1B, target=target)
    assert found.array_use >= 0.97 and found.bound == "tensor"
    assert max(found.seconds["vector"], found.seconds["scalar"]) < 0.25 * found.seconds["tensor"]
    assert found.hbm_bytes == 2 * (1024 * (2048 + 8192) + 1280 * (2048 + 8192))
    check_memory(found)


def check_memory(found):
    assert found.sbuf_margin > 0 and found.psum_banks <= 8


@pytest.mark.parametrize(
    ("target", "gib"),
    [
        pytest.param("trn1", 9.6, marks=pytest.mark.slow),
        ("trn2", 8.6),
        pytest.param("trn3", 7.6, marks=pytest.mark.slow),
    ],
)
def test_the_papers_chain_at_32k_tokens(target, gib):
    found = cost(XUV.xuv, *CHAIN_32K, target=target)
    assert found.array_use >= 0.95 and found.bound == "tensor"
    assert found.hbm_bytes <= gib * GIB
    block = found_block(found, 8192 * 4096 * 2, 32768)
    assert found.hbm_bytes == 2 * (32768 * 24576 + -(-32768 // block) * 4096 * 24576)
    check_memory(found)


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("target", TARGETS)
def test_decode_is_bound_by_its_bytes(target, tokens):
    gate_up = cost(
        MLP.swiglu_xuv, (tokens, 2560), (2560, 3328), (1664, 9728), (1664, 9728), widths=(1664, 1664), target=target
    )
    down = cost(XUV.xuv, (128, 76, tokens), (9728, 1664), (1664, 2560), x_layout="tiles", target=target)
    whole = cost(
        MLP.mlp_xuv,
        *((tokens, 2560), (2560, 3328), (9728, 1664), (1664, 9728), (1664, 9728), (1664, 2560)),
        widths=(1664, 1664),
        target=target,
    )
    for found in (gate_up, down, whole):
        seconds = found.seconds
        assert found.bound == "dma" and seconds["tensor"] <= 0.6 * seconds["dma"]
        weights = [traffic for name, traffic in found.traffic.items() if name[0] in "uv"]
        # Nothing but weights to speak of, each read once: so the modelled time is that of the bytes.
        assert found.hbm_bytes <= 1.05 * sum(traffic.read for traffic in weights)
        assert sum(traffic.below_2048 for traffic in weights) <= 0.05 * sum(traffic.read for traffic in weights)
        check_memory(found)


@pytest.mark.parametrize("target", TARGETS)
def test_float32_and_long_inputs_fit_too(target):
    for shapes_ in (((300, 9728), (9728, 1664), (1664, 2560)), ((4000, 4096), (4096, 2048), (2048, 4096))):
        check_memory(cost(XUV.xuv, *shapes_, target=target, dtype=np.float32))
    check_memory(cost(XUV.xuv, (1, 30000), (30000, 20000), (20000, 64), target=target, dtype=np.float32))
    for tokens in (1, 128, 129, 512, 2048):
        dense = cost(XUV.xuv_group, (tokens, 9728), (9728, 2560), widths=(2560,), target=target)
        assert dense.traffic["x"].read == 2 * tokens * 9728
        check_memory(dense)


@pytest.mark.parametrize("name", ["xuv", "mlp", "tiles", "products", "baselines"])
def test_the_kernels_keep_to_nkis_python(name):
    assert emulator.lint(FOLDER / f"{name}.py") == []
