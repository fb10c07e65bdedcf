"""How the four warps of a warpgroup hold arrays in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu.shape import ROWS, WARPS

# How four warps hold a tile: of every 128 inputs 32 each, 16 bytes to a thread, as mma wants its B.
TILE = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, 128), (ROWS, 32), (8,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
# What mma gives: the sums (4, 8, ROWS) of the warps, two in a thread, or (4, 16, ROWS), twice as many.
PARTIAL = plgpu.Layout.TILED(plgpu.Tiling(((4, 8, ROWS), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
# Four rows of something, one to a warp.
APIECE = plgpu.Layout.TILED(plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def inputs(height: int) -> Any:
    """How four warps hold x: of all rows if there are several, else the one, which all lanes have that need it."""
    return TILE if height > 1 else TILE.reduce((0,))


def partial_sums(height: int) -> Any:
    """How they hold the sums of each of them: see `sums_shape`."""
    return PARTIAL if height > 1 else PARTIAL.reduce((1,))


def sums_shape(height: int) -> tuple[int, ...]:
    """(4, height, ROWS), or (4, ROWS) of one row."""
    return (WARPS, height, ROWS) if height > 1 else (WARPS, ROWS)


def strided(vector: int) -> Any:
    """How a warpgroup holds (n,), `vector` neighbours to a thread."""
    tiling = plgpu.Tiling(((128 * vector,), (32 * vector,), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def full(fill: float, shape: tuple[int, ...], layout: Any, dtype: Any = jnp.float32) -> jax.Array:
    """A constant in a layout."""
    return plgpu.layout_cast(jnp.full(shape, fill, dtype), layout)
