"""What the numbers of a benchmark mean: pure arithmetic on latencies, bytes and shapes."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsvd.config import ModelConfig

PERCENTILES = (50, 90, 95, 99, 100)


class Spread(NamedTuple):
    """A quantity that was measured `n` times: its middle, and how far the measurements lie apart.

    `deviation` is the standard deviation of the sample, None of a single one.
    """

    n: int
    median: float
    mean: float
    deviation: float | None
    least: float
    greatest: float


def spread(samples: Sequence[float]) -> Spread:
    """Of samples in any unit, at least one."""
    deviation = statistics.stdev(samples) if len(samples) > 1 else None
    middle, mean = statistics.median(samples), statistics.fmean(samples)
    return Spread(len(samples), middle, mean, deviation, min(samples), max(samples))


def nxdi_entry(latencies: Sequence[float], length: int, batch: int, runs: int) -> dict[str, float]:
    """One entry of NxD Inference's benchmark report (`utils/benchmark.py`, aws-neuron/neuronx-distributed-inference).

    Args:
        latencies: seconds, one per call.
        length: the tokens a row that one run counts.
        batch: rows.
        runs: how often the whole model ran; its parts may have been called more often.

    Percentiles are NumPy's linear ones, in milliseconds; `throughput` is tokens per second.
    """
    seconds = np.array(latencies)
    milliseconds = {f"latency_ms_p{p}": float(np.percentile(seconds, p) * 1000) for p in PERCENTILES}
    return milliseconds | {
        "latency_ms_avg": float(np.average(seconds) * 1000),
        "throughput": float((runs * length * batch) / np.sum(seconds)),
    }


def nxdi_report(
    e2e: Sequence[float], context: Sequence[float], decode: Sequence[float], prompt: int, new: int, batch: int
) -> dict[str, dict[str, float] | None]:
    """NxD Inference's benchmark report, byte for byte, of latencies in seconds: of runs, prefills, decoded tokens.

    A part that was never called is None, as decoding is where one token is generated: the prefill's.

    It flatters, which is why it stands beside honest figures: `e2e_model`'s throughput counts the tokens of the prompt
    as well as the `new` ones, `token_generation_model`'s counts all `new` ones over the time of all but the first.
    """
    return {
        "e2e_model": nxdi_entry(e2e, prompt + new, batch, len(e2e)),
        "context_encoding_model": nxdi_entry(context, prompt, batch, len(e2e)),
        "token_generation_model": nxdi_entry(decode, new, batch, len(e2e)) if len(decode) else None,
    }


def nxdi_speedup(model: dict[str, Any], other: dict[str, Any]) -> float:
    """How SVD-Flash has it: the mean end-to-end latency of `other` over that of `model`, of two reports."""
    return other["e2e_model"]["latency_ms_avg"] / model["e2e_model"]["latency_ms_avg"]


def prefill_flops(config: ModelConfig, multiplied: int, prompt: int, batch: int) -> int:
    """The floating-point operations that a prefill needs, two a multiplication; padding and norms are not counted.

    Args:
        config: the model.
        multiplied: the parameters of its projections, factors as they are.
        prompt: tokens a row. Every one goes through the projections, attends to itself and those before it, and the
            last one goes through the head.
        batch: rows.
    """
    head = config.vocab_size * config.hidden_size
    pairs = prompt * (prompt + 1) // 2
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * pairs  # the scores, and the mixing
    return 2 * batch * (multiplied * prompt + attention + head)


def floor_ms(nbytes: int, bandwidth: float) -> float:
    """The least time, in ms, of a step that must read `nbytes`, at a bandwidth in GB/s."""
    return nbytes / (bandwidth * 1e6)
