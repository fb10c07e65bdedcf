"""What the broken kernels are made of."""

import nki.isa as nisa
import nki.language as nl


def loaded(source):
    """A tile of SBUF with a copy of an HBM tensor."""
    tile = nl.ndarray(source.shape, dtype=source.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source)
    return tile


def stored(tile):
    """An output with a copy of a tile of SBUF."""
    y = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=y, src=tile)
    return y


def psum(columns=512, dtype=nl.float32):
    """A tile of PSUM."""
    return nl.ndarray((128, columns), dtype=dtype, buffer=nl.psum)


def evicted(sums):
    """An output with a copy of a tile of PSUM."""
    tile = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=sums)
    return stored(tile)
