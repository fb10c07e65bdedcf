import numpy as np
import pytest

from jaxsvd.compression.methods import Metric, Moment
from jaxsvd.compression.width import RIDGE, kept_neurons, removal_order, repaired, ridged

WIDTH, HIDDEN = 40, 12


@pytest.fixture
def z(rng):
    """Neurons of which some nearly repeat others and some hardly speak."""
    z = rng.standard_normal((500, WIDTH))
    z[:, 30:] = z[:, :10] @ rng.standard_normal((10, 10)) + 0.01 * rng.standard_normal((500, 10))
    z[:, 10:15] *= 0.01
    return z


def moment(z):
    return Moment(z.T @ z / len(z))


def test_repair_is_least_squares(z, rng):
    weight, kept = rng.standard_normal((HIDDEN, WIDTH)), np.arange(5, 35)
    found = repaired(weight, moment(z), kept, RIDGE)
    want = np.linalg.lstsq(z[:, kept], z @ weight.T, rcond=None)[0].T

    def error(smaller):
        return np.square(z @ weight.T - z[:, kept] @ smaller.T).sum()

    assert error(want) <= error(found) <= 1.01 * error(want) + 0.05 * np.square(z @ weight.T).sum()
    assert error(found) < 0.2 * error(weight[:, kept])
    assert error(found) < error(repaired(weight, moment(z), kept)) < 0.5 * error(weight[:, kept])


def test_neurons_that_others_can_replace_leave_first(z, rng):
    weight = rng.standard_normal((HIDDEN, WIDTH))
    order, losses = removal_order(weight, Metric(), moment(z))
    assert sorted(order) == list(range(WIDTH))
    early = set(order[:15])
    assert {10, 11, 12, 13, 14} <= early, "the quiet ones"
    assert len(early & (set(range(10)) | set(range(30, 40)))) == 10, "one of each pair that says the same"
    assert losses[WIDTH] == 0 and (np.diff(losses) <= 1e-12).all()


@pytest.mark.parametrize("diagonal", [False, True])
def test_predicted_losses_are_those_after_repair(z, rng, diagonal):
    weight = rng.standard_normal((HIDDEN, WIDTH))
    left = np.linspace(0.1, 3, HIDDEN) if diagonal else np.triu(rng.standard_normal((HIDDEN, HIDDEN)))
    metric = Metric(left=left)
    order, losses = removal_order(weight, metric, moment(z))
    assert kept_neurons(order, 7).tolist() == sorted(order[-7:])
    for width in (35, 25, 20, 10):
        kept = kept_neurons(order, width)
        smaller = np.zeros_like(weight)
        smaller[:, kept] = repaired(weight, moment(z), kept, RIDGE)  # that of the prediction
        error = metric.times_left(weight - smaller)
        assert losses[width] == pytest.approx(np.vdot(error @ ridged(moment(z).matrix), error), rel=1e-6)


def test_large_layers_leave_in_batches(rng):
    z = rng.standard_normal((2000, 400)) * np.linspace(0.1, 1, 400)
    order, losses = removal_order(rng.standard_normal((8, 400)), Metric(), moment(z))
    assert sorted(order) == list(range(400)) and (np.diff(losses) <= 1e-9).all()
    assert order[:130].mean() < 110, "the quiet ones first"
