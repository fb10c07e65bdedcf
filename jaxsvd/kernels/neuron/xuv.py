"""Y = X·U·V in one kernel: the rank strip X·U never leaves the chip.

NeuronMM (arXiv 2510.25977) fuses the pair for Trainium; here all sums are in float32 PSUM, ragged sizes cost no
padding, and a few tokens have a way of their own. Emulator-verified, not run on Trainium.

M are tokens, K features, r the rank, N outputs. bfloat16, float16 or float32, all operands alike. For every block of
B tokens U and V are read once: HBM traffic is s·(M·K + M·N + ceil(M/B)·r·(K+N)) bytes for numbers of s bytes.
"""

import nki
import nki.language as nl

from jaxsvd.kernels.neuron.products import store_columns, store_rows, strip
from jaxsvd.kernels.neuron.tiles import MAX_TOKENS, block_tokens, ceil_div, column_tiles, load, weights_room


@nki.jit
def xuv(x, u, v, x_layout="rows", y_layout="rows", silu=False):
    """Multiply x by a low-rank matrix.

    Args:
        x: (M, K); with x_layout "columns" (K, M), with "tiles" (128, ceil(K/128), M), feature k at [k % 128, k // 128].
        u: (K, r).
        v: (r, N).
        x_layout: how x lies.
        y_layout: "rows" for (M, N), "columns" for (N, M).
        silu: whether to give silu(y).

    Returns:
        y in x's dtype.
    """
    k, rank = u.shape
    outputs, tokens = v.shape[1], x.shape[token_axis(x_layout)]
    assert v.shape[0] == rank, f"u has rank {rank}, v {v.shape[0]}"
    assert x.dtype == u.dtype and u.dtype == v.dtype, f"x is {x.dtype}, u {u.dtype}, v {v.dtype}: expected one dtype"
    check_features(x, k, x_layout)
    assert y_layout == "rows" or y_layout == "columns", f"y_layout is {y_layout}: expected rows or columns"
    shape = (tokens, outputs) if y_layout == "rows" else (outputs, tokens)
    y = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    k_tiles, r_tiles = ceil_div(k, 128), ceil_div(rank, 128)
    block = block_tokens(tokens, k_tiles + r_tiles, r_tiles, r_tiles, x.dtype, MAX_TOKENS)
    for start in range(0, tokens, block):
        count = min(block, tokens - start)
        operand = load(x, x_layout, k, start, count)
        hidden = strip(operand, u, column_tiles(0, rank), weights_room(count, k_tiles + r_tiles, x.dtype))
        left = weights_room(count, r_tiles, x.dtype)
        if y_layout == "rows":
            store_rows((hidden, 0, rank, count, False), v, y, start, silu, left)
        else:
            store_columns((hidden, 0, rank, count, False), v, y, start, silu, left)
    return y


@nki.jit
def xuv_group(x, u, v0=None, v1=None, v2=None, widths=(), x_layout="rows"):
    """Multiply x by up to three matrices at once, each low-rank or dense (q, k and v; gate and up).

    Args:
        x: (M, K), or as `x_layout` says (see `xuv`).
        u: (K, sum of widths), side by side the U (K, r) of low-rank members and the whole (K, N) of dense ones.
        v0, v1, v2: the V (r, N) of each member, None for a dense one.
        widths: of every member, its columns of u.
        x_layout: how x lies.

    Returns:
        y (M, N) of every member, in x's dtype; of a single one no tuple.
    """
    k = u.shape[0]
    tokens = x.shape[token_axis(x_layout)]
    check_features(x, k, x_layout)
    seconds = [v0, v1, v2]
    ys, tiles, firsts, begin, row_tiles = [], [], [], 0, 0
    for i in range(len(widths)):
        v = seconds[i]
        firsts.append(len(tiles))
        if v == None:  # NKI knows no `is`
            outputs, inner = widths[i], k
        else:
            assert v.shape[0] == widths[i], f"member {i}: u has rank {widths[i]}, v {v.shape[0]}"
            tiles.extend(column_tiles(begin, begin + widths[i]))
            outputs, inner = v.shape[1], widths[i]
        ys.append(nl.ndarray((tokens, outputs), dtype=x.dtype, buffer=nl.shared_hbm))
        row_tiles = max(row_tiles, ceil_div(inner, 128))
        begin += widths[i]
    assert begin == u.shape[1], f"u has {u.shape[1]} columns, widths {begin}"
    alive = ceil_div(k, 128) + len(tiles)
    block = block_tokens(tokens, alive, alive, row_tiles, x.dtype, MAX_TOKENS)
    for start in range(0, tokens, block):
        count = min(block, tokens - start)
        operand = load(x, x_layout, k, start, count)
        left = weights_room(count, alive, x.dtype)
        hidden = strip(operand, u, tiles, left) if len(tiles) > 0 else operand[0]
        begin = 0
        for i in range(len(widths)):
            if seconds[i] == None:
                store_rows(operand, u[:, begin : begin + widths[i]], ys[i], start, False, left)
            else:
                store_rows((hidden, firsts[i], widths[i], count, False), seconds[i], ys[i], start, False, left)
            begin += widths[i]
    if len(ys) == 1:
        return ys[0]
    if len(ys) == 2:
        return ys[0], ys[1]
    return ys[0], ys[1], ys[2]


def token_axis(layout):
    """Which axis of x counts tokens."""
    assert layout == "rows" or layout == "columns" or layout == "tiles", f"no layout is called {layout}"
    if layout == "rows":
        return 0
    return 1 if layout == "columns" else 2


def check_features(x, k, layout):
    """x must have k features."""
    if layout == "tiles":
        assert x.shape[0] == 128 and x.shape[1] == ceil_div(k, 128), f"x is {x.shape}: u has {k} inputs"
    else:
        found = x.shape[1 - token_axis(layout)]
        assert found == k, f"x has {found} features, u {k}"
