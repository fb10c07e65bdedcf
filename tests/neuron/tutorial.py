"""The steps of the public NKI matmul tutorial, written anew: Y = Aᵀ·B of A (K, M) and B (K, N), better each time."""

import nki
import nki.isa as nisa
import nki.language as nl

P = 128
WIDE = 512


def tile_of(source, row, column, width):
    """A tile of SBUF with P rows of an HBM matrix, from (row, column)."""
    tile = nl.ndarray((P, width), dtype=source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source[row : row + P, column : column + width])
    return tile


def store(sums, y, row, column):
    """Evict a tile of PSUM and store it at (row, column)."""
    tile = nl.ndarray(sums.shape, dtype=y.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=sums)
    nisa.dma_copy(dst=y[row : row + sums.shape[0], column : column + sums.shape[1]], src=tile)


@nki.jit
def basic(a, b):
    m, n = a.shape[1], b.shape[1]
    y = nl.ndarray((m, n), dtype=a.dtype, buffer=nl.shared_hbm)
    sums = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(sums, tile_of(a, 0, 0, m), tile_of(b, 0, 0, n))
    store(sums, y, 0, 0)
    return y


@nki.jit
def tiled(a, b):
    y = nl.ndarray((a.shape[1], b.shape[1]), dtype=a.dtype, buffer=nl.shared_hbm)
    for m in nl.affine_range(a.shape[1] // P):
        for n in nl.affine_range(b.shape[1] // WIDE):
            sums = nl.ndarray((P, WIDE), dtype=nl.float32, buffer=nl.psum)
            for k in nl.affine_range(a.shape[0] // P):
                left, right = tile_of(a, k * P, m * P, P), tile_of(b, k * P, n * WIDE, WIDE)
                nisa.nc_matmul(dst=sums, stationary=left, moving=right)
            store(sums, y, m * P, n * WIDE)
    return y


@nki.jit
def hoisted(a, b):
    y = nl.ndarray((a.shape[1], b.shape[1]), dtype=a.dtype, buffer=nl.shared_hbm)
    ks = a.shape[0] // P
    for m in range(a.shape[1] // P):
        lefts = [tile_of(a, k * P, m * P, P) for k in range(ks)]
        for n in range(b.shape[1] // WIDE):
            rights = [tile_of(b, k * P, n * WIDE, WIDE) for k in range(ks)]
            sums = nl.ndarray((P, WIDE), dtype=nl.float32, buffer=nl.psum)
            for k in range(ks):
                nisa.nc_matmul(dst=sums, stationary=lefts[k], moving=rights[k], accumulate=k > 0)
            store(sums, y, m * P, n * WIDE)
    return y


@nki.jit
def blocked(a, b, tiles_m=2, tiles_n=2):
    y = nl.ndarray((a.shape[1], b.shape[1]), dtype=a.dtype, buffer=nl.shared_hbm)
    ks, wide_m, wide_n = a.shape[0] // P, tiles_m * P, tiles_n * WIDE
    for m in range(a.shape[1] // wide_m):
        lefts = [tile_of(a, k * P, m * wide_m, wide_m) for k in range(ks)]
        for n in range(b.shape[1] // wide_n):
            rights = [tile_of(b, k * P, n * wide_n, wide_n) for k in range(ks)]
            for i in range(tiles_m):
                for j in range(tiles_n):
                    sums = nl.ndarray((P, WIDE), dtype=nl.float32, buffer=nl.psum)
                    for k in range(ks):
                        left, right = lefts[k][:, nl.ds(i * P, P)], rights[k][:, nl.ds(j * WIDE, WIDE)]
                        nisa.nc_matmul(dst=sums, stationary=left, moving=right)
                    store(sums, y, m * wide_m + i * P, n * wide_n + j * WIDE)
    return y


@nki.jit
def optimised(a, b, tiles_m=2, tiles_n=2, tiles_k=2):
    """All three dimensions in blocks; partial sums of a column of Y stay in SBUF, in its dtype."""
    y = nl.ndarray((a.shape[1], b.shape[1]), dtype=a.dtype, buffer=nl.shared_hbm)
    wide_m, wide_n, wide_k = tiles_m * P, tiles_n * WIDE, tiles_k * P
    for n in range(b.shape[1] // wide_n):
        rows = []
        for _ in range(a.shape[1] // P):
            rows.append(nl.zeros((P, tiles_n, WIDE), dtype=y.dtype, buffer=nl.sbuf))
        for k in nl.sequential_range(a.shape[0] // wide_k):
            right = nl.ndarray((P, tiles_k, wide_n), dtype=b.dtype, buffer=nl.sbuf)
            for i in range(tiles_k):
                first = k * wide_k + i * P
                nisa.dma_copy(dst=right[0:P, i, 0:wide_n], src=b[first : first + P, n * wide_n : (n + 1) * wide_n])
            for m in range(a.shape[1] // wide_m):
                left = nl.ndarray((P, tiles_k, wide_m), dtype=a.dtype, buffer=nl.sbuf)
                for i in range(tiles_k):
                    first = k * wide_k + i * P
                    nisa.dma_copy(dst=left[:, i, :], src=a[first : first + P, m * wide_m : (m + 1) * wide_m])
                add_block(left, right, rows, m * tiles_m)
        for m in range(len(rows)):
            nisa.dma_copy(dst=y[m * P : (m + 1) * P, n * wide_n : (n + 1) * wide_n], src=rows[m].reshape((P, wide_n)))
    return y


def add_block(left, right, rows, first):
    """Add the product of two blocks to the rows from `first`."""
    for i in range(left.shape[2] // P):
        for j in range(right.shape[2] // WIDE):
            sums = nl.ndarray((P, WIDE), dtype=nl.float32, buffer=nl.psum)
            for k in range(left.shape[1]):
                nisa.nc_matmul(
                    dst=sums,
                    stationary=left[0:P, k, i * P : (i + 1) * P],
                    moving=right[0:P, k, j * WIDE : (j + 1) * WIDE],
                )
            row = rows[first + i][:, j, :]
            nisa.tensor_tensor(dst=row, data1=row, data2=sums, op=nl.add)


@nki.jit
def ragged(x, w, rows=128, columns=512):
    """xᵀ·w of any size: partial tiles at the edges, w loaded once per row block."""
    k, m, n = x.shape[0], x.shape[1], w.shape[1]
    y = nl.ndarray((m, n), dtype=x.dtype, buffer=nl.shared_hbm)
    for m0 in range(0, m, rows):
        m1 = min(m, m0 + rows)
        for n0 in range(0, n, columns):
            n1 = min(n, n0 + columns)
            sums = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.psum)
            for k0 in range(0, k, P):
                k1 = min(k, k0 + P)
                left = nl.ndarray((P, rows), dtype=x.dtype, buffer=nl.sbuf, name="left")
                right = nl.ndarray((P, columns), dtype=w.dtype, buffer=nl.sbuf, name="right")
                nisa.dma_copy(dst=left[0 : k1 - k0, 0 : m1 - m0], src=x[k0:k1, m0:m1])
                nisa.dma_copy(dst=right[0 : k1 - k0, 0 : n1 - n0], src=w[k0:k1, n0:n1])
                nisa.nc_matmul(
                    dst=sums[0 : m1 - m0, 0 : n1 - n0],
                    stationary=left[0 : k1 - k0, 0 : m1 - m0],
                    moving=right[0 : k1 - k0, 0 : n1 - n0],
                    accumulate=k0 > 0,
                )
            out = nl.ndarray((rows, columns), dtype=y.dtype, buffer=nl.sbuf)
            nisa.tensor_copy(dst=out[0 : m1 - m0, 0 : n1 - n0], src=sums[0 : m1 - m0, 0 : n1 - n0])
            nisa.dma_copy(dst=y[m0:m1, n0:n1], src=out[0 : m1 - m0, 0 : n1 - n0])
    return y


@nki.jit
def twice(a, b):
    """The same product twice into one tile of PSUM, without saying that the second starts anew."""
    y = nl.ndarray((P, WIDE), dtype=a.dtype, buffer=nl.shared_hbm)
    sums = nl.ndarray((P, WIDE), dtype=nl.float32, buffer=nl.psum)
    for _ in range(2):
        nisa.nc_matmul(sums, tile_of(a, 0, 0, P), tile_of(b, 0, 0, WIDE))
        store(sums, y, 0, 0)
    return y
