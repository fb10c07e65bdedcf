"""Instructions of the Tensor Engine: matmul, and the transposes that it or the Vector Engine makes."""

from typing import Any

import numpy as np

from jaxsvd.kernels.neuron.emulator.errors import not_modelled, refuse
from jaxsvd.kernels.neuron.emulator.machine import Machine
from jaxsvd.kernels.neuron.emulator.memory import ON_CHIP
from jaxsvd.kernels.neuron.emulator.operands import PSUM, SBUF, Engine, MatmulPerfMode, begin, on_engine, pick
from jaxsvd.kernels.neuron.emulator.targets import BANK_BYTES, PARTITIONS, STATIONARY_MAX
from jaxsvd.kernels.neuron.emulator.tensor import Tensor


def nc_matmul(
    dst: Tensor,
    stationary: Tensor,
    moving: Tensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple[int, ...] = (),
    tile_size: tuple[int, ...] = (),
    perf_mode: MatmulPerfMode = MatmulPerfMode.none,
    name: str | None = None,
    **unknown: Any,
) -> None:
    """dst (M, N) = or += stationaryᵀ (K, M) · moving (K, N), in float32."""
    machine = begin("nc_matmul", unknown)
    if is_stationary_onezero or is_moving_onezero or is_transpose or tile_position or tile_size:
        not_modelled("the onezero, is_transpose, tile_position and tile_size arguments of nc_matmul")
    if perf_mode is not MatmulPerfMode.none:
        not_modelled(f"perf_mode={perf_mode!r} of nc_matmul")
    on_engine(dst, "dst", PSUM)
    on_engine(stationary, "stationary", SBUF)
    on_engine(moving, "moving", SBUF)
    rows, columns, width = stationary.shape[0], stationary.per_row(), moving.per_row()
    if rows != moving.shape[0] or stationary.partition() != moving.partition():
        refuse("matmul-contraction", "stationary and moving on the same partitions", f"{stationary!r}, {moving!r}")
    if columns > STATIONARY_MAX:
        refuse("matmul-stationary-size", f"at most {STATIONARY_MAX} columns", f"{columns} of {stationary!r}")
    if width > machine.target.moving_max(dst.storage.itemsize):
        limit = machine.target.moving_max(dst.storage.itemsize)
        refuse("matmul-moving-size", f"at most {limit} columns on {machine.target.name}", f"{width} of {moving!r}")
    if dst.shape[0] != columns or dst.per_row() != width:
        refuse("matmul-dst-shape", f"{columns} partitions of {width} elements", dst)
    _check_matmul_dtypes(machine, dst, stationary, moving)
    if machine.target.generation < 4:
        check_bank(dst, "matmul")
    if accumulate is not None and type(accumulate) is not bool:
        refuse("matmul-accumulate", "True, False or None", repr(accumulate))
    left, right = machine.read(stationary), machine.read(moving)
    machine.counts.matmul(rows, columns, width, stationary.storage.dtype)
    adds = _adds(machine, dst, accumulate)
    machine.touch(dst)
    if left is not None and right is not None:
        product = left.reshape(rows, columns).T @ right.reshape(rows, width)
        if adds:
            assert dst.storage.values is not None
            product = dst.of(dst.storage.values).reshape(columns, width) + product
        machine.write(dst, product, by_matmul=True)


def _check_matmul_dtypes(machine: Machine, dst: Tensor, stationary: Tensor, moving: Tensor) -> None:
    left, right, out = stationary.storage.dtype, moving.storage.dtype, dst.storage.dtype
    if left != right and "float32" in (left, right):
        refuse("matmul-dtypes", "float32 with float32 only", f"{left} and {right}")
    if out != "float32" and not (out == "bfloat16" and machine.target.generation >= 4):
        allowed = "float32" if machine.target.generation < 4 else "float32 or bfloat16"
        refuse("matmul-dst-dtype", f"{allowed} on {machine.target.name}", out)


def check_bank(dst: Tensor, what: str) -> None:
    """EmulationError where the elements of a PSUM view lie in more than one bank."""
    storage = dst.storage
    if storage.life.amount == 1:  # all of it is one bank
        return
    first = dst.offset % storage.row
    last = first
    for length, stride in zip(dst.shape[1:], dst.strides[1:], strict=True):
        last += (length - 1) * stride
    banks = first * storage.itemsize // BANK_BYTES, last * storage.itemsize // BANK_BYTES
    if banks[0] != banks[1]:
        refuse(f"{what}-bank", f"dst within one PSUM bank of {BANK_BYTES} bytes", f"banks {banks} of {dst!r}")


def _adds(machine: Machine, dst: Tensor, accumulate: bool | None) -> bool:
    """Whether a matmul adds to what dst holds; EmulationError where that is undefined."""
    if accumulate is False:
        return False
    storage = dst.storage
    rule, expected = "matmul-accumulate", "dst written by a matmul before it is added to"
    if storage.life.first < 0:
        if accumulate:
            refuse(rule, expected, f"{dst!r}, never written")
        return False
    if storage.by_matmul is None or storage.defined is None:
        return True
    bits = dst.of(storage.by_matmul)
    if bits.all():
        return True
    defined = dst.of(storage.defined)
    if machine.target.generation >= 4 and defined.all():
        return True  # what a memset or copy wrote may be added to as well
    if accumulate is None and not defined.any():
        return False
    refuse(rule, expected, f"{bits.size - int(bits.sum())} elements of {dst!r} that no matmul wrote")


def nc_transpose(
    dst: Tensor, data: Tensor, engine: Engine = Engine.unknown, name: str | None = None, **unknown: Any
) -> None:
    """dst (F, P) = dataᵀ (P, F): by the Tensor Engine from SBUF to PSUM, or by the Vector Engine in 32×32."""
    machine = begin("nc_transpose", unknown)
    on_engine(dst, "dst", ON_CHIP)
    on_engine(data, "data", ON_CHIP)
    rows, columns = data.shape[0], data.per_row()
    chosen = pick(engine, (Engine.tensor, Engine.vector), "nc_transpose")
    if engine is Engine.unknown and not (data.buffer in SBUF and dst.buffer in PSUM) and max(rows, columns) <= 32:
        chosen = Engine.vector  # the only one that can
    if dst.dtype != data.dtype:
        refuse("transpose-dtype", f"dst of data's {data.dtype}", dst.dtype)
    if dst.shape[0] != columns or dst.per_row() != rows:
        refuse("transpose-shape", f"dst of {columns} partitions of {rows} elements", dst)
    if chosen is Engine.vector:
        if max(rows, columns) > 32:
            refuse("transpose-size", "at most 32×32 on the Vector Engine", data)
        machine.counts.engine("vector", rows)
    else:
        if data.buffer not in SBUF or dst.buffer not in PSUM:
            refuse("transpose-buffer", "data in sbuf and dst in psum on the Tensor Engine", f"{data!r}, {dst!r}")
        if max(rows, columns) > PARTITIONS:
            refuse("transpose-size", f"at most {PARTITIONS}×{PARTITIONS} on the Tensor Engine", data)
        check_bank(dst, "transpose")
        machine.counts.transpose(rows, data.dtype)
    values = machine.read(data)
    machine.touch(dst)
    if values is not None:
        machine.write(dst, np.ascontiguousarray(values.reshape(rows, columns).T))
