"""Views and elementwise instructions against NumPy, NaN, and roundings."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsvd.kernels.neuron import emulator

COUNTED = emulator.load(Path(__file__).with_name("counted.py"))


def test_views():
    x = np.arange(128 * 24, dtype=np.float32).reshape(128, 24)
    t = x.reshape(128, 4, 6)
    expected = (
        t[0:64, 1, ::2],
        t[5:6, :, -1],
        t[3:4],
        t[:, 1:3, 0:-3],
        t.transpose(0, 2, 1),
        x,
        t.reshape(128, 4, 2, 3),
        x,
        t[:, None],
        t[:, 1],
        np.repeat(t[:, 1:2], 3, 1),
        t[:, :, 1:5:2],
        t[:, 2],
        t[7].T,
    )
    found = emulator.run(COUNTED.views, x).outputs
    assert len(found) == len(expected)
    for y, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(y, want)


def test_elementwise():
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((128, 64), np.float32), rng.standard_normal((128, 1), np.float32)
    found = emulator.run(COUNTED.elementwise, x, bias).outputs
    z = x * 0.5 + bias
    gelu_exact = 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    expected = [
        jax.nn.silu(z),
        gelu_exact,
        jax.nn.gelu(z, approximate=True),
        jax.nn.sigmoid(z),
        np.exp(z),
        np.tanh(z),
        z,
        bias + x + 1,
        bias - x + 1,
        bias * x + 1,
        np.maximum(x, bias) + 1,
        np.minimum(x, bias) + 1,
        -x.reshape(128, 4, 16).sum(2),
        x.reshape(128, 4, 16).max(2),
    ]
    for y, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_transposes(target):
    x = np.arange(16 * 96).reshape(16, 96).astype(ml_dtypes.bfloat16)
    flat, three, four, small = emulator.run(COUNTED.turned, x, target=target).outputs
    np.testing.assert_array_equal(flat, x.T)
    np.testing.assert_array_equal(three, x.reshape(4, 8, 48).transpose(2, 1, 0))
    np.testing.assert_array_equal(four, x.reshape(2, 4, 4, 48).transpose(3, 1, 2, 0))
    np.testing.assert_array_equal(small, x[:, 32:64].T)


def test_nan_of_an_input_is_a_value():
    x = np.full((128, 256), np.nan, ml_dtypes.bfloat16)
    x[0, 0] = np.inf
    (y,) = emulator.run(COUNTED.runs, x).outputs
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
def test_casts_round_to_nearest_even(dtype, bits):
    ulp = 2.0 ** (1 - bits)
    x = np.array([[1, 1 + ulp / 2, 1 + 3 * ulp / 2, 1e30]], np.float32)
    (y,) = emulator.run(COUNTED.cast, x, dtype).outputs
    assert y.dtype == np.dtype(dtype)
    if dtype == "float32":
        np.testing.assert_array_equal(y, x)
    else:
        assert y[0, :3].tolist() == [1, 1, 1 + 2 * ulp]
        assert np.isinf(float(y[0, 3])) == (dtype == "float16")


def test_jax_arrays_and_shapes():
    x = jnp.ones((128, 256), jnp.bfloat16)
    (y,) = emulator.run(COUNTED.runs, x).outputs
    assert y.dtype == ml_dtypes.bfloat16 and (y == 1).all()
    run = emulator.run(COUNTED.runs, jax.ShapeDtypeStruct((128, 256), jnp.bfloat16), values=False)
    assert run.outputs[0].shape == (128, 256) and run.outputs[0].dtype == ml_dtypes.bfloat16
