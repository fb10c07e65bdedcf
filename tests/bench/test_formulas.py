"""The arithmetic of a benchmark: that of NxD Inference to the last digit, and ours against counting by hand."""

import json

import pytest

from jaxsvd.bench import formulas
from jaxsvd.config import ModelConfig, Rope

NAMES = [*(f"latency_ms_p{p}" for p in (50, 90, 95, 99, 100)), "latency_ms_avg", "throughput"]


def entry(*numbers):
    return dict(zip(NAMES, numbers, strict=True))


# The README of github.com/dinghongsong/NeuronMM: Llama-3.2-1B on trn1, 32 prompt and 32 new tokens, dense and low-rank.
PUBLISHED = {
    "dense": {
        "e2e_model": entry(
            1299.866795539856,
            1301.309323310852,
            1302.1685719490051,
            1302.9363083839417,
            1303.1282424926758,
            1300.0563144683838,
            49.22863670422672,
        ),
        "context_encoding_model": entry(
            70.28031349182129,
            70.3099250793457,
            70.31856775283813,
            70.3455662727356,
            70.35231590270996,
            70.27335166931152,
            455.3646473357901,
        ),
        "token_generation_model": entry(
            39.081573486328125,
            39.14194107055664,
            39.16501998901367,
            39.197025299072266,
            39.25800323486328,
            39.088456092342255,
            26.40825879839129,
        ),
    },
    "low-rank": {
        "e2e_model": entry(
            893.8226699829102,
            894.6243762969971,
            894.8212623596191,
            895.5112648010254,
            895.683765411377,
            893.8456416130066,
            71.60072950012662,
        ),
        "context_encoding_model": entry(
            66.6283369064331,
            66.76206588745117,
            66.76559448242188,
            66.77356719970703,
            66.77556037902832,
            66.64743423461914,
            480.1385134700057,
        ),
        "token_generation_model": entry(
            26.091694831848145,
            26.137852668762207,
            26.164603233337402,
            26.198863983154297,
            26.267528533935547,
            26.096261316730132,
            39.55578356560814,
        ),
    },
}
RUNS, PROMPT, NEW = 20, 32, 32
# The latencies were not published, but the clock tells which they were: it ticked in 2^-22 s (the last bit of a float64
# of the seconds since 1970), so that the percentiles give the latencies at the ranks between which they lie, and the
# average gives the sum, all as whole ticks. What lies between these ranks does not matter.
TICK = 2.0**-22
TICKS = {
    "dense": [
        (RUNS, {9: 5452036, 10: 5452037, 17: 5457710, 18: 5461479, 19: 5465716}, 109056628),
        (RUNS, {9: 294777, 10: 294777, 17: 294898, 18: 294930, 19: 295079}, 5894956),
        (
            RUNS * (NEW - 1),
            {
                **{309: 163920, 310: 163920, 557: 164173, 558: 164175, 588: 164270},
                **{589: 164270, 612: 164401, 613: 164405, 619: 164660},
            },
            101648298,
        ),
    ],
    "low-rank": [
        (RUNS, {9: 3748964, 10: 3748964, 17: 3752256, 18: 3752962, 19: 3756770}, 74981207),
        (RUNS, {9: 279459, 10: 279460, 17: 280019, 18: 280033, 19: 280077}, 5590792),
        (
            RUNS * (NEW - 1),
            {
                **{309: 109436, 310: 109437, 557: 109630, 558: 109631, 588: 109742},
                **{589: 109748, 612: 109886, 613: 109886, 619: 110174},
            },
            67862505,
        ),
    ],
}


def latencies(count, known, total):
    """Seconds, ascending: `count` ticks with those `known` at their ranks, which sum up to `total`."""
    least = [max((ticks for rank, ticks in known.items() if rank <= i), default=0) for i in range(count)]
    most = [min(ticks for rank, ticks in known.items() if rank >= i) for i in range(count)]
    rest = total - sum(least)
    for i in reversed(range(count)):
        added = min(most[i] - least[i], rest)
        least[i] += added
        rest -= added
    assert rest == 0 and least == sorted(least)
    return [ticks * TICK for ticks in least]


@pytest.mark.parametrize("run", PUBLISHED)
def test_the_published_report_comes_out_byte_for_byte(run):
    lists = [latencies(*given) for given in TICKS[run]]
    report = formulas.nxdi_report(*lists, prompt=PROMPT, new=NEW, batch=1)
    assert json.dumps(report, indent=4) == json.dumps(PUBLISHED[run], indent=4)


def test_the_order_of_the_latencies_does_not_matter(rng):
    lists = [rng.permutation(latencies(*given)) for given in TICKS["dense"]]
    assert formulas.nxdi_report(*lists, prompt=PROMPT, new=NEW, batch=1) == PUBLISHED["dense"]


def test_the_published_speedup():
    assert formulas.nxdi_speedup(PUBLISHED["low-rank"], PUBLISHED["dense"]) == 1.4544528204247231


def test_a_batch_counts_all_rows():
    report = formulas.nxdi_report([2.0], [0.5], [0.25] * 7, prompt=24, new=8, batch=3)
    assert report["e2e_model"]["throughput"] == 3 * 32 / 2
    assert report["context_encoding_model"]["throughput"] == 3 * 24 / 0.5
    assert report["token_generation_model"]["throughput"] == 3 * 8 / (7 * 0.25)  # NxD Inference's, one call too few


def test_a_part_that_never_ran_is_null():
    assert formulas.nxdi_report([2.0], [0.5], [], prompt=24, new=1, batch=1)["token_generation_model"] is None


def test_spread():
    assert formulas.spread([1.0, 4.0, 2.0, 3.0, 10.0]) == (5, 3.0, 4.0, pytest.approx(12.5**0.5), 1.0, 10.0)
    assert formulas.spread([2.0]) == (1, 2.0, 2.0, None, 2.0, 2.0)


def test_the_floor_is_bytes_over_bandwidth():
    assert formulas.floor_ms(8_600_000_000, 4300) == 2.0


def test_prefill_flops_are_those_of_the_text():
    config = ModelConfig("llama", 11, 6, 8, 2, 3, 1, 2, 64, 1e-5, Rope(), True)
    multiplied, batch, prompt, count = 100, 2, 5, 0
    for _ in range(batch):
        for position in range(prompt):
            count += 2 * multiplied
            for _layer in range(config.num_layers):
                for _head in range(config.num_heads):
                    seen = position + 1
                    count += 2 * seen * config.head_dim  # queries by keys
                    count += 2 * seen * config.head_dim  # scores by values
        count += 2 * config.hidden_size * config.vocab_size
    assert formulas.prefill_flops(config, multiplied, prompt, batch) == count
