"""The closed forms, against what they promise. Products are compared, not factors, which are unique up to rotation."""

import numpy as np
import pytest

from jaxsvd.compression.methods import METHODS, Evidence, Metric, Moment, factor, losses, tails

INPUTS = 24


@pytest.fixture
def x(rng):
    """Correlated inputs of very different scale, one channel dead."""
    x = rng.standard_normal((300, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS)) * np.logspace(0, -3, INPUTS)
    x[:, 5] = 0
    return x


def moment(samples):
    return Moment(samples.T @ samples / len(samples))


def evidence(x, gradients):
    return Evidence(moment(x), np.abs(x).mean(0), moment(gradients), np.square(gradients).mean(0) + 0.1)


@pytest.mark.parametrize("outputs", [12, 24, 60])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_plain_svd_loses_the_discarded_singular_values(rng, outputs, rank):
    weight = rng.standard_normal((outputs, INPUTS)).astype(np.float32)
    found = factor(weight, METHODS["svd"].metric(Evidence()), rank)
    assert found.up.shape == (outputs, rank) and found.down.shape == (rank, INPUTS)
    singular = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    want = np.sqrt(np.square(singular[rank:]).sum())
    assert np.linalg.norm(weight - found.up @ found.down) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("outputs", [12, 24, 60])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_whitening_loses_the_discarded_whitened_singular_values(x, rng, outputs, rank):
    weight = rng.standard_normal((outputs, INPUTS)).astype(np.float32)
    found = factor(weight, METHODS["svd-llm"].metric(Evidence(moment(x))), rank)
    # Eckart-Young on these inputs: the tail of the singular values of the outputs.
    singular = np.linalg.svd(x @ weight.T.astype(np.float64), compute_uv=False)
    want = np.sqrt(np.square(singular[rank:]).sum())
    assert np.linalg.norm(x @ (weight - found.up @ found.down).T) == pytest.approx(want, rel=1e-4)


def explicit(weight, left, right, rank):
    """T⁻¹·(the truncated SVD of T·W·S)·S⁻¹, by explicit inverses."""
    u, s, vt = np.linalg.svd(left @ weight @ right, full_matrices=False)
    return np.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(right)


@pytest.mark.parametrize("outputs", [12, 60])
def test_each_method_is_its_published_form(rng, outputs):
    """The papers' formulas, with the inverses that ours avoid; inputs without a dead channel, for these to exist."""
    x = rng.standard_normal((400, INPUTS)) * np.logspace(0, -1, INPUTS)
    g = rng.standard_normal((500, outputs)) @ rng.standard_normal((outputs, outputs))
    weight, known, rank = rng.standard_normal((outputs, INPUTS)), evidence(x, g), 7
    eye_in, eye_out = np.eye(INPUTS), np.eye(outputs)
    c, gg = known.inputs.matrix, known.gradients.matrix
    ridged_c = 0.95 * c + 0.05 * np.trace(c) / INPUTS * eye_in
    ridged_g = 0.97 * gg + 0.03 * np.trace(gg) / outputs * eye_out
    published = {
        "svd": (eye_out, eye_in),
        "fwsvd": (np.diag(np.sqrt(known.fisher)), eye_in),
        "asvd": (eye_out, np.diag(np.sqrt(known.magnitudes))),
        "svd-llm": (eye_out, np.linalg.cholesky(c)),
        "kfac": (np.linalg.cholesky(ridged_g).T, np.linalg.cholesky(ridged_c)),
    }
    assert published.keys() == METHODS.keys()
    for name, (left, right) in published.items():
        found = factor(weight, METHODS[name].metric(known), rank)
        np.testing.assert_allclose(found.up @ found.down, explicit(weight, left, right, rank), atol=1e-8, err_msg=name)


def test_factors_are_nested_and_of_one_scale(x, rng):
    weight, known = rng.standard_normal((20, INPUTS)), evidence(x, rng.standard_normal((99, 20)))
    whole, part = (factor(weight, known.loss_metric, rank) for rank in (12, 5))
    np.testing.assert_allclose(whole.up[:, :5] @ whole.down[:5], part.up @ part.down, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(whole.up, axis=0), np.linalg.norm(whole.down, axis=1), rtol=1e-9)


@pytest.mark.parametrize("outputs", [12, 60])
@pytest.mark.parametrize("diagonal", [False, True])
def test_predicted_losses_are_those_of_the_products(x, rng, outputs, diagonal):
    """Of any method's factors in the loss's metric; and of its own, the tails."""
    g = rng.standard_normal((200, outputs)) * np.logspace(0, 2, outputs)
    known = evidence(x, g)
    if diagonal:
        known.gradients = Moment(np.diag(known.gradients.matrix))
    weight, metric = rng.standard_normal((outputs, INPUTS)), known.loss_metric
    whitener = np.diag(metric.left) if diagonal else metric.left
    for name in METHODS:
        found = factor(weight, METHODS[name].metric(known), 9)
        want = []
        for rank in range(10):
            error = whitener @ (weight - found.up[:, :rank] @ found.down[:rank])
            want.append(np.vdot(error @ metric.right.matrix, error))
        np.testing.assert_allclose(losses(weight, found, metric), want, rtol=1e-7, err_msg=name)
    own = factor(weight, metric, 9)
    np.testing.assert_allclose(tails(own.energies, 9), losses(weight, own, metric), rtol=1e-6)


def test_every_method_is_best_in_its_own_metric(x, rng):
    weight, known = rng.standard_normal((20, INPUTS)), evidence(x + 0.01, rng.standard_normal((99, 20)) * np.arange(20))
    for name, method in METHODS.items():
        metric = method.metric(known)
        costs = {
            other: losses(weight, factor(weight, rival.metric(known), 6), metric)[6] for other, rival in METHODS.items()
        }
        assert costs[name] == pytest.approx(min(costs.values()), rel=1e-6), (name, costs)


def test_shrinking_keeps_the_power(x):
    c = moment(x)
    np.testing.assert_allclose(np.diag(c.shrunk(0.3).matrix), Moment(np.diag(c.matrix)).shrunk(0.3).matrix)
    assert np.trace(c.shrunk(0.3).matrix) == pytest.approx(np.trace(c.matrix))
    assert np.linalg.eigvalsh(c.shrunk(0.3).matrix)[0] > 0


def test_a_metric_of_nothing_is_the_identity(rng):
    weight = rng.standard_normal((6, 9))
    assert losses(weight, factor(weight, Metric(), 6), Metric())[6] == pytest.approx(0, abs=1e-9)
