"""Measuring models in turns: every round runs each of them once, so that a slow minute hits all.

What is timed is the engine as `generate` uses it, the host included: prefill by itself, then a whole text, whose first
token ends the time to first token and whose blocks (several tokens per dispatch) each give a time per token.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxsvd.bench import formulas, launches
from jaxsvd.bench.contenders import Contender
from jaxsvd.bench.formulas import Spread, spread
from jaxsvd.engine import Engine
from jaxsvd.errors import UsageError
from jaxsvd.sampling import per_row

logger = logging.getLogger("jaxsvd")


class Work(NamedTuple):
    """What is asked of every model: `batch` rows of `prompt` tokens, `new` generated behind each."""

    batch: int
    prompt: int
    new: int
    runs: int = 20
    warmup: int = 1

    def prompts(self, vocab: int) -> list[list[int]]:
        """Random token ids, the same for all models of that vocabulary."""
        return np.random.default_rng(0).integers(0, vocab, (self.batch, self.prompt)).tolist()


class Run(NamedTuple):
    """One text, in seconds: the prefill alone; then to the first token, to the last one, and between blocks.

    `blocks` are the times between one block of decoded tokens and the next, each of `steps_per_dispatch` tokens.
    """

    prefill: float
    first_token: float
    total: float
    blocks: list[float]


class Compilation(NamedTuple):
    """Seconds to trace and compile all steps: `cold`, from nothing, and `warm`, from the compilation cache.

    `cold` is None where the user's own cache was used, which may have held them, or an artefact.
    """

    cold: float | None
    warm: float


class Measured(NamedTuple):
    """What one model did, times in ms. Spreads are over runs, that of `ms_per_token` over dispatches of all runs.

    `generated_tokens_per_s` is over whole texts, `decode_tokens_per_s` over what follows the first tokens, both of all
    rows together; neither counts the prompt. `floor_ms` is the time of reading `step_bytes` (weights, and the cache as
    it is halfway) once, `floor_share` that over the median time per token. `step_memory` is the most that one step
    takes by XLA's plan, weights included; `launches_per_token` are kernels (see `launches`), None where unknown.
    """

    contender: Contender
    work: Work
    prefill_ms: Spread
    first_token_ms: Spread
    e2e_ms: Spread
    ms_per_token: Spread | None
    prefill_tokens_per_s: Spread
    prefill_tflops: Spread
    decode_tokens_per_s: Spread | None
    generated_tokens_per_s: Spread
    step_bytes: int
    dense_step_bytes: int
    floor_ms: float
    floor_share: float | None
    step_memory: int | None
    launches_per_token: float | None
    compilation: Compilation
    runs: list[Run]

    @property
    def nxdi(self) -> dict[str, Any]:
        """The report that NxD Inference would have written."""
        work, steps = self.work, self.contender.engine.steps_per_dispatch
        tokens = [seconds for run in self.runs for seconds in _token_times(run, steps, work.new)]
        e2e, context = [run.total for run in self.runs], [run.prefill for run in self.runs]
        return formulas.nxdi_report(e2e, context, tokens, work.prompt, work.new, work.batch)


class Comparison(NamedTuple):
    """How many times as fast the model is as another one, in the same rounds: prefill, decode and whole texts.

    `nxdi` is SVD-Flash's figure, the ratio of the mean times of whole texts. `bound` is the ratio of the bytes that a
    decode step must read: the most that decoding can gain where memory is the limit, and the rest of it is not low
    rank's doing.
    """

    other: Contender
    prefill: Spread
    decode: Spread | None
    e2e: Spread
    nxdi: float
    bound: float


def measure(contenders: Sequence[Contender], work: Work, bandwidth: float, cold: bool = False) -> list[Measured]:
    """Run all contenders in turns.

    Args:
        contenders: any number of models.
        work: what each does `work.runs` times, after `work.warmup` times that do not count.
        bandwidth: of the device, in GB/s, for the floor.
        cold: whether nothing is in the compilation cache yet: within `fresh_compilation_cache`.

    Raises UsageError for work that does not fit a model, JaxsvdError for one that computes something that is no number.
    """
    for name in ("batch", "prompt", "new", "runs"):
        if getattr(work, name) < 1:
            raise UsageError(f"{name} is {getattr(work, name)}: expected at least 1")
    if work.warmup < 0:
        raise UsageError(f"warmup is {work.warmup}: expected 0 or more")
    engines = [_fresh(contender.engine) for contender in contenders]
    compiled = [_compile(engine, work, cold) for engine in engines]
    runs: list[list[Run]] = [[] for _ in contenders]
    for turn in range(work.warmup + work.runs):
        for engine, done in zip(engines, runs, strict=True):
            run = _run(engine, work)
            if turn >= work.warmup:
                done.append(run)
        logger.info("batch %d, round %d of %d", work.batch, turn + 1, work.warmup + work.runs)
    return [
        _summary(contender, work, bandwidth, done, steps)
        for contender, done, steps in zip(contenders, runs, compiled, strict=True)
    ]


def compare(model: Measured, other: Measured) -> Comparison:
    """The model beside another one that was measured in the same rounds."""

    def ratio(seconds: Callable[[Run], float]) -> Spread:
        return spread([seconds(theirs) / seconds(ours) for ours, theirs in zip(model.runs, other.runs, strict=True)])

    return Comparison(
        other.contender,
        prefill=ratio(lambda run: run.prefill),
        decode=ratio(lambda run: statistics.median(run.blocks)) if model.ms_per_token else None,
        e2e=ratio(lambda run: run.total),
        nxdi=formulas.nxdi_speedup(model.nxdi, other.nxdi),
        bound=other.step_bytes / model.step_bytes,
    )


@contextmanager
def fresh_compilation_cache() -> Iterator[bool]:
    """Compile into an empty folder, to know both what compiling and what finding it compiled costs: True.

    Where the user has chosen a folder, with JAX's own setting, it is used as it is: False.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield False
        return
    least = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[least]
    with tempfile.TemporaryDirectory(prefix="jaxsvd-bench-") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update(least, 0.0)
        compilation_cache.reset_cache()
        try:
            yield True
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            jax.config.update(least, before)
            compilation_cache.reset_cache()


