"""`nki.jit`, and running what it decorates on the emulated machine."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from jaxsvd.kernels.neuron.emulator.cost import Cost, summarise
from jaxsvd.kernels.neuron.emulator.dtypes import NUMPY
from jaxsvd.kernels.neuron.emulator.errors import EmulationError, not_modelled, refuse
from jaxsvd.kernels.neuron.emulator.machine import Machine, running
from jaxsvd.kernels.neuron.emulator.memory import MemoryRegion
from jaxsvd.kernels.neuron.emulator.ops import Op
from jaxsvd.kernels.neuron.emulator.targets import get_target
from jaxsvd.kernels.neuron.emulator.tensor import Tensor


class Kernel:
    """A function under `@nki.jit`: `emulator.run` calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __getitem__(self, lnc: object) -> "Kernel":
        if lnc != 1:
            not_modelled(f"kernel[{lnc!r}]: logical cores other than kernel[1]")
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: outside of a run there is no machine, and within one kernels don't call kernels."""
        raise EmulationError(
            "kernel-call",
            f"expected emulator.run({self.__name__}, *arrays, target=…), or in a kernel a plain function, found a call",
        )


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Kernel:
    """`nki.jit`; its options of older versions are refused."""
    if options:
        not_modelled(f"these options of nki.jit: {', '.join(options)}")
    if not inspect.isfunction(function):
        refuse("kernel", "@nki.jit on a function", repr(function))
    return Kernel(function)


class ShapeDtype(NamedTuple):
    """An output of a run without values."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Run:
    """What a kernel returned, always as a tuple (arrays; of ShapeDtype without values), and what it cost."""

    outputs: tuple[Any, ...]
    cost: Cost


def run(kernel: Kernel, *arrays: Any, target: str = "trn2", values: bool = True, **options: Any) -> Run:
    """Run a kernel on the emulated NeuronCore.

    Args:
        kernel: a function under `@nki.jit`, from `emulator.load`.
        arrays: its arguments: NumPy arrays in float32, bfloat16 or float16 (without values anything with shape and
            dtype), None, numbers, strings, and tuples of those.
        target: "trn1", "trn2" or "trn3".
        values: compute. Without, everything that does not depend on elements is checked and counted, fast.
        options: arguments of the kernel by keyword.

    Raises EmulationError, with the name of the rule, where the kernel breaks one.
    """
    if not isinstance(kernel, Kernel):
        refuse("kernel", "a function under the emulated @nki.jit (emulator.load)", repr(kernel))
    machine = Machine(get_target(target), values)
    bound = inspect.signature(kernel.function).bind(*arrays, **options)
    bound.apply_defaults()
    arguments = {name: _argument(machine, name, value) for name, value in bound.arguments.items()}
    with running(machine), np.errstate(all="ignore"):  # as on hardware, infinities and NaN raise nothing
        returned = kernel.function(**arguments)
    tensors = returned if type(returned) is tuple else (returned,)
    outputs = tuple(_output(machine, i, tensor) for i, tensor in enumerate(tensors))
    return Run(outputs, _cost(machine))


def _argument(machine: Machine, name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | Enum | Op):
        return value
    if type(value) is tuple:
        return tuple(_argument(machine, f"{name}{i}", item) for i, item in enumerate(value))
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        refuse("kernel-argument", f"an array, None, number, string or tuple as {name}", f"a {type(value).__name__}")
    dtype = np.dtype(value.dtype).name
    if dtype not in NUMPY:
        not_modelled(f"the dtype {dtype} of the argument {name}")
    tensor = machine.allocate(tuple(map(int, value.shape)), dtype, MemoryRegion.shared_hbm, name)
    tensor.storage.is_input = True
    tensor.storage.life.first = 0
    if machine.values:
        tensor.storage.fill(np.asarray(value))
    return tensor


def _output(machine: Machine, index: int, tensor: Any) -> Any:
    if type(tensor) is not Tensor:
        refuse("output", "a tensor, or a tuple of them, as the kernel's result", repr(tensor))
    storage = tensor.storage
    if storage.buffer is not MemoryRegion.shared_hbm or storage.is_input:
        refuse("output-buffer", "outputs allocated in nl.shared_hbm", tensor)
    if tensor.size != storage.size or not tensor.is_contiguous():
        refuse("output-view", "the whole tensor as an output", tensor)
    storage.name = f"out{index}"
    if storage.life.first < 0:
        refuse("output-undefined", "outputs written in full", f"{tensor!r}, never written")
    if storage.values is None:
        return ShapeDtype(tensor.shape, NUMPY[tensor.dtype])
    if not storage.complete and storage.defined is not None and not storage.defined.all():
        where = np.unravel_index(int(np.argmin(storage.defined)), storage.shape)
        refuse("output-undefined", "outputs written in full", f"{tensor!r}, not at {tuple(map(int, where))}")
    return tensor.of(storage.values).astype(NUMPY[tensor.dtype])


def _cost(machine: Machine) -> Cost:
    counts, traffic = machine.counts, {}
    for storage in machine.hbm:
        assert storage.traffic is not None
        name = storage.name
        while name in traffic:  # two scratch tensors can have one name
            name += "'"
        traffic[name] = summarise(storage.traffic)
    return Cost(
        target=machine.target,
        instructions=dict(sorted(counts.instructions.items())),
        traffic=traffic,
        dmas=counts.dmas,
        macs=counts.macs,
        matmul_cycles=counts.matmul_cycles,
        transpose_cycles=counts.transpose_cycles,
        array_cycles=counts.array_cycles,
        vector_cycles=counts.cycles["vector"],
        scalar_cycles=counts.cycles["scalar"],
        gpsimd_cycles=counts.cycles["gpsimd"],
        sbuf_peak=machine.peak(MemoryRegion.sbuf),
        psum_banks=machine.peak(MemoryRegion.psum),
    )
