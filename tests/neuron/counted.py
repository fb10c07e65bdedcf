"""Kernels small enough to count by hand."""

import nki
import nki.isa as nisa
import nki.language as nl


def filled(shape, dtype, buffer=nl.sbuf, value=1.0):
    """A tile of a number."""
    tile = nl.ndarray(shape, dtype=dtype, buffer=buffer)
    nisa.memset(dst=tile, value=value, engine=nisa.engine.gpsimd if buffer == nl.sbuf else nisa.engine.vector)
    return tile


def stored(tile):
    """An output with a copy of a tile of SBUF."""
    y = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=y, src=tile)
    return y


@nki.jit
def matmul(dtype, rows, columns, moving):
    sums = nl.ndarray((columns, moving), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=sums, stationary=filled((rows, columns), dtype), moving=filled((rows, moving), dtype))
    out = nl.ndarray((columns, moving), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=out, op=nl.copy, data=sums)
    return stored(out)


@nki.jit
def transpose(dtype, rows, columns):
    turned = nl.ndarray((columns, rows), dtype=dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=filled((rows, columns), dtype), engine=nisa.engine.tensor)
    out = nl.ndarray((columns, rows), dtype=dtype, buffer=nl.sbuf)
    nisa.activation(dst=out, op=nl.copy, data=turned)
    return stored(out)


@nki.jit
def copy(dtype, columns, source=nl.float32, step=1, engine=nisa.engine.vector, from_psum=False):
    src = filled((128, columns * step), source, nl.sbuf)
    if from_psum:
        src = nl.ndarray((128, columns), dtype=source, buffer=nl.psum)
        nisa.activation(dst=src, op=nl.copy, data=filled((128, columns), source))
    out = nl.ndarray((128, columns), dtype=dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=out, src=src[:, 0 : columns * step : step], engine=engine)
    return stored(out)


@nki.jit
def add(dtype, columns, out_dtype):
    out = nl.ndarray((128, columns), dtype=out_dtype, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=out, data1=filled((128, columns), dtype), data2=filled((128, columns), dtype), op=nl.add)
    return stored(out)


@nki.jit
def invert(columns):
    tile = filled((128, columns), nl.float32, value=4.0)
    nisa.reciprocal(dst=tile, data=tile)
    return stored(tile)


@nki.jit
def sequence(count, columns, together):
    """`count` tiles, all alive at once or one after the other."""
    y = nl.ndarray((count, 128, columns), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    tiles = []
    for i in range(count):
        tiles.append(filled((128, columns), nl.bfloat16))
        if not together:
            nisa.dma_copy(dst=y[i], src=tiles[i])
    for i in range(count):
        if together:
            nisa.dma_copy(dst=y[i], src=tiles[i])
    return y


@nki.jit
def runs(x):
    """Rows of 64 of 256 columns, a whole, and every other element."""
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    scratch = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.hbm, name="half")
    a = nl.ndarray((128, 64), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=a, src=x[:, 64:128])
    nisa.dma_copy(dst=scratch, src=x)
    nisa.dma_copy(dst=a, src=scratch[:, 0:128:2])
    nisa.dma_copy(dst=y, src=x)
    return y


@nki.jit
def elementwise(x, bias):
    """Every elementwise instruction, in turn."""
    wide = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=wide, src=x)
    column = nl.ndarray(bias.shape, dtype=bias.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=bias)
    results = []
    for op in (nl.silu, nl.gelu, nl.gelu_apprx_tanh, nl.sigmoid, nl.exp, nl.tanh, nl.copy):
        out = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=out, op=op, data=wide, bias=column, scale=0.5)
        results.append(stored(out))
    for op in (nl.add, nl.subtract, nl.multiply, nl.maximum, nl.minimum):
        out = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=out, data=wide, op0=op, operand0=column, reverse0=True, op1=nl.add, operand1=1.0)
        results.append(stored(out))
    for op in (nl.add, nl.maximum):
        out = nl.ndarray((128, 4), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=out, op=op, data=wide.reshape((128, 4, x.shape[1] // 4)), axis=2, negate=op == nl.add)
        results.append(stored(out))
    return tuple(results)


@nki.jit
def views(x):
    """The same tile read through every view that is modelled."""
    tile = nl.ndarray((128, 4, 6), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x.reshape((128, 4, 6)))
    found = (
        tile[0:64, 1, ::2],
        tile[5:6, ..., -1],
        tile[3],
        tile[:, nl.ds(1, 2), 0:-3],
        tile.permute((0, 2, 1)),
        tile.reshape((128, 24)),
        tile.reshape_dim(2, (2, -1)),
        tile.flatten_dims(1, 2),
        tile.expand_dim(1),
        tile[:, 1:2, :].squeeze_dim(1),
        tile[:, 1:2, :].broadcast(1, 3),
        tile.slice(2, 1, 5, 2),
        tile.select(1, 2),
    )
    results = []
    for view in found:
        y = nl.ndarray(view.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=y, src=view)
        results.append(y)
    y = nl.ndarray((6, 4), dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=y, src=x.reshape((128, 4, 6))[7].permute((1, 0)))
    results.append(y)
    return tuple(results)


@nki.jit
def turned(x):
    """DMA transposes of 2, 3 and 4 dimensions, and one of the Vector Engine."""
    results = []
    for shape, order in (((16, 96), (1, 0)), ((4, 8, 48), (2, 1, 0)), ((2, 4, 4, 48), (3, 1, 2, 0))):
        source = x.reshape(shape)
        out = nl.ndarray(tuple(shape[i] for i in order), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(dst=out, src=source, axes=order)
        results.append(stored(out))
    tile = nl.ndarray((16, 96), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    out = nl.ndarray((32, 16), dtype=x.dtype, buffer=nl.sbuf)
    nisa.nc_transpose(dst=out, data=tile[:, 32:64])
    results.append(stored(out))
    return tuple(results)


@nki.jit
def cast(x, dtype):
    """x through a tile of another dtype."""
    tile = nl.ndarray(x.shape, dtype=dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    return stored(tile)


@nki.jit
def through_scratch(x):
    """x through three tensors of private HBM, two of one name."""
    for name in ("half", "half", ""):
        scratch = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.private_hbm, name=name)
        nisa.dma_copy(dst=scratch, src=x)
        x = scratch
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=y, src=x)
    return y