class _Compiled(NamedTuple):
    seconds: Compilation
    memory: int | None
    launches_per_token: float | None


def _fresh(engine: Engine) -> Engine:
    """One of the same arrays that has compiled nothing."""
    return Engine(engine.model, engine.buckets, engine.steps_per_dispatch, engine.held)


def _compile(engine: Engine, work: Work, cold: bool) -> _Compiled:
    """Compile all steps of the work, and once more for another engine, which finds them in the cache."""
    _run(engine, work)
    again = _fresh(engine)
    _run(again, work)
    first, second = (sum(step.seconds for step in each.compiled) for each in (engine, again))
    seconds = Compilation(first if cold and engine.held is None else None, second)
    steps = engine.executables
    decode = next((step for name, step in steps if name == "decode"), None)
    started = launches.count(decode.as_text() or "") if decode else None
    per_token = started / engine.steps_per_dispatch if started is not None else None
    sizes = [_memory(step) for _, step in steps]
    return _Compiled(seconds, max((size for size in sizes if size is not None), default=None), per_token)


def _memory(step: Any) -> int | None:
    """Bytes that a compiled step takes at once: what it is given, what it gives, and what it needs between."""
    sizes = step.memory_analysis()
    if sizes is None:  # not every platform tells
        return None
    given, made = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
    return given + made + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes


def _run(engine: Engine, work: Work) -> Run:
    prompts, clock = work.prompts(engine.config.vocab_size), time.perf_counter
    start = clock()
    jax.block_until_ready(engine.begin(prompts, work.new))
    prefill = clock() - start
    start = clock()
    times = [clock() for _ in engine.generate(prompts, per_row(work.batch), work.new)]
    return Run(prefill, times[0] - start, times[-1] - start, np.diff(times).tolist())


def _summary(contender: Contender, work: Work, bandwidth: float, runs: list[Run], compiled: _Compiled) -> Measured:
    engine, rows = contender.engine, work.batch
    cached = rows * (work.prompt + work.new // 2)
    step_bytes = engine.step_bytes(cached)
    flops = formulas.prefill_flops(engine.config, contender.matrix_parameters, work.prompt, rows)
    per_token = token_ms(runs, engine.steps_per_dispatch)
    floor = formulas.floor_ms(step_bytes, bandwidth)
    return Measured(
        contender,
        work,
        prefill_ms=spread([1e3 * run.prefill for run in runs]),
        first_token_ms=spread([1e3 * run.first_token for run in runs]),
        e2e_ms=spread([1e3 * run.total for run in runs]),
        ms_per_token=spread(per_token) if per_token else None,
        prefill_tokens_per_s=spread([rows * work.prompt / run.prefill for run in runs]),
        prefill_tflops=spread([flops / run.prefill / 1e12 for run in runs]),
        decode_tokens_per_s=spread([rows * (work.new - 1) / sum(run.blocks) for run in runs]) if per_token else None,
        generated_tokens_per_s=spread([rows * work.new / run.total for run in runs]),
        step_bytes=step_bytes,
        dense_step_bytes=contender.dense_step_bytes(cached),
        floor_ms=floor,
        floor_share=floor / statistics.median(per_token) if per_token else None,
        step_memory=compiled.memory,
        launches_per_token=compiled.launches_per_token,
        compilation=compiled.seconds,
        runs=runs,
    )


def token_ms(runs: Sequence[Run], steps: int) -> list[float]:
    """The ms per token of every dispatch of `steps` tokens."""
    return [1e3 * block / steps for run in runs for block in run.blocks]


def _token_times(run: Run, steps: int, new: int) -> list[float]:
    """Seconds of each token but the first, by the mean of its block: what NxD Inference, which times each, lists."""
    return [block / steps for block in run.blocks for _ in range(steps)][: new - 1]
