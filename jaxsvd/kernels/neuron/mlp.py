"""The gated MLP, down(silu(gate(x))·up(x)), with low-rank or dense projections, in one kernel or two.

gate and up share one load of x. Their product leaves with features on the partitions, which is how the down projection
wants its operand: nothing is transposed (NeuronMM's FusedMLP). In one kernel it never leaves the chip at all.
Emulator-verified, not run on Trainium.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from jaxsvd.kernels.neuron.products import add_each, column_sum, store_rows, strip, sums_per_bank
from jaxsvd.kernels.neuron.tiles import (
    BANK,
    BANKS,
    MAX_TOKENS,
    block_tokens,
    ceil_div,
    column_tiles,
    itemsize,
    load,
    weights_room,
)
from jaxsvd.kernels.neuron.xuv import check_features, token_axis

GATED_TOKENS = MAX_TOKENS // 2  # of a block: gate's sums and up's are in PSUM together


@nki.jit
def swiglu_xuv(x, u, v_gate=None, v_up=None, widths=(), x_layout="rows"):
    """silu(gate)·up of x.

    Args:
        x: (M, K), or as `x_layout` says (see `xuv.xuv`).
        u: (K, sum of widths), side by side the U (K, r) of gate and of up, or the whole (K, N) of a dense one.
        v_gate, v_up: V (r, N), None for a dense one.
        widths: of gate and of up, their columns of u.
        x_layout: how x lies.

    Returns:
        (128, ceil(N/128), M) in x's dtype: the layout "tiles" of `xuv.xuv`, zero behind feature N.
    """
    k, outputs = u.shape[0], inner_width(v_gate, widths[0])
    tokens = x.shape[token_axis(x_layout)]
    check_features(x, k, x_layout)
    check_members(u, v_gate, v_up, widths)
    n_tiles = ceil_div(outputs, 128)
    y = nl.ndarray((128, n_tiles, tokens), dtype=x.dtype, buffer=nl.shared_hbm)
    alive = ceil_div(k, 128) + strip_tiles(v_gate, v_up, widths)
    block = block_tokens(tokens, alive, alive, 0, x.dtype, GATED_TOKENS)
    for start in range(0, tokens, block):
        count = min(block, tokens - start)
        left = weights_room(count, alive, x.dtype)
        pairs = gate_and_up(load(x, x_layout, k, start, count), u, v_gate, v_up, widths, left)
        left -= 2 * 2 * BANK * itemsize(x.dtype)  # a panel's outputs on their way, and the next
        add_each(pairs, column_tiles(0, outputs), BANKS // 2, left, store_gated, (y, start, count))
    return y


@nki.jit
def mlp_xuv(x, u, u_down, v_gate=None, v_up=None, v_down=None, widths=(), x_layout="rows"):
    """The whole MLP, where a block of its activations fits SBUF (`block_tokens` asserts it).

    Args:
        x: (M, K), or as `x_layout` says (see `xuv.xuv`).
        u: (K, sum of widths), of gate and up as for `swiglu_xuv`.
        u_down: the down projection's U (N, r), or the whole (N, K') of a dense one.
        v_gate, v_up: V (r, N), None for a dense one.
        v_down: V (r, K'), None for a dense one.
        widths: of gate and of up, their columns of u.
        x_layout: how x lies.

    Returns:
        (M, K') in x's dtype.
    """
    k, inner = u.shape[0], inner_width(v_gate, widths[0])
    tokens = x.shape[token_axis(x_layout)]
    check_features(x, k, x_layout)
    check_members(u, v_gate, v_up, widths)
    assert u_down.shape[0] == inner, f"gate gives {inner} features, down takes {u_down.shape[0]}"
    rank = u_down.shape[1]
    dense_down = v_down == None  # NKI knows no `is`
    y = nl.ndarray((tokens, rank if dense_down else v_down.shape[1]), dtype=x.dtype, buffer=nl.shared_hbm)
    n_tiles, r_tiles = ceil_div(inner, 128), ceil_div(rank, 128)
    before = ceil_div(k, 128) + strip_tiles(v_gate, v_up, widths) + n_tiles
    after = n_tiles if dense_down else n_tiles + r_tiles
    block = block_tokens(tokens, max(before, after), after, n_tiles if dense_down else r_tiles, x.dtype, GATED_TOKENS)
    for start in range(0, tokens, block):
        count = min(block, tokens - start)
        left = weights_room(count, before, x.dtype)
        pairs = gate_and_up(load(x, x_layout, k, start, count), u, v_gate, v_up, widths, left)
        act = nl.ndarray((128, n_tiles, count), dtype=x.dtype, buffer=nl.sbuf)
        add_each(pairs, column_tiles(0, inner), BANKS // 2, left, keep_gated, act)
        operand = (act, 0, inner, count, False)
        left = weights_room(count, after, x.dtype)
        if dense_down:
            store_rows(operand, u_down, y, start, False, left)
        else:
            hidden = strip(operand, u_down, column_tiles(0, rank), left)
            store_rows((hidden, 0, rank, count, False), v_down, y, start, False, left)
    return y


def inner_width(v_gate, width):
    """The MLP's width."""
    return width if v_gate == None else v_gate.shape[1]


def strip_tiles(v_gate, v_up, widths):
    """Tiles of the rank strips of gate and up."""
    gate = 0 if v_gate == None else ceil_div(widths[0], 128)
    up = 0 if v_up == None else ceil_div(widths[1], 128)
    return gate + up


def check_members(u, v_gate, v_up, widths):
    """gate and up must fit u and each other."""
    assert len(widths) == 2 and widths[0] + widths[1] == u.shape[1], f"u has {u.shape[1]} columns, widths {widths}"
    gate, up = inner_width(v_gate, widths[0]), inner_width(v_up, widths[1])
    assert gate == up, f"gate gives {gate} features, up {up}"


def gate_and_up(x, u, v_gate, v_up, widths, room):
    """For gate and for up the operand and the matrix (k', N) whose product they are; low-rank ones share a strip."""
    middle, end = widths[0], widths[0] + widths[1]
    tiles = []
    if v_gate != None:
        tiles.extend(column_tiles(0, middle))
    up_first = len(tiles)
    if v_up != None:
        tiles.extend(column_tiles(middle, end))
    gate, up = (x, u[:, 0:middle]), (x, u[:, middle:end])
    if len(tiles) > 0:
        hidden = strip(x, u, tiles, room)
        if v_gate != None:
            gate = ((hidden, 0, widths[0], x[3], False), v_gate)
        if v_up != None:
            up = ((hidden, up_first, widths[1], x[3], False), v_up)
    return gate, up


def store_gated(target, first, panel, sums):
    """Store silu(gate)·up of a panel of features in y (128, tiles, M)."""
    y, start, tokens = target
    act = nl.ndarray((128, len(panel), tokens), dtype=y.dtype, buffer=nl.sbuf)
    keep_gated(act, 0, panel, sums)
    nisa.dma_copy(dst=y[:, first : first + len(panel), start : start + tokens], src=act)


def keep_gated(act, first, panel, sums):
    """silu(gate)·up of a panel of features into act [128, tiles, tokens] from tile `first`, zero behind its rows."""
    tokens = act.shape[2]
    width, _, pieces = sums_per_bank(tokens)
    for i in range(len(panel)):
        n = panel[i][1]
        if n < 128:
            nisa.memset(dst=act[:, first + i, :], value=0.0)
        for piece in range(pieces):
            begin, end = piece * width, min(tokens, piece * width + width)
            silu = nl.ndarray((128, end - begin), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=silu[0:n, :], op=nl.silu, data=column_sum(sums[0], tokens, i, n, piece))
            nisa.tensor_tensor(
                dst=act[0:n, first + i, begin:end],
                data1=silu[0:n, :],
                data2=column_sum(sums[1], tokens, i, n, piece),
                op=nl.multiply,
            )
