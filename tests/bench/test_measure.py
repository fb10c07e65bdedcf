"""Measuring: in turns, what is counted, and what is made of the times."""

import os

import jax
import numpy as np
import pytest
from evaluating import with_rank

from jaxsvd.bench import contenders, measure
from jaxsvd.bench.measure import Compilation, Run, Work
from jaxsvd.errors import JaxsvdError, UsageError

QUIET = {"dtype": "float32", "progress": False}
WORK = Work(batch=2, prompt=5, new=6, runs=3, warmup=1)


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory):
    """A low-rank model and its dense one."""
    low = with_rank(tiny_llama[0], tmp_path_factory.mktemp("low") / "model")
    return [contenders.load(*given, "xla", **QUIET) for given in (("model", low), ("compare", tiny_llama[0]))]


@pytest.fixture(scope="module")
def measured(models):
    return measure.measure(models, WORK, bandwidth=10.0)


def test_models_run_in_turns(models, monkeypatch):
    order, run = [], measure._run

    def noted(engine, work):
        order.append(next(i for i, each in enumerate(models) if each.engine.leaves[0] is engine.leaves[0]))
        return run(engine, work)

    monkeypatch.setattr(measure, "_run", noted)
    measure.measure(models, WORK._replace(runs=2, warmup=1), 10.0)
    assert order == [0, 0, 1, 1] + [0, 1] * 3  # both compile, twice; then the turns


def test_runs_and_tokens_are_counted(measured):
    for found in measured:
        steps = found.contender.engine.steps_per_dispatch
        blocks = -(-(WORK.new - 1) // steps)
        assert [len(run.blocks) for run in found.runs] == [blocks] * WORK.runs
        assert found.ms_per_token.n == blocks * WORK.runs and found.prefill_ms.n == WORK.runs
        for run in found.runs:
            assert run.first_token + sum(run.blocks) == pytest.approx(run.total)


def test_what_is_made_of_the_times(measured):
    made = Run(prefill=0.5, first_token=0.75, total=2.75, blocks=[0.5, 1.0, 0.5])
    engine, steps = measured[0].contender.engine, measured[0].contender.engine.steps_per_dispatch
    found = measure._summary(
        measured[0].contender, WORK, 10.0, [made, made], measure._Compiled(Compilation(None, 1.0), None, None)
    )
    assert found.prefill_ms.median == 500 and found.first_token_ms.median == 750 and found.e2e_ms.median == 2750
    assert found.ms_per_token[:3] == (6, 500 / steps, pytest.approx(2000 / 3 / steps))
    assert found.prefill_tokens_per_s.median == 2 * 5 / 0.5
    assert found.decode_tokens_per_s.median == 2 * 5 / 2 and found.generated_tokens_per_s.median == 2 * 6 / 2.75
    assert found.step_bytes == engine.step_bytes(2 * (5 + 3))
    assert found.floor_ms == found.step_bytes / 1e7
    assert found.floor_share == pytest.approx(found.floor_ms / (500 / steps))
    assert found.compilation == (None, 1.0) and found.step_memory is None


def test_nxdi_counts_as_nxdi_does(measured):
    found = measured[0]
    tokens = measure._token_times(Run(0, 0, 0, [8.0, 4.0]), steps=4, new=6)
    assert tokens == [2.0] * 4 + [1.0]
    report = found.nxdi
    assert list(report) == ["e2e_model", "context_encoding_model", "token_generation_model"]
    totals = [run.total for run in found.runs]
    assert report["e2e_model"]["throughput"] == pytest.approx(3 * 11 * 2 / sum(totals))
    assert report["context_encoding_model"]["latency_ms_p100"] == 1e3 * max(run.prefill for run in found.runs)
    assert report["token_generation_model"]["latency_ms_p50"] > 0


def test_gains_are_of_the_same_rounds(measured):
    steps = [[1.0, 2.0, 2.0], [2.0, 4.0, 4.0]]
    ours = measured[0]._replace(runs=[Run(1.0, 1.0, 4.0, blocks) for blocks in steps])
    theirs = measured[1]._replace(runs=[Run(3.0, 3.0, 6.0, [6.0]), Run(1.0, 1.0, 6.0, [8.0])])
    found = measure.compare(ours, theirs)
    assert (found.prefill.least, found.prefill.greatest) == (1, 3) and found.e2e.median == 1.5 == found.nxdi
    assert (found.decode.least, found.decode.greatest) == (2, 3)
    assert found.bound == measured[1].step_bytes / measured[0].step_bytes > 1
    assert found.bound == measured[0].dense_step_bytes / measured[0].step_bytes


def test_a_low_rank_model_needs_less(measured):
    low, dense = measured
    assert low.step_bytes < dense.step_bytes and low.step_memory < dense.step_memory
    assert low.contender.weight_bytes < low.step_memory
    assert dense.launches_per_token > 2 * 5  # two layers of at least so many products
    flops = [each.prefill_tflops.mean / each.prefill_tokens_per_s.mean for each in measured]
    assert flops[0] < flops[1]


def test_one_token_has_no_decoding(models):
    (found,) = measure.measure(models[:1], Work(1, 4, 1, runs=1, warmup=0), 10.0)
    assert found.ms_per_token is found.decode_tokens_per_s is found.floor_share is found.launches_per_token is None
    assert found.nxdi["token_generation_model"] is None
    assert measure.compare(found, found).decode is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"new": 0}, "new is 0"),
        ({"runs": 0}, "runs is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"prompt": 0}, "prompt is 0"),
        ({"prompt": 510}, "room for 512"),
    ],
)
def test_work_that_can_not_be_done(models, change, words):
    with pytest.raises(UsageError, match=words):
        measure.measure(models, WORK._replace(**change), 10.0)


def test_a_model_that_computes_no_numbers_is_not_measured(tiny_llama):
    broken = contenders.load("model", tiny_llama[0], "xla", **QUIET)
    broken.engine.leaves[:] = [leaf * np.nan for leaf in broken.engine.leaves]
    with pytest.raises(JaxsvdError, match="not numbers"):
        measure.measure([broken], WORK, 10.0)


def test_all_models_get_the_same_prompts():
    assert WORK.prompts(128) == WORK.prompts(128) != WORK._replace(batch=1).prompts(50)
    assert np.shape(WORK.prompts(128)) == (2, 5) and np.max(WORK._replace(prompt=500).prompts(9)) == 8


@pytest.fixture
def no_cache_of_the_users():
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_cold_and_warm(no_cache_of_the_users, models):
    work = Work(1, 7, 3, runs=1, warmup=0)
    with measure.fresh_compilation_cache() as cold:
        folder = jax.config.values["jax_compilation_cache_dir"]
        assert cold and os.listdir(folder) == []
        (found,) = measure.measure(models[:1], work, 10.0, cold)
        assert os.listdir(folder) != []
    assert jax.config.values["jax_compilation_cache_dir"] is None and not os.path.exists(folder)
    assert found.compilation.cold > 0 and found.compilation.warm > 0


def test_the_users_cache_is_left_alone(models):
    chosen = jax.config.values["jax_compilation_cache_dir"]
    with measure.fresh_compilation_cache() as cold:
        assert not cold and jax.config.values["jax_compilation_cache_dir"] == chosen
        (found,) = measure.measure(models[:1], Work(3, 7, 3, runs=1, warmup=0), 10.0, cold)
    assert found.compilation.cold is None and found.compilation.warm > 0
