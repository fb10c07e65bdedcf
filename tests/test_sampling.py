"""Sampling against NumPy with plain sorting, and against transformers' logits processors."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsvd.errors import UsageError
from jaxsvd.sampling import (
    GENERATED,
    NOT_FINITE,
    PROMPT,
    Mode,
    SamplingParams,
    _truncate,
    first_largest,
    mode_of,
    per_row,
    sample,
    sampler_of,
)

truncate = jax.jit(_truncate)
jitted_sample = jax.jit(sample, static_argnums=4)


def draw(logits, rows, positions=0, seen=None, mode=None):
    """Tokens and `seen` for logits (batch, vocab)."""
    logits = np.asarray(logits, np.float32)
    positions = np.broadcast_to(np.asarray(positions, np.int32), len(rows))
    return jitted_sample(logits, sampler_of(rows), positions, seen, mode or mode_of(rows))


# Greedy.


@pytest.mark.parametrize("vocab", [5, 128, 50000])
def test_greedy_takes_the_first_largest(rng, vocab):
    logits = rng.standard_normal((4, vocab)).astype(np.float32)
    logits[1, [2, 4]] = logits[1].max() + 1  # a tie
    logits[2] = 3.0  # all equal
    logits[3] = -np.inf
    logits[3, -1] = -1e30
    tokens, seen = draw(logits, [SamplingParams()] * 4)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert list(tokens[1:]) == [2, 0, vocab - 1]
    assert (tokens.dtype, seen) == (jnp.int32, None)
    np.testing.assert_array_equal(first_largest(jnp.asarray(logits)), logits.argmax(-1))


def test_greedy_rows_ignore_the_random_ones(rng):
    logits = rng.standard_normal((2, 100))
    greedy = SamplingParams(top_k=3, top_p=0.1, min_p=0.5, seed=7)
    tokens, _ = draw(logits, [greedy, SamplingParams(temperature=5.0)])
    assert tokens[0] == logits[0].argmax()


# The masks.


def reference_mask(logits, params):
    """The tokens of one row that transformers' warpers keep, and those that float32 may decide either way.

    Ties are kept or dropped together, where transformers' sort lets their order decide.
    """
    scores = logits.astype(np.float64) / params.temperature
    scores -= scores.max()
    kept, unsure = np.isfinite(scores), np.zeros(scores.shape, bool)
    order = np.argsort(-scores, kind="stable")
    if 0 < params.top_k < scores.size:
        kept &= scores >= scores[order[params.top_k - 1]]
    if params.top_p < 1:
        mass = np.where(kept, np.exp(scores), 0)
        mass /= mass.sum()
        reached = np.cumsum(mass[order])
        last = {scores[order[np.argmax(reached >= bound)]] for bound in params.top_p + np.array([-1e-5, 0, 1e-5])}
        unsure |= (scores >= min(last)) & (scores < max(last)) if params.top_p + 1e-5 < 1 else scores < max(last)
        kept &= scores >= scores[order[np.argmax(reached >= min(params.top_p, reached[-1]))]]
    if params.min_p > 0:
        bound = np.log(params.min_p)
        unsure |= np.abs(scores - bound) < 1e-5
        kept &= scores >= bound
    return kept, unsure


ROWS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=1),
    SamplingParams(temperature=1.3, top_k=40),
    SamplingParams(temperature=1.0, top_k=10**6),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=0.05),
    SamplingParams(temperature=1.0, top_p=0.999),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.5, min_p=1.0),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=1.5, top_k=3, top_p=0.5),
]


@pytest.mark.parametrize("vocab", [5, 128, 50000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_masks(rng, vocab, scale):
    """All rows with parameters of their own, in one batch."""
    logits = (scale * rng.standard_normal((len(ROWS), vocab))).astype(np.float32)
    scores = np.asarray(truncate(logits, sampler_of(ROWS)))
    for row, params in enumerate(ROWS):
        kept, unsure = reference_mask(logits[row], params)
        wrong = (np.isfinite(scores[row]) != kept) & ~unsure
        assert not wrong.any(), params
        assert unsure.sum() <= max(2, vocab // 500)
        tempered = logits[row] / params.temperature
        found = np.isfinite(scores[row])
        np.testing.assert_allclose(scores[row][found], (tempered - tempered.max())[found], atol=1e-4)


def row_of_five(*values):
    return np.array(values, np.float32)


EXTREME = {
    "huge": row_of_five(1e30, -1e30, 1e30, 0, 5),
    "equal": row_of_five(2, 2, 2, 2, 2),
    "zeros": row_of_five(0, 0, 0, 0, 0),
    "some minus infinity": row_of_five(-np.inf, 1, -np.inf, 2, -np.inf),
    "one finite": row_of_five(-np.inf, -np.inf, -np.inf, -7, -np.inf),
    "largest floats": row_of_five(3e38, -3e38, 0, 3e38, -3e38),
    "ties below": row_of_five(3, 1, 1, 1, 0),
}


@pytest.mark.parametrize("name", EXTREME)
def test_masks_of_extreme_logits(name):
    logits = np.tile(EXTREME[name], (len(ROWS), 1))
    scores = np.asarray(truncate(logits, sampler_of(ROWS)))
    assert not np.isnan(scores).any()
    for row, params in enumerate(ROWS):
        kept, unsure = reference_mask(logits[row], params)
        wide = logits[row].astype(np.float64) / params.temperature
        unsure |= wide - wide.max() < -3e38  # which float32 may take for minus infinity
        assert (np.isfinite(scores[row]) == kept)[~unsure].all(), params
    tokens, _ = draw(logits, ROWS)
    assert (np.isfinite(scores)[np.arange(len(ROWS)), tokens]).all()


def test_masks_are_those_of_transformers(rng):
    import torch
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper
    from transformers import TopKLogitsWarper as TopK
    from transformers import TopPLogitsWarper as TopP

    logits = (3 * rng.standard_normal((8, 300))).astype(np.float32)
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.85, min_p=0.03)
    warpers = [TemperatureLogitsWarper(0.8), TopK(50), TopP(0.85), MinPLogitsWarper(0.03)]
    wanted = LogitsProcessorList(warpers)(torch.zeros((8, 1), dtype=torch.long), torch.from_numpy(logits)).numpy()
    got = np.asarray(truncate(logits, sampler_of([params] * 8)))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(wanted))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-38},
        {"temperature": 2e-38},
        {"temperature": 1e-300},
        {"temperature": 1e38},
        {"temperature": 1e300},
        {"temperature": 1.0, "top_p": 1e-45},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_p": 1 - 1e-9},
        {"temperature": 1.0, "min_p": 1e-300},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "top_k": 2**31},
        {"temperature": 1.0, "repetition_penalty": 1e-300},
        {"temperature": 1.0, "repetition_penalty": 1e300},
        {"temperature": 1.0, "presence_penalty": 1e300},
    ],
    ids=str,
)
def test_extreme_options_either_work_or_are_refused(options):
    """Never a token that the logits rule out: here the likeliest is ahead by 50, the last one behind by 50."""
    logits = np.zeros((1, 8), np.float32)
    logits[0, 3], logits[0, 0], logits[0, 7] = 50, -50, -50
    try:
        rows = [SamplingParams(**options)]
    except UsageError:
        return
    seen = np.array([[0, 0, 0, PROMPT, 0, 0, 0, 0]], np.uint8)
    tokens = [int(draw(logits, rows, p, seen if mode_of(rows).penalties else None)[0][0]) for p in range(20)]
    assert set(tokens) <= set(range(8))
    if options["temperature"] > 1:
        assert len(set(tokens)) > 3  # next to uniform
    elif "repetition_penalty" not in options:
        assert set(tokens) == {3}


# The draws.


@partial(jax.jit, static_argnames=("positions", "mode"))
def _draw_many(logits, sampler, seen, *, positions, mode):
    def at(position):
        return sample(logits, sampler, jnp.full(logits.shape[0], position, jnp.int32), seen, mode)[0]

    return lax.map(at, jnp.arange(positions))


def draw_many(logits, rows, positions, seen=None):
    """Tokens (positions, rows), every one from the same logits (vocab,)."""
    tiled = np.tile(np.asarray(logits, np.float32), (len(rows), 1))
    seen = None if seen is None else np.tile(seen, (len(rows), 1))
    return np.asarray(_draw_many(tiled, sampler_of(rows), seen, positions=positions, mode=mode_of(rows)))


@pytest.mark.parametrize("seed", [0, 2**40])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str)
def test_draws_follow_the_softmax(seed, options):
    params = SamplingParams(temperature=0.9, **options)
    rows = [dataclasses.replace(params, seed=seed + i) for i in range(8)]
    logits = np.array([0.3, 2.0, -1.0, 1.5, 1.2, -3.0, 0.0, 0.9], np.float32)
    kept, _ = reference_mask(logits, params)
    wanted = np.where(kept, np.exp(logits / 0.9), 0)
    wanted *= 10000 / wanted.sum()
    found = np.bincount(draw_many(logits, rows, 1250).ravel(), minlength=8)
    assert not found[~kept].any()
    chi_square = ((found - wanted)[kept] ** 2 / wanted[kept]).sum()
    assert chi_square < 30  # 7 degrees of freedom: p = 1e-4


def test_draws_are_independent_of_each_other():
    """Pairs of neighbouring positions, and of neighbouring seeds, are as often equal as chance has it."""
    rows = [SamplingParams(temperature=1.0, seed=seed) for seed in range(8)]
    tokens = draw_many(np.zeros(16), rows, 1250)
    for one, other in ((tokens[:-1], tokens[1:]), (tokens[:, :-1], tokens[:, 1:])):
        assert abs((one == other).mean() - 1 / 16) < 0.01  # 4 standard deviations


BATCH_MATES = [SamplingParams(temperature=t, top_k=k, seed=s) for t, k, s in ((0.0, 0, 0), (2.0, 3, 1), (0.5, 0, 9))]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_a_token_depends_on_its_row_alone(rng, seed):
    logits = rng.standard_normal((4, 1000)).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=seed)
    alone = [int(draw(logits[:1], [params], position)[0][0]) for position in range(5)]
    for index in range(4):
        rows = [*BATCH_MATES[:index], params, *BATCH_MATES[index:]]
        order = [*range(1, index + 1), 0, *range(index + 1, 4)]
        got = [
            int(draw(logits[order], rows, [position if i == index else 77 for i in range(4)])[0][index])
            for position in range(5)
        ]
        assert got == alone


def test_positions_and_seeds_make_a_difference():
    logits = np.zeros((1, 50000), np.float32)
    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    drawn = {
        (seed, position): int(draw(logits, [SamplingParams(temperature=1.0, seed=seed)], position)[0][0])
        for seed in seeds
        for position in (0, 1, 2, 1000)
    }
    assert len(set(drawn.values())) > len(drawn) - 3  # of 50000: hardly any pair by chance
    assert drawn[0, 0] == int(draw(logits, [SamplingParams(temperature=1.0)], 0)[0][0])


# Penalties.


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(rng, penalty):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    for _ in range(5):
        logits = rng.standard_normal((3, 32)).astype(np.float32)
        ids = rng.integers(0, 32, (3, 12))
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()
        seen = np.zeros((3, 32), np.uint8)
        np.put_along_axis(seen, ids[:, :7], PROMPT, axis=1)
        np.put_along_axis(seen, ids[:, 7:], GENERATED, axis=1)
        tokens, _ = draw(logits, [SamplingParams(repetition_penalty=penalty)] * 3, 0, seen)
        np.testing.assert_array_equal(tokens, wanted.argmax(-1))


def test_presence_penalty_is_for_generated_tokens_only():
    rows = [SamplingParams(presence_penalty=1.5)] * 4
    seen = np.array([[PROMPT, 0], [GENERATED, 0], [PROMPT | GENERATED, 0], [0, 0]], np.uint8)
    tokens, _ = draw([[2.0, 1.0]] * 4, rows, 0, seen)
    assert list(tokens) == [0, 1, 1, 0]
    tokens, _ = draw([[2.0, 1.0]] * 4, [SamplingParams(presence_penalty=-1.5)] * 4, 0, seen[:, ::-1])
    assert list(tokens) == [0, 1, 1, 0]


def test_penalties_come_before_the_temperature():
    """Both penalties together, by the formula: logit ÷ or × repetition, less presence, then the distribution."""
    logits = np.array([2.0, -0.5, 1.0, 0.2], np.float32)
    seen = np.array([PROMPT, PROMPT | GENERATED, GENERATED, 0], np.uint8)
    wanted = np.exp(np.array([2.0 / 1.6, -0.5 * 1.6 - 0.4, 1.0 / 1.6 - 0.4, 0.2]) / 0.8)
    wanted *= 5000 / wanted.sum()
    options = {"temperature": 0.8, "repetition_penalty": 1.6, "presence_penalty": 0.4}
    rows = [SamplingParams(**options, seed=seed) for seed in range(8)]
    found = np.bincount(draw_many(logits, rows, 625, seen).ravel(), minlength=4)
    assert ((found - wanted) ** 2 / wanted).sum() < 21  # 3 degrees of freedom: p = 1e-4


def test_new_tokens_are_marked_as_generated():
    seen = np.array([[0, PROMPT, 0], [PROMPT, GENERATED, 0]], np.uint8)
    rows = [SamplingParams(repetition_penalty=1.001)] * 2
    tokens, after = draw([[0.0, 9.0, 1.0], [0.0, 1.0, 9.0]], rows, 0, seen)
    assert list(tokens) == [1, 2]
    np.testing.assert_array_equal(after, [[0, PROMPT | GENERATED, 0], [PROMPT, GENERATED, GENERATED]])
    assert after.dtype == np.uint8


def test_rows_without_penalties_are_left_alone(rng):
    logits = rng.standard_normal((2, 64)).astype(np.float32)
    seen = np.full((2, 64), PROMPT | GENERATED, np.uint8)
    tokens, _ = draw(logits, [SamplingParams(), SamplingParams(presence_penalty=1.0)], 0, seen)
    assert tokens[0] == logits[0].argmax()


# Logits that are not numbers.


@pytest.mark.parametrize("mode", [Mode(False, False), Mode(True, False), Mode(True, True)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, "all -inf"])
def test_rows_that_are_not_numbers_are_marked(rng, mode, bad):
    logits = rng.standard_normal((3, 40)).astype(np.float32)
    if bad == "all -inf":
        logits[1] = -np.inf
    else:
        logits[1, 17] = bad
    seen = np.zeros((3, 40), np.uint8) if mode.penalties else None
    rows = [SamplingParams(temperature=1.0 if mode.random else 0.0, seed=i) for i in range(3)]
    tokens, _ = draw(logits, rows, 3, seen, mode)
    clean, _ = draw(np.where(np.isfinite(logits), logits, 0), rows, 3, seen, mode)
    assert tokens[1] == NOT_FINITE
    assert (tokens[0], tokens[2]) == (clean[0], clean[2])


# Options.


NAN, INF = float("nan"), float("inf")
BAD_OPTIONS = [
    *(("temperature", value) for value in (-0.1, NAN, INF)),
    *(("top_k", value) for value in (-1, 1.5, NAN, INF)),
    *(("top_p", value) for value in (0, -0.1, 1.01, NAN)),
    *(("min_p", value) for value in (-0.1, 1.01, NAN)),
    *(("repetition_penalty", value) for value in (0, -1, NAN, INF)),
    *(("presence_penalty", value) for value in (NAN, INF, -INF)),
    *(("seed", value) for value in (-1, 2**64, 1.5, NAN)),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_options_are_named(name, value):
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})
    with pytest.raises(UsageError, match=name):
        per_row(2, **{name: [SamplingParams.__dataclass_fields__[name].default, value]})


@pytest.mark.parametrize("value", ["hot", None, [None, None], {"a": 1}, ["1", "2"]], ids=str)
def test_options_that_are_no_numbers(value):
    with pytest.raises(UsageError, match="temperature"):
        per_row(2, temperature=value)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5, 0.5], (1.0,), np.ones(4)], ids=str)
def test_a_wrong_number_of_values(values):
    with pytest.raises(UsageError, match=r"temperature has \d values for 2 prompts"):
        per_row(2, temperature=values)


def test_an_unknown_option():
    with pytest.raises(UsageError, match=r"temprature.*temperature"):  # what there is instead
        per_row(2, temprature=1.0)


def test_options_are_one_for_all_or_one_each():
    rows = per_row(2, temperature=0.5, seed=[1, 2**64 - 1], top_k=np.array([3, 4]), top_p=np.float32(0.5))
    assert rows == [SamplingParams(0.5, 3, 0.5, seed=1), SamplingParams(0.5, 4, 0.5, seed=2**64 - 1)]
    assert per_row(3) == [SamplingParams()] * 3
    assert per_row(1, temperature=np.array(0.5)) == [SamplingParams(0.5)]


def test_the_mode_is_the_least_that_serves():
    greedy, hot = SamplingParams(), SamplingParams(temperature=1.0)
    assert mode_of([greedy, SamplingParams(top_k=5, top_p=0.5)]) == Mode(False, False)
    assert mode_of([greedy, hot]) == Mode(True, False)
    assert mode_of([greedy, SamplingParams(repetition_penalty=1.1)]) == Mode(False, True)
    assert mode_of([hot, SamplingParams(presence_penalty=-1)]) == Mode(True, True)


def test_seeds_of_64_bits_make_distinct_keys():
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    keys = np.asarray(sampler_of([SamplingParams(seed=seed) for seed in seeds]).keys)
    assert (keys.dtype, keys.shape) == (np.uint32, (6, 4))
    assert len({tuple(key) for key in keys}) == 6


def test_nothing_is_sorted():
    rows = [SamplingParams(temperature=1.0)]
    traced = jax.jit(partial(sample, seen=None, mode=mode_of(rows))).trace(
        jnp.zeros((1, 8)), sampler_of(rows), jnp.zeros(1, int)
    )
    assert not {"sort", "top_k", "argmax"} & {eqn.primitive.name for eqn in traced.jaxpr.eqns}
