"""Cycles, bytes and peaks of kernels that can be counted by hand."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsvd.kernels.neuron import emulator

COUNTED = emulator.load(Path(__file__).with_name("counted.py"))
TARGETS = ("trn1", "trn2", "trn3")
BF16 = "bfloat16"


def cost(kernel, *args, target="trn2", **options):
    return emulator.run(getattr(COUNTED, kernel), *args, target=target, **options).cost


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "moving", "cycles"),
    [(BF16, 512, 512), (BF16, 65, 65), (BF16, 64, 64), (BF16, 1, 64), ("float32", 512, 2048), ("float32", 1, 256)],
)
def test_matmul_cycles(dtype, moving, cycles, target):
    counted = cost("matmul", dtype, 96, 40, moving, target=target)
    assert (counted.matmul_cycles, counted.transpose_cycles) == (cycles, 0)
    assert counted.macs == 96 * 40 * moving
    clock = {"trn1": 2.8e9, "trn2": 2.4e9, "trn3": 2.4e9}[target]
    assert counted.seconds["tensor"] == pytest.approx(cycles / clock)


@pytest.mark.parametrize("dtype", [BF16, "float32"])
def test_array_use_is_of_the_dtypes_own_peak(dtype):
    assert cost("matmul", dtype, 128, 128, 512).array_use == 1.0
    assert cost("matmul", dtype, 64, 128, 512).array_use == 0.5
    assert cost("matmul", dtype, 128, 128, 16).array_use == 0.25


@pytest.mark.parametrize(
    ("dtype", "target", "factor"),
    [(BF16, "trn1", 1), (BF16, "trn3", 1), ("float32", "trn1", 4), ("float32", "trn2", 2), ("float32", "trn3", 2)],
)
def test_transpose_cycles(dtype, target, factor):
    assert cost("transpose", dtype, 128, 70, target=target).transpose_cycles == 128 * factor
    counted = cost("transpose", dtype, 30, 128, target=target)
    assert (counted.transpose_cycles, counted.matmul_cycles, counted.macs) == (64 * factor, 0, 0)


@pytest.mark.parametrize(
    ("options", "cycles"),
    [
        ({"dtype": "float32"}, (512, 512, 512)),
        ({"dtype": BF16}, (512, 512, 512)),  # from float32
        ({"dtype": BF16, "source": BF16}, (512, 128, 128)),
        ({"dtype": BF16, "source": "float16"}, (512, 128, 128)),
        ({"dtype": BF16, "source": BF16, "step": 2}, (512, 256, 256)),
        ({"dtype": BF16, "source": BF16, "from_psum": True}, (512, 256, 256)),
        ({"dtype": BF16, "source": "float32", "from_psum": True}, (512, 512, 512)),
    ],
)
def test_vector_cycles_of_a_copy(options, cycles):
    assert tuple(cost("copy", columns=512, target=target, **options).vector_cycles for target in TARGETS) == cycles


def test_vector_cycles_of_two_inputs():
    assert [cost("add", "float32", 512, "float32", target=target).vector_cycles for target in TARGETS] == [1024] * 3
    assert [cost("add", BF16, 512, BF16, target=target).vector_cycles for target in TARGETS] == [1024, 512, 512]
    assert [cost("add", BF16, 512, "float32", target=target).vector_cycles for target in TARGETS] == [1024] * 3
    assert cost("add", "float32", 8, "float32").vector_cycles == 64
    assert cost("invert", 100).vector_cycles == 800


def test_scalar_cycles():
    counted = cost("matmul", BF16, 128, 128, 512)
    assert (counted.scalar_cycles, counted.vector_cycles) == (512, 0)
    assert counted.seconds["scalar"] == pytest.approx(512 / 1.2e9)
    engine = next(iter(COUNTED.nisa.engine)).__class__.scalar
    times = [cost("copy", BF16, 512, BF16, engine=engine, target=target).scalar_cycles for target in TARGETS[1:]]
    assert times == [512, 256]  # its own fast mode comes with trn3


def test_runs_and_directions():
    x = np.ones((128, 256), ml_dtypes.bfloat16)
    counted = cost("runs", x)
    source, half, out = counted.traffic["x"], counted.traffic["half"], counted.traffic["out0"]
    whole = 2 * 128 * 256
    assert (source.read, source.written) == (2 * 128 * 64 + 2 * whole, 0)
    assert source.runs == {128: 128, whole: 2}
    assert (half.read, half.written) == (4 * 128 * 64, 2 * whole)  # in float32
    assert half.runs == {4: 128 * 64, 2 * whole: 1}
    assert (out.read, out.written, out.runs) == (0, whole, {whole: 1})
    assert (source.below_512, half.below_512, out.below_2048) == (2 * 128 * 64, 4 * 128 * 64, 0)
    assert counted.dmas == 4
    assert counted.below(512) == 2 * 128 * 64 + 4 * 128 * 64


def test_scratch_of_one_name_is_counted_apart():
    counted = cost("through_scratch", np.ones((4, 8), np.float32))
    moved = {name: (traffic.read, traffic.written) for name, traffic in counted.traffic.items()}
    both = (128, 128)
    assert moved == {"x": (128, 0), "half": both, "half'": both, "scratch3": both, "out0": (0, 128)}


def test_dma_takes_the_lower_rate():
    x = np.ones((128, 256), ml_dtypes.bfloat16)
    rates = {"trn1": 272e9, "trn2": 362.5e9, "trn3": 528e9}
    for target, rate in rates.items():
        counted = cost("runs", x, target=target)
        assert counted.seconds["dma"] == pytest.approx(counted.hbm_bytes / rate)


@pytest.mark.parametrize("target", TARGETS)
def test_peaks_by_liveness(target):
    usable = {"trn1": 176, "trn2": 208, "trn3": 240}[target] * 1024 - 528
    together, alone = (cost("sequence", 5, 1000, both, target=target) for both in (True, False))
    assert (together.sbuf_peak, alone.sbuf_peak) == (5 * 2000, 2000)
    assert together.sbuf_margin == usable - 10000
    assert together.psum_banks == 0
    counted = cost("matmul", BF16, 128, 128, 100, target=target)
    assert counted.psum_banks == 1
    assert counted.sbuf_peak == max(2 * 128 + 2 * 100, 4 * 100)


def test_instructions_and_dictionary():
    counted = cost("matmul", BF16, 128, 128, 512)
    assert counted.instructions == {"activation": 1, "dma_copy": 1, "memset": 2, "nc_matmul": 1}
    assert counted.bound == "dma"
    flat = json.loads(json.dumps(counted.as_dict()))
    assert flat["target"] == "trn2" and flat["hbm_bytes"] == 128 * 512 * 4
    assert flat["modelled_bound"] == "dma" and flat["modelled_array_use"] == 1.0
