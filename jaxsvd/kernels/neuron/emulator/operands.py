"""Rules that several instructions share: enums, keywords, operands and where they start."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from jaxsvd.kernels.neuron.emulator.errors import not_modelled, refuse
from jaxsvd.kernels.neuron.emulator.machine import Machine, current
from jaxsvd.kernels.neuron.emulator.memory import ON_CHIP, MemoryRegion
from jaxsvd.kernels.neuron.emulator.tensor import Tensor

SBUF = (MemoryRegion.sbuf,)
PSUM = (MemoryRegion.psum,)


class Engine(Enum):
    """`nisa.engine`."""

    unknown = 0
    tensor = 1
    scalar = 2
    gpsimd = 3
    dma = 4
    vector = 5
    sync = 6


class DgeMode(Enum):
    """`nisa.dge_mode`: who writes the DMA descriptors."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class OobMode(Enum):
    """`nisa.oob_mode`."""

    error = 0
    skip = 1


class NcVersion(Enum):
    """`nisa.nc_version`."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class MatmulPerfMode(Enum):
    """`nisa.matmul_perf_mode`."""

    none = "none"
    double_row = "double_row"


class ReduceCmd(Enum):
    """`nisa.reduce_cmd`."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3


def begin(instruction: str, unknown: Mapping[str, Any]) -> Machine:
    """Begin an instruction on the machine of the run; EmulationError for keywords that it hasn't got."""
    if "mask" in unknown:
        refuse("keyword-mask", "a partial tile: NKI has no masks", f"mask= of {instruction}")
    if unknown:
        not_modelled(f"these keywords of {instruction}: {', '.join(unknown)}")
    machine = current()
    machine.begin(instruction)
    return machine


def check_enum(kind: type[Enum], value: object, role: str) -> None:
    """EmulationError for anything but a member of `kind`."""
    if not isinstance(value, kind):
        refuse("enum", f"a member of nisa's enum for {role}", repr(value))


def pick(given: object, allowed: tuple[Engine, ...], instruction: str) -> Engine:
    """The engine of an instruction; EmulationError for one that can't run it. Unknown: the first that can."""
    if not isinstance(given, Engine):
        refuse("enum", "a member of nisa's enum for engine", repr(given))
    if given is Engine.unknown:
        return allowed[0]
    if given not in allowed:
        names = ", ".join(engine.name for engine in allowed)
        refuse(f"{instruction}-engine", f"one of the engines {names}", given.name)
    return given


def on_engine(tensor: object, role: str, buffers: tuple[MemoryRegion, ...] = ON_CHIP) -> Tensor:
    """An operand of an engine: it lives in one of `buffers` and starts at a partition that engines can start at."""
    if type(tensor) is not Tensor:
        refuse("operand-type", f"a tensor as {role}", repr(tensor))
    storage = tensor.storage
    if storage.buffer not in buffers:
        refuse("operand-buffer", f"{role} in {' or '.join(region.value for region in buffers)}", tensor)
    if tensor.offset >= storage.row:
        start, count = tensor.partition(), tensor.shape[0]
        step = 32 if count <= 32 else 64 if count <= 64 else 128
        if start % step:
            refuse("start-partition", f"{role} of {count} partitions to start at a multiple of {step}", start)
    return tensor


def same_layout(a: Tensor, b: Tensor, instruction: str) -> None:
    """EmulationError unless both have as many partitions, and as many elements in each."""
    if a.shape != b.shape and (a.shape[0] != b.shape[0] or a.per_row() != b.per_row()):
        refuse(f"{instruction}-shape", "equal partitions and equal elements per partition", f"{a!r} and {b!r}")


def number(value: object) -> bool:
    """Whether it is a compile-time number."""
    return type(value) in (int, float)
