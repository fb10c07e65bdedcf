"""The rules of logit matching, on logits made by hand."""

import numpy as np
import pytest

from jaxsvd.errors import UsageError
from jaxsvd.evaluate.matching import TOLERANCES, Tolerance, compare, match, tolerance_of, tolerances_of_map

EVERY = (Tolerance(None, 0.0, 0.01),)
VOCAB = 2000
EXPECTED = np.linspace(-8, 10, VOCAB).astype(np.float32)[np.random.default_rng(0).permutation(VOCAB)]
INF = np.float32(np.inf)


def verdict(expected, actual, tolerances=EVERY, divergence=0.001):
    """Whether one token passes, by the rules that it breaks."""

    def follow(prompts, count, choose):
        yield np.asarray(actual, np.float32)[None]

    found = match(follow, [[1]], np.asarray(expected, np.float32)[None, None], tolerances, divergence)
    assert found.passed == (not list(found.failures()))
    return [failure.rule for failure in found.failures()]


def changed(at, by, values=EXPECTED):
    """The logits with one of them, the `at`-th greatest, changed."""
    actual = values.copy()
    actual[np.argsort(-values)[at]] += by
    return actual


def test_equal_logits_pass_with_no_tolerance_at_all():
    assert verdict(EXPECTED, EXPECTED, [Tolerance(k, 0.0, 0.0) for k in (1, 5, None)], 0.0) == []


@pytest.mark.parametrize("shift", [0.5, -30.0])
def test_a_shift_alone_passes(shift):
    assert verdict(EXPECTED, EXPECTED + np.float32(shift)) == []
    assert compare(EXPECTED, EXPECTED + np.float32(shift), EVERY).shift == pytest.approx(shift, rel=1e-4)


def test_a_scale_fails():
    assert verdict(EXPECTED, EXPECTED * np.float32(1.02)) == ["all"]
    assert verdict(EXPECTED, EXPECTED * np.float32(1.005)) == []  # 0.5 % of 10 over 10


def test_only_the_shift_of_the_fit_is_removed():
    """actual = 1.02·expected + 3: b is 3, and the error that remains is 2 % of the greatest logit."""
    found = compare(EXPECTED, EXPECTED * np.float32(1.02) + 3, EVERY)
    assert found.shift == pytest.approx(3, rel=1e-4)
    assert found.errors[0] == pytest.approx(0.02, rel=1e-3)
    assert found.worst[0] == EXPECTED.argmax()


def test_minus_infinity_on_either_side_is_masked():
    expected, actual = EXPECTED.copy(), EXPECTED.copy() + 1
    low = np.argsort(EXPECTED)
    expected[low[3]] = actual[low[7]] = -INF
    assert verdict(expected, actual) == []
    found = compare(expected, actual, EVERY)
    assert found.shift == pytest.approx(1, rel=1e-4) and found.errors[0] < 1e-5
    actual[low[9]] += 1
    assert verdict(expected, actual) == ["all"]  # the others still count


def test_masked_tokens_leave_their_place_in_the_top_k_to_the_next():
    order = np.argsort(-EXPECTED)
    actual = changed(5, -1.0)
    rule = [Tolerance(5, 0.0, 0.01)]
    assert verdict(EXPECTED, actual, rule) == []
    actual[order[2]] = -INF
    assert verdict(EXPECTED, actual, rule) == ["5"]


def test_what_is_not_expected_at_all_is_not_the_likeliest():
    """As a reference that may not end its text has it."""
    expected, actual = EXPECTED.copy(), changed(7, 20.0)
    assert verdict(expected, actual, [Tolerance(5, 0.0, 1.0)]) == ["divergence"]
    expected[np.argsort(-EXPECTED)[7]] = -INF
    assert verdict(expected, actual) == []


