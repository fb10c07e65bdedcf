"""Elementwise instructions of the Vector Engine, some of which the Scalar and GpSimd engines run as well."""

from typing import Any

import numpy as np

from jaxsvd.kernels.neuron.emulator.errors import refuse
from jaxsvd.kernels.neuron.emulator.machine import Machine
from jaxsvd.kernels.neuron.emulator.memory import MemoryRegion
from jaxsvd.kernels.neuron.emulator.operands import Engine, begin, number, on_engine, pick, same_layout
from jaxsvd.kernels.neuron.emulator.ops import Op
from jaxsvd.kernels.neuron.emulator.tensor import Tensor

Value = float | int | Tensor
RECIPROCAL_CYCLES = 8  # per element on VectorE (nki.api.shared.rst, engine selection)


def tensor_copy(
    dst: Tensor, src: Tensor, engine: Engine = Engine.unknown, name: str | None = None, **unknown: Any
) -> None:
    """dst = src within SBUF and PSUM, cast to dst's dtype."""
    machine = begin("tensor_copy", unknown)
    scalar = () if machine.target.generation < 3 else (Engine.scalar,)  # on gen2 it has activation(op=nl.copy) only
    chosen = pick(engine, (Engine.vector, Engine.gpsimd, *scalar), "tensor_copy")
    on_engine(dst, "dst")
    on_engine(src, "src")
    same_layout(dst, src, "tensor_copy")
    occupy(machine, chosen, "copy", (dst, src))
    values = machine.read(src)
    machine.touch(dst)
    if values is not None:
        machine.write(dst, values)


def memset(dst: Tensor, value: Any, engine: Engine = Engine.unknown, name: str | None = None, **unknown: Any) -> None:
    """dst = a compile-time number."""
    machine = begin("memset", unknown)
    chosen = pick(engine, (Engine.vector, Engine.gpsimd), "memset")
    on_engine(dst, "dst")
    if not number(value):
        refuse("memset-value", "a compile-time number", repr(value))
    occupy(machine, chosen, "fill", (dst,))
    machine.touch(dst)
    if machine.values:
        machine.write(dst, np.full(dst.shape, value, np.float32))


def tensor_tensor(
    dst: Tensor,
    data1: Tensor,
    data2: Tensor,
    op: Op,
    engine: Engine = Engine.unknown,
    name: str | None = None,
    **unknown: Any,
) -> None:
    """dst = data1 op data2, in float32."""
    machine = begin("tensor_tensor", unknown)
    chosen = pick(engine, (Engine.vector, Engine.gpsimd), "tensor_tensor")
    on_engine(dst, "dst")
    on_engine(data1, "data1")
    on_engine(data2, "data2")
    same_layout(data1, data2, "tensor_tensor")
    same_layout(dst, data1, "tensor_tensor")
    if data1.buffer is MemoryRegion.psum and data2.buffer is MemoryRegion.psum:
        refuse("tensor-tensor-psum", "at most one input in psum", f"{data1!r} and {data2!r}")
    function = binary(op, "tensor_tensor")
    occupy(machine, chosen, "binary", (dst, data1, data2))
    left, right = machine.read(data1), machine.read(data2)
    machine.touch(dst)
    if left is not None and right is not None:
        machine.write(dst, function(left.reshape(dst.shape), right.reshape(dst.shape)))


def tensor_scalar(
    dst: Tensor,
    data: Tensor,
    op0: Op,
    operand0: Value,
    reverse0: bool = False,
    op1: Op | None = None,
    operand1: Value | None = None,
    reverse1: bool = False,
    engine: Engine = Engine.unknown,
    name: str | None = None,
    **unknown: Any,
) -> None:
    """dst = (data op0 operand0) op1 operand1; operands are numbers or float32 (P, 1) tensors."""
    machine = begin("tensor_scalar", unknown)
    on_engine(dst, "dst")
    on_engine(data, "data")
    same_layout(dst, data, "tensor_scalar")
    if (op1 is None) != (operand1 is None):
        refuse("tensor_scalar-operand", "both of op1 and operand1, or none", f"{op1!r} and {operand1!r}")
    first, second = binary(op0, "tensor_scalar"), None if op1 is None else binary(op1, "tensor_scalar")
    ops = (op0.name, op1.name if op1 else None)
    on_scalar = machine.target.generation >= 3 and ops in (("multiply", "add"), ("multiply", None), ("add", None))
    chosen = pick(engine, (Engine.vector, Engine.scalar) if on_scalar else (Engine.vector,), "tensor_scalar")
    occupy(machine, chosen, "copy", (dst, data))
    values = machine.read(data)
    right0 = column(machine, data, operand0, "operand0")
    right1 = None if operand1 is None else column(machine, data, operand1, "operand1")
    machine.touch(dst)
    if values is not None:
        values = values.reshape(data.shape[0], -1)
        values = first(right0, values) if reverse0 else first(values, right0)
        if second is not None:
            values = second(right1, values) if reverse1 else second(values, right1)
        machine.write(dst, values)


