"""Instructions of the Scalar Engine."""

from typing import Any

import numpy as np

from jaxsvd.kernels.neuron.emulator.dtypes import NUMPY
from jaxsvd.kernels.neuron.emulator.errors import not_modelled, refuse
from jaxsvd.kernels.neuron.emulator.isa_vector import Value, column
from jaxsvd.kernels.neuron.emulator.operands import ReduceCmd, begin, on_engine, same_layout
from jaxsvd.kernels.neuron.emulator.ops import Op
from jaxsvd.kernels.neuron.emulator.tensor import Tensor


def activation(
    dst: Tensor,
    op: Op,
    data: Tensor,
    bias: Value | None = None,
    scale: Value = 1.0,
    reduce_op: Op | None = None,
    reduce_res: Tensor | None = None,
    reduce_cmd: ReduceCmd = ReduceCmd.idle,
    name: str | None = None,
    **unknown: Any,
) -> None:
    """dst = op(data·scale + bias), in float32; scale and bias are numbers or (P, 1) tensors."""
    machine = begin("activation", unknown)
    if reduce_op is not None or reduce_res is not None or reduce_cmd is not ReduceCmd.idle:
        not_modelled("reductions of activation")
    on_engine(dst, "dst")
    on_engine(data, "data")
    same_layout(dst, data, "activation")
    if not isinstance(op, Op) or op.unary is None:
        refuse("op", "an activation function that is modelled", repr(op))
    if bias is not None and type(bias) is not Tensor and machine.target.generation < 3:
        refuse("activation-bias", "a (P, 1) tensor as bias on gen2", repr(bias))
    if bias is not None and op.name == "reciprocal" and machine.target.generation < 3:
        refuse("activation-bias", "no bias with nl.reciprocal on gen2", repr(bias))
    machine.counts.engine("scalar", data.per_row())
    values = machine.read(data)
    factor = column(machine, data, scale, "scale")
    offset = np.float32(0) if bias is None else column(machine, data, bias, "bias", tuple(NUMPY))
    machine.touch(dst)
    if values is not None:
        machine.write(dst, _activate(op, values.reshape(data.shape[0], -1) * factor + offset))


def _activate(op: Op, values: np.ndarray) -> np.ndarray:
    assert op.unary is not None
    if op.valid is not None:
        low, high = op.valid
        size = np.abs(values) if op.negative else values
        if not np.all((size >= low) & (size <= high)):
            worst = values[~((size >= low) & (size <= high))][0]
            refuse("activation-range", f"inputs of {op!r} within {op.valid}", worst)
    return op.unary(values)
