"""The official simulator as a second oracle, where the real nki is installed (AWS's own index has it)."""

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsvd.kernels.neuron import emulator

TUTORIAL = Path(__file__).with_name("tutorial.py")
SIZES = {"basic": (128, 64, 512), "tiled": (256, 128, 1024), "optimised": (512, 512, 1024), "ragged": (300, 200, 600)}


@pytest.fixture(scope="module")
def nki():
    """The real nki."""
    module = pytest.importorskip("nki", reason="the official nki.simulate needs AWS's nki package")
    if not hasattr(module, "simulate"):
        pytest.skip("the installed nki is the public index's placeholder, without nki.simulate")
    return module


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("kernel", SIZES)
def test_both_give_the_same_values(kernel, target, nki, monkeypatch):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
    spec = importlib.util.spec_from_file_location("tutorial_on_the_real_nki", TUTORIAL)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    k, m, n = SIZES[kernel]
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(size).astype(ml_dtypes.bfloat16) for size in ((k, m), (k, n)))
    (mine,) = emulator.run(getattr(emulator.load(TUTORIAL), kernel), a, b, target=target).outputs
    theirs = nki.simulate(getattr(official, kernel))(a, b)
    np.testing.assert_allclose(mine.astype(np.float32), np.asarray(theirs, np.float32), rtol=2.0**-7, atol=1e-2)
