"""The two products of an operand with a matrix W (k, n) in HBM.

- `strip`, `store_columns`, `add_each`: Wᵀ·operand, W stationary: n lands on the partitions, ready to be an operand
  itself. This is how a rank strip (x·U)ᵀ comes about without a transpose (the implicit transposition of NeuronMM).
- `store_rows`: operandᵀ·W, the operand stationary: tokens land on the partitions, as the outputs lie in HBM.

All of k is summed in PSUM in float32, so that every sum is evicted and rounded once.
"""

import nki.isa as nisa
import nki.language as nl

from jaxsvd.kernels.neuron.tiles import (
    BANK,
    BANKS,
    NARROW,
    PARTITIONS,
    STREAMED,
    ceil_div,
    column_tiles,
    evict,
    itemsize,
    tile_of,
    tile_rows,
    weight_tile,
)

AHEAD = 4  # tiles of weights that are on their way while one is multiplied
PANEL = 2048  # columns of a matrix at a time, for runs of 4 KiB in bfloat16

# Wᵀ·operand.


def sums_per_bank(tokens):
    """(tokens of one sum, sums in a bank, sums that cover all tokens)."""
    pieces = ceil_div(tokens, BANK)
    width = ceil_div(tokens, pieces)
    return width, BANK // width, pieces