def test_the_likeliest_token_at_minus_infinity_is_no_near_tie():
    actual = EXPECTED.copy()
    actual[EXPECTED.argmax()] = -INF
    assert verdict(EXPECTED, actual, divergence=1e9) == ["divergence"]
    assert verdict(np.full(4, -INF), np.zeros(4), divergence=1e9) == ["all"]  # nothing is left to compare


def test_k_takes_the_greatest_expected_logits():
    for at, broken in ((0, "1 5 all"), (4, "5 all"), (5, "all"), (VOCAB - 1, "all")):
        rules = [Tolerance(k, 0.0, 0.01) for k in (1, 5, None)]
        by = 1.0 if at == 0 else -1.0  # the likeliest token stays the same
        assert verdict(EXPECTED, changed(at, by), rules) == broken.split()
    # Of the greatest actual logits, this one would be the second.
    assert verdict(EXPECTED, changed(1000, 10.0), [Tolerance(5, 0.0, 0.01)], 1e9) == []


def test_a_k_beyond_the_vocabulary_is_all_of_it():
    actual = changed(VOCAB - 1, -1.0)
    many, every = (compare(EXPECTED, actual, [Tolerance(k, 0.0, 0.01)]).errors for k in (10 * VOCAB, None))
    assert many == every and many[0] > 0.05


def test_the_error_is_over_the_greatest_of_the_same_k():
    expected = np.array([4.0, 2.0, -40.0, 1.0, 0.0], np.float32)
    actual = expected + np.array([0, 0.1, 0, -0.1, 0], np.float32)
    top, every = compare(expected, actual, [Tolerance(2, 0.0, 0.01), Tolerance(None, 0.0, 0.01)]).errors
    assert top == pytest.approx(0.1 / 4, rel=0.05)
    assert every == pytest.approx(0.1 / 40, rel=0.05)


def test_atol_is_subtracted_before_the_division():
    actual = changed(1, -0.5)  # over 10
    for atol, expected in ((0.0, 0.05), (0.3, 0.02), (0.6, 0.0)):
        assert compare(EXPECTED, actual, [Tolerance(5, atol, 0.01)]).errors[0] == pytest.approx(expected, abs=2e-4)


def test_the_comparison_is_strict_where_older_builds_round():
    """An error of 0.0241 rounds to 0.02 in the digits of a bound of 0.02: the older builds let it pass."""
    actual = changed(1, -0.241)
    assert round(compare(EXPECTED, actual, EVERY).errors[0], 2) == 0.02
    assert verdict(EXPECTED, actual, [Tolerance(5, 0.0, 0.02)]) == ["5"]
    assert verdict(EXPECTED, actual, [Tolerance(5, 0.0, 0.0245)]) == []


@pytest.mark.parametrize(("tolerance", "broken"), [(0.0052, []), (0.005, ["divergence"]), (0.0, ["divergence"])])
def test_a_tie_within_the_tolerance_passes(tolerance, broken):
    expected = np.array([5.0, 5.5, 1.0, 0.0], np.float32)  # far apart here: only the actual gap counts
    actual = np.array([5.505126953125, 5.5, 1.0, 0.0], np.float32)  # 0.00513
    loose = [Tolerance(None, 0.0, 1.0)]
    assert verdict(expected, actual, loose, tolerance) == broken
    shifted = compare(expected, actual + 64, loose)
    assert shifted.gap == pytest.approx(0.005127, abs=1e-5) and (shifted.expected, shifted.actual) == (1, 0)


def test_the_gap_must_be_below_the_tolerance_not_at_it():
    expected, actual = np.array([1.0, 2.0, 0.0]), np.array([2.5, 2.0, 0.0])
    loose = [Tolerance(None, 0.0, 9.0)]
    assert verdict(expected, actual, loose, 0.5) == ["divergence"]
    assert verdict(expected, actual, loose, 0.500001) == []


def test_zero_logits_are_no_division():
    rules = [Tolerance(None, 0.0, 1e9)]
    assert verdict(np.zeros(4), np.zeros(4), rules) == []
    assert compare(np.zeros(4), np.array([0.0, 0, 0, -3]), rules).errors == (np.inf,)


