"""Instructions of the DMA engines."""

from math import gcd
from typing import Any

import numpy as np

from jaxsvd.kernels.neuron.emulator.errors import not_modelled, refuse
from jaxsvd.kernels.neuron.emulator.machine import Machine
from jaxsvd.kernels.neuron.emulator.memory import MemoryRegion
from jaxsvd.kernels.neuron.emulator.operands import DgeMode, Engine, OobMode, begin, check_enum
from jaxsvd.kernels.neuron.emulator.tensor import Tensor

TRANSPOSES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def dma_copy(
    dst: Tensor,
    src: Tensor,
    priority: int | None = None,
    oob_mode: OobMode = OobMode.error,
    dge_mode: DgeMode = DgeMode.unknown,
    engine: Engine = Engine.unknown,
    name: str | None = None,
    **unknown: Any,
) -> None:
    """dst = src, between HBM and SBUF or within one of them; both are walked in row-major order."""
    machine = begin("dma_copy", unknown)
    _check_dma(machine, dst, src, priority, oob_mode, dge_mode)
    check_enum(Engine, engine, "engine")
    if engine is not Engine.unknown:
        if dge_mode is not DgeMode.hwdge:
            refuse("dma-engine", "an engine only with dge_mode=hwdge", engine.name)
        if engine not in (Engine.sync, Engine.scalar):
            refuse("dma-engine", "engine sync or scalar", engine.name)
    if dst.size != src.size:
        refuse("dma-size", "as many elements in dst as in src", f"{dst!r} = {src!r}")
    if dge_mode is DgeMode.hwdge:
        if dst.dtype != src.dtype:
            refuse("dma-hwdge", "equal dtypes with dge_mode=hwdge", f"{src.dtype} to {dst.dtype}")
        _check_hwdge(machine)
    _move(machine, dst, src, gcd(src.run(), dst.run()))
    values = machine.read(src)
    machine.touch(dst)
    if values is not None:
        machine.write(dst, values)


def dma_transpose(
    dst: Tensor,
    src: Tensor,
    axes: tuple[int, ...] | None = None,
    priority: int | None = None,
    dge_mode: DgeMode = DgeMode.unknown,
    oob_mode: OobMode = OobMode.error,
    name: str | None = None,
    **unknown: Any,
) -> None:
    """dst, in SBUF, = src with its first and last axes swapped."""
    machine = begin("dma_transpose", unknown)
    _check_dma(machine, dst, src, priority, oob_mode, dge_mode)
    if dge_mode not in (DgeMode.unknown, DgeMode.hwdge):
        refuse("dma-transpose-mode", "dge_mode unknown or hwdge", dge_mode.name)
    order = TRANSPOSES.get(src.ndim)
    if order is None or (axes is not None and tuple(axes) != order):
        refuse("dma-transpose-axes", f"axes among {', '.join(map(str, TRANSPOSES.values()))}", f"{axes} of {src!r}")
    if dst.buffer is not MemoryRegion.sbuf:
        refuse("dma-transpose-buffer", "dst in sbuf", dst)
    if dst.dtype != src.dtype:
        refuse("dma-transpose-dtype", f"dst of src's {src.dtype}", dst.dtype)
    shape = tuple(src.shape[axis] for axis in order)
    if dst.shape != shape:
        refuse("dma-transpose-shape", f"dst of shape {shape}", dst)
    if dge_mode is DgeMode.hwdge:
        _check_hwdge_transpose(src)
        _check_hwdge(machine)
    # Before gen3 the engines move element by element; later they turn whole rows over as they pass.
    _move(machine, dst, src, 1 if machine.target.generation < 3 else gcd(src.run(), src.shape[-1]))
    values = machine.read(src)
    machine.touch(dst)
    if values is not None:
        machine.write(dst, np.ascontiguousarray(values.transpose(order)))


def _check_hwdge(machine: Machine) -> None:
    if machine.target.generation < 3:
        refuse("dma-hwdge", "gen3 or later for dge_mode=hwdge", machine.target.name)


def _check_hwdge_transpose(src: Tensor) -> None:
    first, last = src.shape[0], src.shape[-1]
    if src.storage.itemsize != 2:
        refuse("dma-transpose-hwdge", "a dtype of 2 bytes", src)
    if last > 128:
        refuse("dma-transpose-hwdge", "at most 128 elements in the last dimension", src)
    if src.ndim == 2 and first != 16:
        refuse("dma-transpose-hwdge", "16 rows of a matrix", src)
    if src.ndim > 2 and (first not in (1, 2, 4, 8, 16) or first * src.shape[-2] % 16):
        refuse("dma-transpose-hwdge", "1, 2, 4, 8 or 16 rows, and rows·shape[-2] a multiple of 16", src)


def _check_dma(
    machine: Machine, dst: Tensor, src: Tensor, priority: object, oob_mode: object, dge_mode: object
) -> None:
    for role, tensor in (("dst", dst), ("src", src)):
        if type(tensor) is not Tensor:
            refuse("operand-type", f"a tensor as {role}", repr(tensor))
        if tensor.storage.buffer is MemoryRegion.psum:
            refuse("dma-psum", f"{role} in HBM or sbuf: DMA does not reach PSUM", tensor)
    check_enum(OobMode, oob_mode, "oob_mode")
    check_enum(DgeMode, dge_mode, "dge_mode")
    if oob_mode is not OobMode.error:
        not_modelled("oob_mode other than error")
    if priority is not None and (machine.target.generation < 4 or priority not in (0, 1, 2, 3)):
        refuse("dma-priority", "0 to 3, on gen4 only", f"{priority!r} on {machine.target.name}")


def _move(machine: Machine, dst: Tensor, src: Tensor, run: int) -> None:
    """Count the bytes and descriptors of `run` elements on the HBM side."""
    machine.counts.dmas += 1
    size = src.size
    for tensor, reads in ((src, True), (dst, False)):
        traffic = tensor.storage.traffic
        if traffic is not None:
            width = run * tensor.storage.itemsize
            traffic.runs[width] = traffic.runs.get(width, 0) + size // run
            if reads:
                traffic.read += size * tensor.storage.itemsize
            else:
                traffic.written += size * tensor.storage.itemsize
