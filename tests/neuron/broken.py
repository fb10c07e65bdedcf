"""Kernels that each break one rule of memory, views or Python, and otherwise none: test_emulator_rules.py says which.

All take x (128, 512) and w (128, 128) in bfloat16. Where a rule holds on some targets only, the kernel runs on the
others.
"""

import nki
import nki.isa as nisa
import nki.language as nl
from parts import evicted, loaded, psum, stored

# Views


@nki.jit
def slice_too_long(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[0:200, :])
    return stored(tile)


@nki.jit
def slice_empty(x, w):
    return stored(loaded(x[:, 512:512]))


@nki.jit
def dynamic_slice_too_long(x, w):
    return stored(loaded(x[:, nl.ds(500, 20)]))


@nki.jit
def index_too_large(x, w):
    return stored(loaded(x)[:, 512])


@nki.jit
def index_too_many(x, w):
    return stored(loaded(x)[:, :, 0])


@nki.jit
def partitions_reshaped(x, w):
    return stored(loaded(x).reshape((64, 1024)))


@nki.jit
def partitions_permuted(x, w):
    return stored(loaded(x).permute((1, 0)))


@nki.jit
def reshape_of_a_gap(x, w):
    return stored(loaded(x)[:, 0:510:2].reshape((128, 51, 5)))


@nki.jit
def flatten_of_a_permutation(x, w):
    return stored(loaded(x).reshape((128, 8, 64)).permute((0, 2, 1)).flatten_dims(1, 2))


@nki.jit
def write_to_a_broadcast(x, w):
    tile = nl.ndarray((128, 1), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile.broadcast(1, 512), src=x)
    return stored(tile)


# Memory


@nki.jit
def buffer_by_string(x, w):
    return stored(nl.ndarray((128, 512), dtype=x.dtype, buffer="sbuf"))


@nki.jit
def too_many_partitions(x, w):
    return stored(nl.ndarray((256, 4), dtype=x.dtype, buffer=nl.sbuf))


@nki.jit
def one_dimension_on_chip(x, w):
    return stored(nl.ndarray((128,), dtype=x.dtype, buffer=nl.sbuf))


@nki.jit
def tile_beyond_a_trn1(x, w):
    tile = nl.ndarray((128, 200 * 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=0.0)
    return stored(tile)


@nki.jit
def tiles_beyond_sbuf(x, w):
    tiles = []
    for _ in range(4):
        tile = nl.ndarray((128, 64 * 512), dtype=x.dtype, buffer=nl.sbuf)
        nisa.memset(dst=tile, value=0.0)
        tiles.append(tile)
    y = nl.ndarray((4, 128, 64 * 512), dtype=x.dtype, buffer=nl.shared_hbm)
    for i in range(4):
        nisa.dma_copy(dst=y[i], src=tiles[i])
    return y


@nki.jit
def nine_banks(x, w):
    moving, stationary, banks = loaded(x), loaded(w), []
    for _ in range(9):
        sums = psum()
        nisa.nc_matmul(dst=sums, stationary=stationary, moving=moving)
        banks.append(sums)
    y = nl.ndarray((9, 128, 512), dtype=nl.float32, buffer=nl.shared_hbm)
    for i in range(9):
        tile = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=tile, src=banks[i])
        nisa.dma_copy(dst=y[i], src=tile)
    return y


@nki.jit
def psum_tile_of_nine_banks(x, w):
    return evicted(psum(9 * 512))


@nki.jit
def read_of_nothing(x, w):
    return stored(nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf))


@nki.jit
def read_beyond_the_edge(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile[0:100, :], src=x[0:100, :])
    return stored(tile[0:128, 3:4])


@nki.jit
def read_between_columns(x, w):
    tile = nl.ndarray((128, 8, 64), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile[:, 0:8:2, :], src=x[:, 0:256])
    return stored(tile.permute((0, 2, 1))[:, 5, 2:4])


@nki.jit
def start_at_partition_16(x, w):
    tile = loaded(x)
    nisa.memset(dst=tile[16:32, :], value=0.0)
    return stored(tile)


@nki.jit
def start_at_partition_32(x, w):
    tile = loaded(x)
    nisa.memset(dst=tile[32:96, :], value=0.0)
    return stored(tile)


@nki.jit
def write_to_an_input(x, w):
    nisa.dma_copy(dst=x[:, 0:128], src=loaded(w))
    return stored(loaded(x))


# Outputs


@nki.jit
def output_on_chip(x, w):
    return loaded(x)


@nki.jit
def output_in_private_hbm(x, w):
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.private_hbm)
    nisa.dma_copy(dst=y, src=x)
    return y


@nki.jit
def output_of_nothing(x, w):
    nisa.memset(dst=nl.ndarray(w.shape, dtype=w.dtype, buffer=nl.sbuf), value=0.0)


@nki.jit
def output_with_a_hole(x, w):
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=y[:, 0:511], src=x[:, 0:511])
    return y


@nki.jit
def output_cut(x, w):
    return stored(loaded(x))[0:64]


# Python


@nki.jit
def masked(x, w):
    tile = nl.ndarray((128, 512), dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x, mask=True)
    return stored(tile)


@nki.jit
def calls_a_kernel(x, w):
    return output_on_chip(x, w)


@nki.jit
def unknown_instruction(x, w):
    nisa.iota(loaded(x), [[1, 512]])


@nki.jit
def unknown_name(x, w):
    return nl.mgrid[0:128, 0:512]


@nki.jit
def unknown_keyword(x, w):
    nisa.tensor_copy(dst=loaded(x), src=loaded(x), negate=True)


@nki.jit
def unknown_dtype(x, w):
    return nl.ndarray((128, 4), dtype=nl.int32, buffer=nl.sbuf)


@nki.jit
def unknown_view(x, w):
    return loaded(x).ap([[512, 128], [1, 512]])


@nki.jit
def steps_over_partitions(x, w):
    return stored(loaded(x)[0:128:2, :])


@nki.jit
def adds_in_python(x, w):
    return loaded(x) + loaded(x)


@nki.jit
def adds_by_language(x, w):
    return nl.add(loaded(x), loaded(x))


@nki.jit
def assigns_elements(x, w):
    tile = loaded(x)
    tile[:, 0:128] = loaded(w)
    return stored(tile)


@nki.jit
def places_a_tensor(x, w):
    return stored(nl.ndarray((128, 4), dtype=x.dtype, buffer=nl.sbuf, address=(0, 0)))
