"""What the fused kernels are measured against, on the same emulator: dense products, and the pair through HBM."""

import nki
import nki.isa as nisa
import nki.language as nl

from jaxsvd.kernels.neuron.products import store_rows
from jaxsvd.kernels.neuron.tiles import MAX_TOKENS, block_tokens, ceil_div, load, weights_room


@nki.jit
def matmul_tiled(x, w):
    """Y (M, N) = X·W as a first tutorial has it: x (M, K), w (K, N), every tile loaded anew for every tile of Y."""
    tokens, k = x.shape
    outputs = w.shape[1]
    y = nl.ndarray((tokens, outputs), dtype=x.dtype, buffer=nl.shared_hbm)
    for t in range(0, tokens, 128):
        height = min(128, tokens - t)
        for c in range(0, outputs, 512):
            n = min(512, outputs - c)
            total = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
            for j in range(0, k, 128):
                rows = min(128, k - j)
                left = turned(x, t, height, j, rows)
                right = nl.ndarray((128, 512), dtype=w.dtype, buffer=nl.sbuf)
                nisa.dma_copy(dst=right[0:rows, 0:n], src=w[j : j + rows, c : c + n])
                nisa.nc_matmul(
                    dst=total[0:height, 0:n],
                    stationary=left[0:rows, 0:height],
                    moving=right[0:rows, 0:n],
                    accumulate=j > 0,
                )
            out = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
            nisa.tensor_copy(dst=out[0:height, 0:n], src=total[0:height, 0:n], engine=nisa.engine.vector)
            nisa.dma_copy(dst=y[t : t + height, c : c + n], src=out[0:height, 0:n])
    return y


def turned(x, start, height, begin, width):
    """A tile of x, transposed: [width, height]."""
    tile = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile[0:height, 0:width], src=x[start : start + height, begin : begin + width])
    flipped = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.psum)
    nisa.nc_transpose(dst=flipped[0:width, 0:height], data=tile[0:height, 0:width], engine=nisa.engine.tensor)
    out = nl.ndarray((128, 128), dtype=x.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=out[0:width, 0:height], src=flipped[0:width, 0:height], engine=nisa.engine.vector)
    return out


@nki.jit
def matmul(x, w):
    """Y (M, N) = X·W with as large a block of tokens as SBUF holds: x (M, K) is read once, w (K, N) once per block."""
    y = nl.ndarray((x.shape[0], w.shape[1]), dtype=x.dtype, buffer=nl.shared_hbm)
    multiply(x, w, y)
    return y


@nki.jit
def unfused_pair(x, u, v):
    """Y (M, N) = (X·U)·V by two such products, X·U (M, r) going out to HBM and in again."""
    hidden = nl.ndarray((x.shape[0], u.shape[1]), dtype=x.dtype, buffer=nl.private_hbm)
    y = nl.ndarray((x.shape[0], v.shape[1]), dtype=x.dtype, buffer=nl.shared_hbm)
    multiply(x, u, hidden)
    multiply(hidden, v, y)
    return y


def multiply(x, w, y):
    """y = x·w, in HBM."""
    tokens, k = x.shape
    tiles = ceil_div(k, 128)
    block = block_tokens(tokens, tiles, tiles, tiles, x.dtype, MAX_TOKENS)
    for start in range(0, tokens, block):
        count = min(block, tokens - start)
        operand = load(x, "rows", k, start, count)
        store_rows(operand, w, y, start, False, weights_room(count, tiles, x.dtype))
