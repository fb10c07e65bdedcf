"""What a kernel costs: counts that the instructions make, and the lower bounds that follow from them.

Every time is a modelled lower bound: each engine alone, working without a gap at its documented rate, all of them
overlapped. Scheduling, queues, DMA efficiency, spills and launches are not in it, nor is DMA within
SBUF. Where a kernel leaves the engine to the compiler, VectorE gets what it can run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxsvd.kernels.neuron.emulator.memory import MemoryRegion, Traffic
from jaxsvd.kernels.neuron.emulator.targets import Target
from jaxsvd.kernels.neuron.emulator.tensor import Tensor

MIN_CYCLES = 64  # the least initiation interval of an instruction, on every engine
PE_CELLS = 128 * 128
SHORT_RUN, GOOD_RUN = 512, 2048  # bytes; DMA below the first wastes most of its time, from the second on little


class Counts:
    """What adds up during a run."""

    __slots__ = (
        "array_cycles",
        "cycles",
        "dmas",
        "instructions",
        "macs",
        "matmul_cycles",
        "target",
        "transpose_cycles",
    )

    def __init__(self, target: Target) -> None:
        self.target = target
        self.instructions: dict[str, int] = {}
        self.macs = self.matmul_cycles = self.transpose_cycles = self.array_cycles = self.dmas = 0
        self.cycles = {"vector": 0.0, "scalar": 0.0, "gpsimd": 0.0}

    def matmul(self, rows: int, columns: int, moving: int, dtype: str) -> None:
        """`rows`×`columns` weights against `moving` columns: max(64, moving) cycles, four times that in float32."""
        cycles = moving if moving > MIN_CYCLES else MIN_CYCLES
        self.macs += rows * columns * moving
        self.array_cycles += cycles
        self.matmul_cycles += cycles * 4 if dtype == "float32" else cycles

    def transpose(self, moving: int, dtype: str) -> None:
        """A transpose on the Tensor Engine moves an identity of `moving` columns; float32 ×4, ×2 from gen3 on."""
        cycles = max(moving, MIN_CYCLES)
        self.array_cycles += cycles
        factor = 1 if dtype != "float32" else 4 if self.target.generation == 2 else 2
        self.transpose_cycles += cycles * factor

    def engine(self, name: str, cycles: float) -> None:
        """Occupy the Vector, Scalar or GpSimd engine."""
        self.cycles[name] += max(cycles, MIN_CYCLES)

    def speed(self, engine: str, kind: str, tensors: Sequence[Tensor]) -> int:
        """Elements per lane and cycle of an elementwise instruction, in the documented performance modes.

        All need tensors (dst first) of 16 bits. VectorE from gen3 on: "copy" (tensor_copy, tensor_scalar) ×4 within
        SBUF with contiguous innermost dimensions, ×2 strided, or contiguous with one side in PSUM; "binary" ×2 with
        both inputs in SBUF. ScalarE from gen4 on: "copy" ×2 under the same conditions.
        """
        generation = self.target.generation
        if generation < 3 or any(tensor.storage.itemsize != 2 for tensor in tensors):
            return 1
        in_psum = [tensor.storage.buffer is MemoryRegion.psum for tensor in tensors]
        if kind == "binary":
            return 2 if engine == "vector" and not any(in_psum[1:]) else 1
        if kind != "copy" or engine == "gpsimd" or (engine == "scalar" and generation < 4):
            return 1
        dense = all(tensor.strides[-1] == 1 for tensor in tensors)
        if not any(in_psum):
            return 4 if dense and engine == "vector" else 2
        return 2 if dense and not all(in_psum) else 1


@dataclass(frozen=True)
class TensorTraffic:
    """Bytes that DMA read from and wrote to one HBM tensor; descriptors by run length in bytes."""

    read: int
    written: int
    runs: dict[int, int]
    below_512: int
    below_2048: int


@dataclass(frozen=True)
class Cost:
    """Counts of one run, and modelled lower bounds (see the module's docstring).

    `traffic` is by tensor: the kernel's arguments, "out0" …, scratch by its name. Cycles are per engine; those of
    `transpose_cycles` are not in `matmul_cycles`. `array_cycles` are both at the bfloat16 rate, so that `array_use` of
    float32 is relative to float32's own peak. `sbuf_peak` is in bytes per partition, by liveness.
    """

    target: Target
    instructions: dict[str, int]
    traffic: dict[str, TensorTraffic]
    dmas: int
    macs: int
    matmul_cycles: int
    transpose_cycles: int
    array_cycles: int
    vector_cycles: float
    scalar_cycles: float
    gpsimd_cycles: float
    sbuf_peak: int
    psum_banks: int

    @property
    def read_bytes(self) -> int:
        """Bytes read from HBM."""
        return sum(traffic.read for traffic in self.traffic.values())

    @property
    def written_bytes(self) -> int:
        """Bytes written to HBM."""
        return sum(traffic.written for traffic in self.traffic.values())

    @property
    def hbm_bytes(self) -> int:
        """Bytes read from and written to HBM."""
        return self.read_bytes + self.written_bytes

    @property
    def pe_cycles(self) -> int:
        """Cycles of the Tensor Engine."""
        return self.matmul_cycles + self.transpose_cycles

    @property
    def sbuf_margin(self) -> int:
        """Bytes per partition of SBUF that are free at the peak, of those assumed usable."""
        return self.target.sbuf_usable - self.sbuf_peak

    @property
    def seconds(self) -> dict[str, float]:
        """Modelled lower bound of each engine's time. DMA: the lower of HBM share and DMA table, efficiency 1."""
        target = self.target
        return {
            "tensor": self.pe_cycles / target.tensor_clock,
            "vector": self.vector_cycles / target.vector_clock,
            "scalar": self.scalar_cycles / target.scalar_clock,
            "gpsimd": self.gpsimd_cycles / target.gpsimd_clock,
            "dma": self.hbm_bytes / min(target.hbm_share, target.dma_rate),
        }

    @property
    def bound(self) -> str:
        """The engine that binds, by `seconds`."""
        seconds = self.seconds
        return max(seconds, key=lambda engine: seconds[engine])

    @property
    def array_use(self) -> float:
        """Useful multiply-adds over what the array could do in its cycles, transposes included; 0 without matmuls."""
        return self.macs / (PE_CELLS * self.array_cycles) if self.array_cycles else 0.0

    def below(self, limit: int) -> int:
        """HBM bytes that moved in runs shorter than `limit` bytes."""
        runs = [traffic.runs for traffic in self.traffic.values()]
        return sum(run * count for histogram in runs for run, count in histogram.items() if run < limit)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; the keys of what is derived say that it is modelled."""
        counts = asdict(self) | {"target": self.target.name}
        return counts | {
            "hbm_bytes": self.hbm_bytes,
            "bytes_in_runs_below_512": self.below(SHORT_RUN),
            "bytes_in_runs_below_2048": self.below(GOOD_RUN),
            "sbuf_margin": self.sbuf_margin,
            "modelled_lower_bound_seconds": self.seconds,
            "modelled_bound": self.bound,
            "modelled_array_use": self.array_use,
        }


def summarise(traffic: Traffic) -> TensorTraffic:
    """The traffic of a tensor once the run is over."""
    runs = dict(sorted(traffic.runs.items()))
    return TensorTraffic(traffic.read, traffic.written, runs, traffic.below(SHORT_RUN), traffic.below(GOOD_RUN))
