"""Kernels that each break one rule of an instruction, and otherwise none: see broken.py."""

import nki
import nki.isa as nisa
import nki.language as nl
from parts import evicted, loaded, psum, stored

# Matmul


def multiplied(x, w, sums, accumulate=None):
    """Multiply whole operands into a tile of PSUM."""
    nisa.nc_matmul(dst=sums, stationary=loaded(w), moving=loaded(x), accumulate=accumulate)
    return sums


@nki.jit
def matmul_moving_600(x, w):
    moving = nl.ndarray((128, 600), dtype=x.dtype, buffer=nl.sbuf)
    nisa.memset(dst=moving, value=1.0)
    sums = psum(600)
    nisa.nc_matmul(dst=sums, stationary=loaded(w), moving=moving)
    return evicted(sums)


@nki.jit
def matmul_moving_9000(x, w):
    moving = nl.ndarray((128, 9000), dtype=x.dtype, buffer=nl.sbuf)
    nisa.memset(dst=moving, value=1.0)
    nisa.nc_matmul(dst=psum(), stationary=loaded(w), moving=moving)
    return stored(moving)


@nki.jit
def matmul_stationary_256(x, w):
    nisa.nc_matmul(dst=psum(128), stationary=loaded(x)[:, 0:256], moving=loaded(w))
    return stored(loaded(x))


@nki.jit
def matmul_of_other_partitions(x, w):
    sums = psum()
    nisa.nc_matmul(dst=sums, stationary=loaded(w)[0:64, :], moving=loaded(x))
    return evicted(sums)


@nki.jit
def matmul_of_shifted_partitions(x, w):
    sums = psum()
    nisa.nc_matmul(dst=sums, stationary=loaded(w)[0:64, :], moving=loaded(x)[64:128, :])
    return evicted(sums)


@nki.jit
def matmul_into_too_many_columns(x, w):
    sums = psum()
    nisa.nc_matmul(dst=sums, stationary=loaded(w), moving=loaded(w))
    return evicted(sums)


@nki.jit
def matmul_into_bfloat16(x, w):
    return evicted(multiplied(x, w, psum(dtype=nl.bfloat16)))


@nki.jit
def matmul_into_float16(x, w):
    return evicted(multiplied(x, w, psum(dtype=nl.float16)))


@nki.jit
def matmul_of_two_dtypes(x, w):
    moving = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=moving, src=loaded(x))
    sums = psum()
    nisa.nc_matmul(dst=sums, stationary=loaded(w), moving=moving)
    return evicted(sums)


@nki.jit
def matmul_across_banks(x, w):
    sums = psum(1024)
    multiplied(x, w, sums[:, 256:768])
    return evicted(sums[:, 256:768])


@nki.jit
def matmul_into_sbuf(x, w):
    sums = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)
    return stored(multiplied(x, w, sums))


@nki.jit
def matmul_from_psum(x, w):
    moving = psum(dtype=nl.bfloat16)
    nisa.memset(dst=moving, value=1.0)
    sums = psum()
    nisa.nc_matmul(dst=sums, stationary=loaded(w), moving=moving)
    return evicted(sums)


@nki.jit
def matmul_adds_to_nothing(x, w):
    return evicted(multiplied(x, w, psum(), accumulate=True))


@nki.jit
def matmul_adds_to_a_memset(x, w):
    sums = psum()
    nisa.memset(dst=sums, value=0.0)
    return evicted(multiplied(x, w, sums, accumulate=True))


@nki.jit
def matmul_infers_adding_to_a_memset(x, w):
    sums = psum()
    nisa.memset(dst=sums, value=0.0)
    return evicted(multiplied(x, w, sums))


@nki.jit
def matmul_adds_to_a_part(x, w):
    sums = psum()
    nisa.nc_matmul(dst=sums[:, 0:128], stationary=loaded(w), moving=loaded(w))
    return evicted(multiplied(x, w, sums))


@nki.jit
def matmul_accumulates_by_number(x, w):
    return evicted(multiplied(x, w, psum(), accumulate=0))


# Transposes


@nki.jit
def transpose_into_float32(x, w):
    turned = psum(128)
    nisa.nc_transpose(dst=turned, data=loaded(w))
    return evicted(turned)


@nki.jit
def transpose_of_512(x, w):
    nisa.nc_transpose(dst=psum(128, x.dtype), data=loaded(x)[:, 0:256].reshape((128, 256)))
    return stored(loaded(x))


@nki.jit
def transpose_by_vector_of_64(x, w):
    turned = nl.ndarray((64, 64), dtype=w.dtype, buffer=nl.sbuf)
    nisa.nc_transpose(dst=turned, data=loaded(w)[0:64, 0:64], engine=nisa.engine.vector)
    return stored(turned)


