"""The state of one emulated run: time, what was allocated, and the reads and writes of instructions."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from jaxsvd.kernels.neuron.emulator.cost import Counts
from jaxsvd.kernels.neuron.emulator.dtypes import check_dtype, rounded
from jaxsvd.kernels.neuron.emulator.errors import EmulationError, refuse
from jaxsvd.kernels.neuron.emulator.memory import Lifetime, MemoryRegion, Storage, check_shape
from jaxsvd.kernels.neuron.emulator.targets import PSUM_BANKS, Target
from jaxsvd.kernels.neuron.emulator.tensor import Tensor, whole

_current: ContextVar["Machine | None"] = ContextVar("machine", default=None)


class Machine:
    """One run of a kernel on a target; without `values` it checks and counts only."""

    def __init__(self, target: Target, values: bool) -> None:
        self.target, self.values = target, values
        self.time = 0
        self.counts = Counts(target)
        self.lifetimes: dict[MemoryRegion, list[Lifetime]] = {MemoryRegion.sbuf: [], MemoryRegion.psum: []}
        self.hbm: list[Storage] = []

    def allocate(self, shape: object, dtype: object, buffer: object, name: str) -> Tensor:
        """A new tensor; EmulationError where a rule forbids it."""
        if not isinstance(buffer, MemoryRegion):
            refuse("buffer", "a memory region such as nl.sbuf (not a string)", repr(buffer))
        dtype = check_dtype(dtype)
        sizes = check_shape(shape, buffer, dtype, self.target)
        if buffer in self.lifetimes:
            storage = Storage(name or buffer.value, sizes, dtype, buffer, keep=self.values)
            self.lifetimes[buffer].append(storage.life)
        else:
            storage = Storage(name or f"scratch{len(self.hbm)}", sizes, dtype, buffer, keep=self.values)
            self.hbm.append(storage)
        return whole(storage)

    def begin(self, instruction: str) -> None:
        """Start an instruction."""
        self.time += 1
        kinds = self.counts.instructions
        kinds[instruction] = kinds.get(instruction, 0) + 1

    def read(self, tensor: Tensor) -> np.ndarray | None:
        """The values of a view (None without values); EmulationError where any of them was never written."""
        storage = tensor.storage
        life = storage.life
        if life.first < 0:
            refuse("undefined-read", "elements that were written before", f"{tensor!r}, never written")
        life.last = self.time
        if storage.values is None:
            return None
        if not storage.complete:
            self._check_defined(tensor)
        return tensor.of(storage.values)

    def _check_defined(self, tensor: Tensor) -> None:
        assert tensor.storage.defined is not None
        bits = tensor.of(tensor.storage.defined)
        if not bits.all():
            where = tuple(int(i) for i in np.argwhere(~bits)[0])
            text = f"{bits.size - int(bits.sum())} of {bits.size} of {tensor!r} undefined, the first at {where}"
            refuse("undefined-read", "elements that were written before", text)

    def touch(self, tensor: Tensor) -> None:
        """Note a write; EmulationError where a view repeats elements, or is an input of the kernel."""
        storage = tensor.storage
        if 0 in tensor.strides:
            refuse("broadcast-write", "a destination without broadcast dimensions", tensor)
        if storage.is_input:
            refuse("input-write", "inputs of the kernel to stay as they are (aliasing is not modelled)", tensor)
        life = storage.life
        if life.first < 0:
            life.first = self.time
        life.last = self.time

    def write(self, tensor: Tensor, values: np.ndarray, by_matmul: bool = False) -> None:
        """Store values of as many elements, rounded to the dtype. `touch` comes first."""
        storage = tensor.storage
        assert storage.values is not None and storage.defined is not None
        tensor.of(storage.values)[...] = rounded(values, storage.dtype).reshape(tensor.shape)
        if not storage.complete:
            tensor.of(storage.defined)[...] = True
            storage.complete = tensor.size == storage.size
        if storage.by_matmul is not None:
            tensor.of(storage.by_matmul)[...] = by_matmul

    def peak(self, buffer: MemoryRegion) -> int:
        """The most that lives at once: bytes per partition of SBUF, or banks of PSUM.

        EmulationError where it is more than there is, with what lives there.
        """
        lives = [life for life in self.lifetimes[buffer] if life.first >= 0]
        level, peak, when = 0, 0, -1
        for time, change in sorted(  # what ends with an instruction still lives during it
            [(life.first, life.amount) for life in lives] + [(life.last + 0.5, -life.amount) for life in lives]
        ):
            level += change
            if level > peak:
                peak, when = level, time
        limit = self.target.sbuf_usable if buffer is MemoryRegion.sbuf else PSUM_BANKS
        if peak > limit:
            unit = "bytes per partition" if buffer is MemoryRegion.sbuf else "banks"
            there = [f"{life.name}:{life.amount}" for life in lives if life.first <= when <= life.last]
            listed = ", ".join(there[:12]) + (" …" if len(there) > 12 else "")
            refuse(
                f"{buffer.value}-capacity",
                f"at most {limit} {unit} on {self.target.name}",
                f"{peak} at instruction {when} in {len(there)} tensors: {listed}",
            )
        return peak


def current() -> Machine:
    """The machine of the run in progress; EmulationError outside of one."""
    machine = _current.get()
    if machine is None:
        raise EmulationError("no-run", "call kernels through emulator.run(kernel, *arrays, target=…)")
    return machine


@contextmanager
def running(machine: Machine) -> Iterator[None]:
    """Make it the current machine."""
    token = _current.set(machine)
    try:
        yield
    finally:
        _current.reset(token)