# The text of several tokens.


def as_logits(tokens, vocab=8):
    """Logits (batch, tokens, vocab) whose likeliest are these tokens."""
    return np.eye(vocab, dtype=np.float32)[np.asarray(tokens)] * 4


class Script:
    """A model that prefers its own text, whatever it is given, and writes down what that was."""

    def __init__(self, tokens):
        self.logits, self.given = as_logits(tokens), []

    def __call__(self, prompts, count, choose):
        for i in range(count):
            self.given.append(np.array(choose(i, self.logits[:, i])).tolist())
            yield self.logits[:, i]


LOOSE = [Tolerance(None, 0.0, 10.0)]


def test_a_divergence_restarts_behind_its_index_with_the_expected_text():
    expected = [[1, 2, 3, 4, 5], [6, 5, 4, 3, 2]]
    script = Script([[1, 2, 7, 4, 5], [6, 5, 4, 3, 1]])
    found = match(script, [[0], [0]], as_logits(expected), LOOSE, 0.001)
    assert found.restarts == (3,)  # the divergence at 2 is itself checked; that of the last token restarts nothing
    assert script.given == np.transpose(expected).tolist()
    failures = [(failure.prompt, failure.position, failure.rule, failure.token) for failure in found.failures()]
    assert failures == [(0, 2, "divergence", 7), (1, 4, "divergence", 1)]
    assert [len(row) for row in found.tokens] == [5, 5]  # every token is checked


def test_every_divergence_restarts():
    found = match(Script([[7, 2, 7, 7, 5]]), [[0]], as_logits([[1, 2, 3, 4, 5]]), LOOSE, 9.0)
    assert found.restarts == (1, 3, 4)
    assert found.passed  # all of them near-ties, by this tolerance


def test_failures_come_in_the_order_of_the_text():
    script = Script([[1, 2, 7], [7, 7, 7]])
    found = match(script, [[0], [0]], as_logits([[1, 2, 3], [1, 2, 3]]), LOOSE, 0.001)
    assert [(f.position, f.prompt) for f in found.failures()] == [(0, 1), (1, 1), (2, 0), (2, 1)]


# What tolerances are called.


def test_tolerances_are_read():
    assert tolerance_of("5:1e-5:0.01") == TOLERANCES[0]
    assert tolerance_of("all:1e-5:0.05") == TOLERANCES[-1]
    seed = tolerances_of_map("{5: (1e-5, 0.02)}")
    assert seed == [Tolerance(5, 1e-5, 0.02)]
    every = "{None: (1e-5, 0.05), 1000: (1e-5, 0.03), 50: [1e-5, 0.02], 5: (1e-5, 0.01)}"
    assert set(tolerances_of_map(every)) == set(TOLERANCES)
    assert tolerances_of_map(' {"all": (0, 1)}') == [Tolerance(None, 0.0, 1.0)]


@pytest.mark.parametrize("text", ["5", "5:1e-5", "x:1:1", "0:1:1", "-5:1:1", "5:-1:1", "5:nan:1", "5:1:inf", "1:2:3:4"])
def test_other_tolerances_are_refused(text):
    with pytest.raises(UsageError, match=r"expected (K:ATOL:RTOL|a K of at least 1)"):
        tolerance_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "{5: 0.1}",
        "{5: (1,)}",
        "{5: ('1', 1)}",
        "{'5': (1, 1)}",
        "{True: (1, 1)}",
        "{5: (1, -1)}",
        "{5.0: (1, 1)}",
        "{5: (1, 1e999)}",
        "{5: (True, 1)}",
        "{5: (1e-5, __import__)}",
        "(" * 5000,
        "__import__('os').system('true')",
    ],
    ids=lambda text: text[:20],
)
def test_other_maps_are_refused_and_none_is_evaluated(text, monkeypatch):
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(UsageError, match="expected a"):
        tolerances_of_map(text)
