"""How work is divided among the blocks of the GPU kernel's grid."""

import numpy as np
import pytest

from jaxsvd.kernels.gpu.shape import Group, shares


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize(
    ("widths", "costs"),
    [
        ((1264, 592, 592), (416, 224, 224)),
        ((5,), (3,)),
        ((0, 320, 0), (7, 20, 9)),
        ((28672, 28672), (1792, 1792)),  # whose total times the blocks is more than an int32 holds
        ((0,), (1,)),
    ],
)
def test_blocks_share_everything_once_and_evenly(widths, costs, blocks):
    edges = np.array([[tuple(map(int, edge)) for edge in shares(widths, costs, b, blocks)] for b in range(blocks)])
    firsts, lasts = edges[..., 0], edges[..., 1]
    np.testing.assert_array_equal(firsts[0], 0)
    np.testing.assert_array_equal(lasts[-1], widths)
    np.testing.assert_array_equal(lasts[:-1], firsts[1:])
    load = ((lasts - firsts) * np.array(costs)).sum(axis=1)
    assert load.max() - sum(np.multiply(widths, costs)) / blocks <= len(costs) * max(costs)


@pytest.mark.parametrize(("outputs", "rows"), [((4096, 1024, 1024), False), ((9728, 9728), True), ((2560,), False)])
def test_wide_groups_are_divided_by_rows(outputs, rows):
    group = Group(2560, outputs, (64,) * len(outputs), (64,) * len(outputs))
    assert group.by_rows == rows
    assert bool(group.strips) == rows
    assert (group.strip(132) == 0) == rows