@nki.jit
def transpose_by_tensor_into_sbuf(x, w):
    turned = nl.ndarray((128, 128), dtype=w.dtype, buffer=nl.sbuf)
    nisa.nc_transpose(dst=turned, data=loaded(w), engine=nisa.engine.tensor)
    return stored(turned)


@nki.jit
def transpose_by_scalar(x, w):
    nisa.nc_transpose(dst=psum(128, w.dtype), data=loaded(w), engine=nisa.engine.scalar)
    return stored(loaded(w))


# DMA


@nki.jit
def dma_from_psum(x, w):
    y = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=y, src=multiplied(x, w, psum()))
    return y


@nki.jit
def dma_of_other_size(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=w)
    return stored(tile)


@nki.jit
def dma_casts_in_hardware(x, w):
    tile = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x, dge_mode=nisa.dge_mode.hwdge)
    return stored(tile)


@nki.jit
def dma_descriptors_by_hardware(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.sync)
    return stored(tile)


@nki.jit
def dma_engine_without_hwdge(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x, engine=nisa.engine.sync)
    return stored(tile)


@nki.jit
def dma_priority(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x, priority=1)
    return stored(tile)


@nki.jit
def dma_transpose_into_other_shape(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_transpose(dst=tile, src=x)
    return stored(tile)


@nki.jit
def dma_transpose_of_other_axes(x, w):
    tile = nl.ndarray((128, 128), dtype=w.dtype, buffer=nl.sbuf)
    nisa.dma_transpose(dst=tile, src=w, axes=(0, 1))
    return stored(tile)


@nki.jit
def dma_transpose_casts(x, w):
    tile = nl.ndarray((128, 128), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_transpose(dst=tile, src=w, axes=(1, 0))
    return stored(tile)


@nki.jit
def dma_transpose_in_hardware_of_128(x, w):
    tile = nl.ndarray((128, 128), dtype=w.dtype, buffer=nl.sbuf)
    nisa.dma_transpose(dst=tile, src=w, axes=(1, 0), dge_mode=nisa.dge_mode.hwdge)
    return stored(tile)


@nki.jit
def dma_transpose_into_hbm(x, w):
    y = nl.ndarray((128, 128), dtype=w.dtype, buffer=nl.shared_hbm)
    nisa.dma_transpose(dst=y, src=w, axes=(1, 0))
    return y


# Vector, Scalar and GpSimd


@nki.jit
def copy_by_scalar(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=loaded(x), engine=nisa.engine.scalar)
    return stored(tile)


@nki.jit
def copy_by_gpsimd_from_psum(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=multiplied(x, w, psum()), engine=nisa.engine.gpsimd)
    return stored(tile)


@nki.jit
def copy_into_other_shape(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=loaded(w))
    return stored(tile)


@nki.jit
def copy_across_partitions(x, w):
    tile = nl.ndarray((64, 256), dtype=w.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=loaded(w))
    return stored(tile)


@nki.jit
def copy_from_hbm(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=x)
    return stored(tile)


@nki.jit
def engine_by_number(x, w):
    tile = loaded(x)
    nisa.tensor_copy(dst=tile, src=tile, engine=5)
    return stored(tile)


@nki.jit
def both_inputs_in_psum(x, w):
    sums = multiplied(x, w, psum())
    tile = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=tile, data1=sums, data2=sums, op=nl.add)
    return stored(tile)


@nki.jit
def tensor_tensor_of_a_function(x, w):
    tile = loaded(x)
    nisa.tensor_tensor(dst=tile, data1=tile, data2=tile, op=nl.silu)
    return stored(tile)


@nki.jit
def activation_with_a_bias(x, w):
    tile = loaded(x)
    nisa.activation(dst=tile, op=nl.silu, data=tile, bias=0.5)
    return stored(tile)


@nki.jit
def activation_scaled_in_bfloat16(x, w):
    tile = loaded(x)
    nisa.activation(dst=tile, op=nl.silu, data=tile, scale=loaded(w)[:, 0:1])
    return stored(tile)


@nki.jit
def activation_with_a_wide_bias(x, w):
    tile = loaded(x)
    nisa.activation(dst=tile, op=nl.silu, data=tile, bias=tile[:, 0:2])
    return stored(tile)


@nki.jit
def square_root_of_negatives(x, w):
    tile = loaded(x)
    nisa.memset(dst=tile, value=-1.0)
    nisa.activation(dst=tile, op=nl.sqrt, data=tile)
    return stored(tile)


@nki.jit
def memset_by_tensor(x, w):
    tile = loaded(x)
    nisa.memset(dst=tile, value=tile)
    return stored(tile)


@nki.jit
def reduce_over_partitions(x, w):
    row = nl.ndarray((1, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=row, op=nl.add, data=loaded(x), axis=0)
    return stored(row)


@nki.jit
def tensor_scalar_with_half_an_op(x, w):
    tile = loaded(x)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=2.0, op1=nl.add)
    return stored(tile)