def plan_columns(tiles, tokens, count, banks, dtype, room):
    """How `add_columns` goes through column tiles: runs of panels, and whether a run's weights are loaded as one.

    A panel's sums fill at most `banks` of PSUM, which for many tokens is a few tiles. Rows of so few columns are short
    runs in HBM, so that the weights of several panels come at once where SBUF has room for them (and for the next):
    `room` bytes, for matrices of `count` tiles of rows. For few tokens panels are wide, and their weights streamed.
    """
    _, per_bank, pieces = sums_per_bank(tokens)
    most = max(1, banks * per_bank // pieces)
    columns = room // (itemsize(dtype) * 2 * count)
    if tokens <= PARTITIONS or columns < 2 * NARROW:
        return [grouped(tiles, most, max(PARTITIONS, room // (itemsize(dtype) * (AHEAD + 1))))], False
    runs = []
    for run in grouped(tiles, len(tiles), min(PANEL, columns)):
        runs.append(grouped(run, most, PANEL))
    return runs, True


def grouped(tiles, most, columns):
    """Column tiles in groups of neighbours: at most so many tiles, and so many columns."""
    found = [[tiles[0]]]
    for i in range(1, len(tiles)):
        c, n = tiles[i]
        panel = found[-1]
        first, last = panel[0], panel[-1]
        if len(panel) < most and last[0] + last[1] == c and c + n - first[0] <= columns:
            panel.append(tiles[i])
        else:
            found.append([tiles[i]])
    return found


def run_weights(operand, w, run, resident):
    """The weights of a run of panels and their first column, where they are loaded as one."""
    if not resident:
        return [], 0
    begin, last = run[0][0][0], run[-1][-1]
    return row_panel(operand, w, begin, last[0] + last[1]), begin


def add_columns(operand, w, panel, weights):
    """The sums of Wᵀ·operand for a panel of column tiles: a list of PSUM banks, to be read by `column_sum`.

    `weights` are those of `run_weights`; where there are none, they are streamed here.
    """
    tokens = operand[3]
    width, per_bank, pieces = sums_per_bank(tokens)
    banks = []
    for _ in range(ceil_div(len(panel) * pieces, per_bank)):
        banks.append(nl.ndarray((PARTITIONS, per_bank, width), dtype=nl.float32, buffer=nl.psum))
    loaded, base = weights
    streamed, ahead = len(loaded) == 0, 0
    if streamed:
        loaded, base, ahead = [], panel[0][0], AHEAD
    count = ceil_div(operand[2], PARTITIONS)
    for step in range(count + ahead):
        if streamed and step < count:
            loaded.append(weight_tile(operand, w, step, base, panel[-1][0] + panel[-1][1]))
        j = step - ahead
        if j >= 0:
            for i in range(len(panel)):
                c, n = panel[i]
                for piece in range(pieces):
                    first = piece * width
                    last = min(tokens, first + width)
                    nisa.nc_matmul(
                        dst=column_sum(banks, tokens, i, n, piece),
                        stationary=loaded[j][0 : tile_rows(operand, j), c - base : c - base + n],
                        moving=tile_of(operand, j, first, last),
                        accumulate=j > 0,
                    )
    return banks


def column_sum(banks, tokens, i, n, piece):
    """Of `add_columns`, the sum of the panel's tile i of n columns, for a piece of the tokens."""
    width, per_bank, pieces = sums_per_bank(tokens)
    at = i * pieces + piece
    return banks[at // per_bank][0:n, at % per_bank, 0 : min(width, tokens - piece * width)]


def add_each(pairs, tiles, banks, room, finish, target):
    """Sum Wᵀ·operand for all column tiles, and call `finish(target, first, panel, sums)` for every panel.

    Args:
        pairs: (operand, W) of the products that are wanted together, all of the same tokens and columns.
        tiles: the column tiles.
        banks: how many of PSUM each product's sums may fill.
        room: bytes of SBUF left for weights.
        finish: what evicts the sums: one list of banks per pair; `first` is the index of the panel's first tile.
        target: what `finish` writes to.
    """
    operand, w = pairs[0]
    count = 0
    for i in range(len(pairs)):
        count += ceil_div(pairs[i][0][2], PARTITIONS)
    runs, resident = plan_columns(tiles, operand[3], count, banks, w.dtype, room)
    first, ahead = 0, weights_of(pairs, runs[0], resident)
    for r in range(len(runs)):
        weights = ahead
        if r + 1 < len(runs):
            ahead = weights_of(pairs, runs[r + 1], resident)
        for panel in runs[r]:
            sums = []
            for i in range(len(pairs)):
                sums.append(add_columns(pairs[i][0], pairs[i][1], panel, weights[i]))
            finish(target, first, panel, sums)
            first += len(panel)


def weights_of(pairs, run, resident):
    """`run_weights` of every pair."""
    weights = []
    for i in range(len(pairs)):
        weights.append(run_weights(pairs[i][0], pairs[i][1], run, resident))
    return weights


def strip(operand, w, tiles, room):
    """Wᵀ·operand in SBUF, [128, tiles, tokens] in w's dtype: a rank strip. `room` bytes are left for weights."""
    out = nl.ndarray((PARTITIONS, len(tiles), operand[3]), dtype=w.dtype, buffer=nl.sbuf)
    add_each(((operand, w),), tiles, BANKS, room, keep_panel, out)
    return out


def keep_panel(out, first, panel, sums):
    """Evict a panel's sums into a strip."""
    tokens = out.shape[2]
    width, _, pieces = sums_per_bank(tokens)
    for i in range(len(panel)):
        n = panel[i][1]
        for piece in range(pieces):
            begin, end = piece * width, min(tokens, piece * width + width)
            evict(out[0:n, first + i, begin:end], column_sum(sums[0], tokens, i, n, piece), i + piece)


def store_columns(operand, w, y, start, silu, room):
    """Store Wᵀ·operand as the columns of Y (n, M) from token `start`."""
    tiles, tokens = column_tiles(0, w.shape[1]), operand[3]
    left = room - 2 * itemsize(y.dtype) * tokens  # for outputs on their way
    add_each(((operand, w),), tiles, BANKS, left, store_panel, (y, start, tokens, silu))


def store_panel(target, _, panel, sums):
    """Evict a panel's sums, and store them as columns."""
    y, start, tokens, silu = target
    width, _, pieces = sums_per_bank(tokens)
    for i in range(len(panel)):
        c, n = panel[i]
        out = nl.ndarray((PARTITIONS, tokens), dtype=y.dtype, buffer=nl.sbuf)
        for piece in range(pieces):
            begin, end = piece * width, min(tokens, piece * width + width)
            evict(out[0:n, begin:end], column_sum(sums[0], tokens, i, n, piece), i + piece, silu)
        nisa.dma_copy(dst=y[c : c + n, start : start + tokens], src=out[0:n, :])


# operandᵀ·W.


def store_rows(operand, w, y, start, silu, room):
    """Store operandᵀ·W as the rows of Y (M, n) from token `start`. `room` bytes of SBUF are left for weights."""
    # A panel and the next one, and the same of outputs.
    columns = room // (itemsize(w.dtype) * 2 * (ceil_div(operand[2], PARTITIONS) + 1))
    if operand[3] <= PARTITIONS or (columns < NARROW and operand[3] <= STREAMED):
        stream_rows(operand, w, y, start, silu, room)
    else:
        assert columns >= NARROW, f"two panels of {NARROW} columns don't fit {room} bytes"
        block_rows(operand, w, y, start, silu, min(PANEL, columns // NARROW * NARROW))


def stream_rows(operand, w, y, start, silu, room):
    """For few tokens: every tile of W is multiplied as it comes in, and the sums of a panel fill several banks."""
    tokens, total = operand[3], w.shape[1]
    heights = column_tiles(0, tokens)  # of tokens, that is
    across = (BANKS + 1) // len(heights)  # five hold 2560 columns, a common width, at once
    most = max(PARTITIONS, min(BANK * across, room // (itemsize(w.dtype) * (AHEAD + 2))))
    width = ceil_div(total, ceil_div(total, most))
    count = ceil_div(operand[2], PARTITIONS)
    for begin in range(0, total, width):
        end = min(total, begin + width)
        across = ceil_div(end - begin, BANK)
        banks = []
        for _ in range(across * len(heights)):
            banks.append(nl.ndarray((PARTITIONS, BANK), dtype=nl.float32, buffer=nl.psum))
        loaded = []
        for step in range(count + AHEAD):
            if step < count:
                loaded.append(weight_tile(operand, w, step, begin, end))
            j = step - AHEAD
            if j >= 0:
                for b in range(len(banks)):
                    t, height = heights[b // across]
                    c = b % across * BANK
                    n = min(BANK, end - begin - c)
                    nisa.nc_matmul(
                        dst=banks[b][0:height, 0:n],
                        stationary=tile_of(operand, j, t, t + height),
                        moving=loaded[j][0 : tile_rows(operand, j), c : c + n],
                        accumulate=j > 0,
                    )
        for h in range(len(heights)):
            t, height = heights[h]
            out = nl.ndarray((PARTITIONS, end - begin), dtype=y.dtype, buffer=nl.sbuf)
            for b in range(across):
                n = min(BANK, end - begin - b * BANK)
                source = banks[h * across + b][0:height, 0:n]
                evict(out[0:height, b * BANK : b * BANK + n], source, h + b, silu)
            nisa.dma_copy(dst=y[start + t : start + t + height, begin:end], src=out[0:height, :])


def block_rows(operand, w, y, start, silu, most):
    """For many tokens: a panel of `most` columns is loaded once for all, while the one before it is multiplied."""
    total = w.shape[1]
    count = ceil_div(operand[2], PARTITIONS)
    ahead = row_panel(operand, w, 0, min(total, most))
    for begin in range(0, total, most):
        end = min(total, begin + most)
        panel = ahead
        if end < total:
            ahead = row_panel(operand, w, end, min(total, end + most))
        for t in range(0, operand[3], PARTITIONS):
            tokens = min(PARTITIONS, operand[3] - t)
            out = nl.ndarray((PARTITIONS, end - begin), dtype=y.dtype, buffer=nl.sbuf)
            for c in range(0, end - begin, BANK):
                n = min(BANK, end - begin - c)
                total_sum = nl.ndarray((PARTITIONS, BANK), dtype=nl.float32, buffer=nl.psum)
                for j in range(count):
                    nisa.nc_matmul(
                        dst=total_sum[0:tokens, 0:n],
                        stationary=tile_of(operand, j, t, t + tokens),
                        moving=panel[j][0 : tile_rows(operand, j), c : c + n],
                        accumulate=j > 0,
                    )
                evict(out[0:tokens, c : c + n], total_sum[0:tokens, 0:n], t // PARTITIONS + c // BANK, silu)
            nisa.dma_copy(dst=y[start + t : start + t + tokens, begin:end], src=out[0:tokens, :])


def row_panel(operand, w, begin, end):
    """All tiles of W for some of its columns."""
    tiles = []
    for j in range(ceil_div(operand[2], PARTITIONS)):
        tiles.append(weight_tile(operand, w, j, begin, end))
    return tiles
