"""The official simulator as a second oracle, where the real nki is installed (AWS's own index has it)."""

import importlib
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


# Kernel: its file, the shapes of its arrays, its options.
KERNELS = {
    "xuv": ("xuv", [(140, 200), (200, 70), (70, 300)], {}),
    "xuv_group": ("xuv", [(3, 200), (200, 100), (70, 300)], {"widths": (70, 30)}),
    "swiglu_xuv": ("mlp", [(140, 200), (200, 100), (70, 130), (30, 130)], {"widths": (70, 30)}),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_give_the_same_values_of_our_kernels(kernel, nki, monkeypatch):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    file, shapes, options = KERNELS[kernel]
    rng = np.random.default_rng(0)
    arrays = [(0.1 * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16) for shape in shapes]
    mine = emulator.run(getattr(emulator.load(file), kernel), *arrays, target="trn2", **options).outputs
    official = importlib.import_module(f"jaxsvd.kernels.neuron.{file}")
    theirs = nki.simulate(getattr(official, kernel))(*arrays, **options)
    for a, b in zip(mine, theirs if isinstance(theirs, tuple) else (theirs,), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), np.asarray(b, np.float32), rtol=2.0**-7, atol=1e-2)


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
