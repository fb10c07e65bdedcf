"""Operands on chip: how matrices come into SBUF, in which tiles, and how results leave PSUM.

An operand is a matrix (k, tokens) in SBUF with k on the partitions, cut into tiles of at most 128 rows. Everything here
and in the kernels is in the subset of Python that NKI compiles: shapes are known, loops unroll, `==` stands for `is`.
"""

import nki.isa as nisa
import nki.language as nl

PARTITIONS = 128
BANK = 512  # float32 elements of a PSUM bank, per partition
BANKS = 4  # of PSUM's eight, for the sums of one panel, as those of the next need some before the first are out
NARROW = 256  # columns of a matrix, at least, to have beside the next as many
STAGING = 15 * 1024  # bytes per partition kept free of operands: for weights, and
IN_FLIGHT = 8 * 1024  # for x and y on their way
MAX_TOKENS = BANK * BANKS  # of a block
STREAMED = PARTITIONS * BANKS  # of a block whose outputs are all summed at once


def ceil_div(a, b):
    """a/b, rounded up."""
    return (a + b - 1) // b


def itemsize(dtype):
    """Bytes of a number."""
    assert dtype == nl.float32 or dtype == nl.bfloat16 or dtype == nl.float16, f"no kernel is for {dtype}"
    return 4 if dtype == nl.float32 else 2


def sbuf_bytes():
    """SBUF per partition that a kernel may fill on the target, in bytes; the compiler keeps the rest."""
    version = nisa.get_nc_version()
    if version == nisa.nc_version.gen2:
        return (192 - 17) * 1024
    if version == nisa.nc_version.gen3:
        return (224 - 17) * 1024
    return (256 - 17) * 1024


def weights_room(tokens, tiles, dtype):
    """Bytes of SBUF per partition that are left for weights beside operands of so many tiles."""
    return sbuf_bytes() - itemsize(dtype) * tokens * tiles - IN_FLIGHT


