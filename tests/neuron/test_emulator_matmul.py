"""Matmuls, those of the public tutorial among them, give NumPy's values and the traffic of a closed form."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsvd.kernels.neuron import emulator

TUTORIAL = emulator.load(Path(__file__).with_name("tutorial.py"))
TARGETS = ("trn1", "trn2", "trn3")
DTYPES = (np.float32, ml_dtypes.bfloat16)
SIZES = {  # K, M, N
    "basic": (128, 64, 512),
    "tiled": (256, 128, 1024),
    "hoisted": (256, 256, 1024),
    "blocked": (256, 256, 1024),
    "optimised": (512, 512, 1024),
    "ragged": (300, 200, 600),
}


def operands(k, m, n, dtype):
    rng = np.random.default_rng(0)
    return rng.standard_normal((k, m)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)


def product(a, b):
    return a.astype(np.float64).T @ b.astype(np.float64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", SIZES)
def test_values(kernel, dtype, target):
    a, b = operands(*SIZES[kernel], dtype)
    (y,) = emulator.run(getattr(TUTORIAL, kernel), a, b, target=target).outputs
    exact = product(a, b)
    assert y.dtype == np.dtype(dtype)
    steps = 4 if kernel == "optimised" else 1  # it rounds partial sums
    bound = (2.0**-8 if dtype is ml_dtypes.bfloat16 else 1e-6) * steps
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=bound, atol=bound * np.abs(exact).max())


def test_bfloat16_sums_are_rounded_once():
    rng = np.random.default_rng(0)  # float32 adds these exactly
    a, b = (rng.integers(-8, 8, size).astype(ml_dtypes.bfloat16) for size in ((512, 128), (512, 512)))
    (y,) = emulator.run(TUTORIAL.tiled, a, b).outputs
    np.testing.assert_array_equal(y, product(a, b).astype(np.float32).astype(y.dtype))


@pytest.mark.parametrize(("kernel", "target"), [(kernel, target) for kernel in SIZES for target in TARGETS])
def test_the_cost_is_the_same_without_values(kernel, target):
    arrays = operands(*SIZES[kernel], ml_dtypes.bfloat16)
    function = getattr(TUTORIAL, kernel)
    computed = emulator.run(function, *arrays, target=target)
    counted = emulator.run(function, *arrays, target=target, values=False)
    assert computed.cost == counted.cost
    assert [(y.shape, y.dtype) for y in computed.outputs] == [(y.shape, y.dtype) for y in counted.outputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (300, 200, 600), (128, 129, 513), (257, 3, 1025)])
def test_traffic_of_ragged_sizes_is_the_closed_form(size, dtype):
    k, m, n = size
    cost = emulator.run(TUTORIAL.ragged, *operands(k, m, n, dtype), target="trn2").cost
    width, across, down = np.dtype(dtype).itemsize, -(-n // 512), -(-m // 128)
    read = {name: (traffic.read, traffic.written) for name, traffic in cost.traffic.items()}
    assert read == {
        "x": (width * k * m * across, 0),
        "w": (width * k * n * down, 0),
        "out0": (0, width * m * n),
    }
    assert cost.hbm_bytes == width * (k * m * across + k * n * down + m * n)
    for name, traffic in cost.traffic.items():
        assert sum(run * count for run, count in traffic.runs.items()) == sum(read[name])
    assert cost.macs == k * m * n


def test_stale_sums_show_in_values():
    """With accumulate=None, a tile of PSUM that is used again keeps what it holds: legal, and wrong."""
    a, b = operands(128, 128, 512, np.float32)
    (y,) = emulator.run(TUTORIAL.twice, a, b).outputs
    np.testing.assert_allclose(y, 2 * product(a, b), rtol=1e-4, atol=1e-4)