def tensor_reduce(
    dst: Tensor,
    op: Op,
    data: Tensor,
    axis: int | tuple[int, ...],
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
    **unknown: Any,
) -> None:
    """dst = data reduced over its last free dimensions, in float32."""
    machine = begin("tensor_reduce", unknown)
    on_engine(dst, "dst")
    on_engine(data, "data")
    axes = tuple(sorted({number % data.ndim for number in ((axis,) if type(axis) is int else tuple(axis))}))  # type: ignore[arg-type]
    if 0 in axes or not axes or axes != tuple(range(data.ndim - len(axes), data.ndim)):
        refuse("reduce-axis", f"the last free dimensions of {data!r}", axis)
    if not isinstance(op, Op) or op.reduce is None:
        refuse("op", "a reduction that is modelled", repr(op))
    kept = 1
    for length in data.shape[1 : axes[0]]:
        kept *= length
    if dst.shape[0] != data.shape[0] or dst.per_row() != kept:
        refuse("reduce-shape", f"{data.shape[0]} partitions of {kept} elements", dst)
    occupy(machine, Engine.vector, "reduce", (data,))
    values = machine.read(data)
    machine.touch(dst)
    if values is not None:
        result = op.reduce(values, axis=axes)
        machine.write(dst, -result if negate else result)


def reciprocal(dst: Tensor, data: Tensor, name: str | None = None, **unknown: Any) -> None:
    """dst = 1 / data."""
    machine = begin("reciprocal", unknown)
    on_engine(dst, "dst")
    on_engine(data, "data")
    same_layout(dst, data, "reciprocal")
    machine.counts.engine("vector", RECIPROCAL_CYCLES * data.per_row())
    values = machine.read(data)
    machine.touch(dst)
    if values is not None:
        machine.write(dst, 1 / values)


def binary(op: object, instruction: str) -> Any:
    """The function of a binary operator; EmulationError for anything else."""
    if not isinstance(op, Op) or op.binary is None:
        refuse("op", f"a binary operator that is modelled, for {instruction}", repr(op))
    return op.binary


def column(machine: Machine, data: Tensor, value: Any, role: str, dtypes: tuple[str, ...] = ("float32",)) -> Any:
    """A number, or the values of a (P, 1) tensor (None without values), to go with data of P partitions."""
    if type(value) is not Tensor:
        if not number(value):
            refuse("operand-type", f"a number or a tensor as {role}", repr(value))
        return np.float32(value)
    on_engine(value, role)
    if value.shape != (data.shape[0], 1):
        refuse("operand-shape", f"{role} of shape {(data.shape[0], 1)}", value)
    if value.dtype not in dtypes:
        refuse("operand-dtype", f"{role} in {' or '.join(dtypes)}", value)
    return machine.read(value)


def occupy(machine: Machine, engine: Engine, kind: str, tensors: tuple[Tensor, ...]) -> None:
    """Take the engine's time: a cycle per element of every input, or less in the modes of `kind` (`Counts.speed`)."""
    if engine is Engine.gpsimd and any(tensor.storage.buffer is MemoryRegion.psum for tensor in tensors):
        refuse("gpsimd-psum", "no operand in psum: GpSimd can't reach it", ", ".join(map(repr, tensors)))
    elements = tensors[-1].per_row() * max(1, len(tensors) - 1)
    machine.counts.engine(engine.name, elements / machine.counts.speed(engine.name, kind, tensors))