def block_tokens(tokens, tiles, stage_tiles, row_tiles, dtype, limit):
    """How many tokens go through a kernel at once: all, or as many as SBUF has room for, in blocks of like size.

    Args:
        tokens: how many there are.
        tiles: of all operands that are alive at once, together.
        stage_tiles: of those that are alive while `store_rows` runs.
        row_tiles: of the largest operand of `store_rows`: two panels of its matrix go beside it, or where that leaves
            too few tokens, its matrix is streamed, as it can be for up to STREAMED of them.
        dtype: of operands and weights.
        limit: what PSUM has room for, MAX_TOKENS or less.
    """
    size, room = itemsize(dtype), sbuf_bytes() - STAGING
    panelled = (room - size * 2 * NARROW * (row_tiles + 1)) // (size * stage_tiles)
    most = min(room // (size * tiles), max(STREAMED, panelled), limit)
    assert most >= min(tokens, PARTITIONS), f"operands of {tiles} tiles leave SBUF no room for {PARTITIONS} tokens"
    if tokens <= most:
        return tokens
    blocks = ceil_div(tokens, most // PARTITIONS * PARTITIONS)
    return ceil_div(ceil_div(tokens, blocks), PARTITIONS) * PARTITIONS


# Operands: tuples (tile, first, k, tokens, split). `tile` is [128, tiles, tokens] and row i of the matrix lies at
# partition i % 128 of tile `first + i // 128`; where `split`, `tile` is [128, tokens, tiles] and row i lies at
# partition i // tiles of tile i % tiles.


def tile_rows(operand, j):
    """How many rows tile j of an operand has."""
    k = operand[2]
    if operand[4]:
        tiles = ceil_div(k, PARTITIONS)
        return ceil_div(k - j, tiles)
    return min(PARTITIONS, k - j * PARTITIONS)


def tile_of(operand, j, start, stop):
    """Tile j of an operand, for some of its tokens."""
    tile, first, _, _, split = operand
    if split:
        return tile[0 : tile_rows(operand, j), start:stop, j]
    return tile[0 : tile_rows(operand, j), first + j, start:stop]


def weight_tile(operand, w, j, start, stop):
    """Load the rows of W that meet tile j of an operand, for some of its columns: runs of a row in HBM."""
    k, rows = operand[2], tile_rows(operand, j)
    tile = nl.ndarray((PARTITIONS, stop - start), dtype=w.dtype, buffer=nl.sbuf)
    if operand[4]:
        nisa.dma_copy(dst=tile[0:rows, :], src=w[j : k : ceil_div(k, PARTITIONS), start:stop])
    else:
        nisa.dma_copy(dst=tile[0:rows, :], src=w[j * PARTITIONS : j * PARTITIONS + rows, start:stop])
    return tile


def column_tiles(start, stop):
    """Columns start to stop in tiles of at most 128: (first column, columns)."""
    tiles = []
    for c in range(start, stop, PARTITIONS):
        tiles.append((c, min(PARTITIONS, stop - c)))
    return tiles


def load(x, layout, k, start, tokens):
    """Bring a block of x into SBUF as an operand.

    Args:
        x: in HBM, as `layout` says: "rows" (M, k), "columns" (k, M) or "tiles" (128, ceil(k/128), M).
        layout: see x.
        k: features.
        start: the block's first token.
        tokens: the block's length.
    """
    tiles = ceil_div(k, PARTITIONS)
    if layout == "rows" and x.shape[0] <= PARTITIONS:
        return load_split(x, k, tokens)
    tile = nl.ndarray((PARTITIONS, tiles, tokens), dtype=x.dtype, buffer=nl.sbuf)
    operand = (tile, 0, k, tokens, False)
    if layout == "rows":
        load_transposed(x, operand, start)
    elif layout == "columns":
        for j in range(tiles):
            rows = tile_rows(operand, j)
            nisa.dma_copy(dst=tile[0:rows, j, :], src=x[j * PARTITIONS : j * PARTITIONS + rows, start : start + tokens])
    else:
        nisa.dma_copy(dst=tile, src=x[:, :, start : start + tokens])
    return operand


def load_split(x, k, tokens):
    """A few rows (M, k) as a split operand: no transpose, as partition p takes the p-th stretch of every row."""
    tiles = ceil_div(k, PARTITIONS)
    whole, rest = k // tiles, k % tiles
    tile = nl.ndarray((PARTITIONS, tokens, tiles), dtype=x.dtype, buffer=nl.sbuf)
    if rest == 0:
        nisa.dma_copy(dst=tile[0:whole, :, :], src=x.reshape((tokens, whole, tiles)).permute((1, 0, 2)))
    else:
        for m in range(tokens):
            nisa.dma_copy(dst=tile[0:whole, m, :], src=x[m, 0 : whole * tiles].reshape((whole, tiles)))
            nisa.dma_copy(dst=tile[whole : whole + 1, m, 0:rest], src=x[m, whole * tiles : k].reshape((1, rest)))
    return (tile, 0, k, tokens, True)


def load_transposed(x, operand, start):
    """Many rows (M, k): loaded in long runs and transposed by the tensor engine, a bank of PSUM at a time."""
    tile, _, k, tokens, _ = operand
    group = BANK * 4 // (PARTITIONS * itemsize(x.dtype))  # tiles of 128 tokens that a bank holds
    count = 0
    for t in range(0, tokens, PARTITIONS):
        width = min(PARTITIONS, tokens - t)
        for first in range(0, ceil_div(k, PARTITIONS), group):
            begin = first * PARTITIONS
            end = min(k, begin + group * PARTITIONS)
            staged = nl.ndarray((PARTITIONS, group * PARTITIONS), dtype=x.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=staged[0:width, 0 : end - begin], src=x[start + t : start + t + width, begin:end])
            turned = nl.ndarray((PARTITIONS, group, PARTITIONS), dtype=x.dtype, buffer=nl.psum)
            whole, rest = (end - begin) // PARTITIONS, (end - begin) % PARTITIONS
            for i in range(ceil_div(end - begin, PARTITIONS)):
                rows = min(PARTITIONS, end - begin - i * PARTITIONS)
                nisa.nc_transpose(
                    dst=turned[0:rows, i, 0:width],
                    data=staged[0:width, i * PARTITIONS : i * PARTITIONS + rows],
                    engine=nisa.engine.tensor,
                )
            if whole > 0:
                evict(tile[:, first : first + whole, t : t + width], turned[:, 0:whole, 0:width], count)
            if rest > 0:
                evict(tile[0:rest, first + whole, t : t + width], turned[0:rest, whole, 0:width], count + 1)
            count += 1


def evict(dst, src, count, silu=False):
    """Round sums out of PSUM, by the vector and the scalar engine in turns; SiLU, where asked for, is on the way."""
    if silu:
        nisa.activation(dst=dst, op=nl.silu, data=src)
    elif count % 2 == 0:
        nisa.tensor_copy(dst=dst, src=src, engine=nisa.engine.vector)
    else:
        nisa.activation(dst=dst, op=nl.copy, data=src)  # the scalar engine of trn1 has no tensor_copy
