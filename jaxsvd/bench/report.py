"""What a benchmark says: a table for people, JSON for programs, a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsvd import api, plots
from jaxsvd.bench import machine
from jaxsvd.bench.formulas import Spread
from jaxsvd.bench.machine import Bandwidth
from jaxsvd.bench.measure import Comparison, Measured, compare, token_ms

# A batch size, measured: the model first, then those that it is compared with.
Batch = Sequence[Measured]


def table(batches: Sequence[Batch], bandwidth: Bandwidth) -> str:
    """Per batch size: a column a model, then what the first one gains over each other one."""
    where = machine.description()
    lines = [f"{where['device']} ({where['processor']}), {where['platform']}, jax {where['versions']['jax']}"]
    lines.append(f"memory: {bandwidth.rate:.1f} GB/s ({bandwidth.source})")
    for batch in batches:
        work = batch[0].work
        lines += [
            "",
            f"batch {work.batch}, {work.prompt} prompt + {work.new} new tokens a row, {work.runs} runs in turns",
        ]
        lines += ["", *_aligned([["", *(found.contender.name for found in batch)], *_rows(batch)])]
        for other in batch[1:]:
            lines += ["", *_compared(batch[0], other)]
    lines += ["", f"the process's peak memory: {api.peak_bytes() / 1e9:.2f} GB"]
    return "\n".join([*lines, "± is one standard deviation; the floor is the time of reading a step's bytes once"])


def _rows(batch: Batch) -> list[list[str]]:
    rows = {
        "first token, ms": [_said(found.first_token_ms) for found in batch],
        "prefill, ms": [_said(found.prefill_ms) for found in batch],
        "prefill, tokens/s": [_said(found.prefill_tokens_per_s) for found in batch],
        "prefill, TFLOP/s": [_said(found.prefill_tflops) for found in batch],
        "decode, ms a token": [_said(found.ms_per_token) for found in batch],
        "  least, greatest": [_range(found.ms_per_token) for found in batch],
        "  floor, ms": [f"{found.floor_ms:.4g}" for found in batch],
        "  floor / measured": [_number(found.floor_share, ".0%") for found in batch],
        "decode, tokens/s": [_said(found.decode_tokens_per_s) for found in batch],
        "end to end, ms": [_said(found.e2e_ms) for found in batch],
        "generated tokens/s": [_said(found.generated_tokens_per_s) for found in batch],
        "kernels a token": [_number(found.launches_per_token, ".1f") for found in batch],
        "keep": [f"{found.contender.keep:.3f}" for found in batch],
        "weights, MB": [f"{found.contender.weight_bytes / 1e6:.1f}" for found in batch],
        "step reads, MB": [f"{found.step_bytes / 1e6:.1f}" for found in batch],
        "dense / step bytes": [f"{found.dense_step_bytes / found.step_bytes:.3f}" for found in batch],
        "step memory, MB": [_number(_mega(found.step_memory), ".1f") for found in batch],
        "compiling, s": [_compiling(found) for found in batch],
        "loading, s": [f"{found.contender.load_seconds:.1f}" for found in batch],
    }
    return [[name, *cells] for name, cells in rows.items()]


def _compared(model: Measured, other: Measured) -> list[str]:
    """What the model gains. Over a dense model, the three lines behind the first are SVD-Flash's own."""
    found = compare(model, other)
    names, bound = (other.contender.name, model.contender.name), []
    if other.contender.role == "compare":  # beside the same model on XLA the bound would be 1 and say nothing
        names = ("wo svd", "with svd")
        bound = [f"at most {found.bound:.3f} by the bytes that a decode step reads, where memory is the limit"]
    times = [each.nxdi["e2e_model"]["latency_ms_avg"] for each in (other, model)]
    decode = f", decode {_ratio(found.decode)}" if found.decode else ""
    return [
        f"{model.contender.name} over {other.contender.name}",
        *(f"e2e_model time {name}:  {time}" for name, time in zip(names, times, strict=True)),
        f"E2E Speedup:  {found.nxdi}",
        f"by rounds: end to end {_ratio(found.e2e)}{decode}, prefill {_ratio(found.prefill)}",
        *bound,
    ]


def _said(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.median:.4g}" + ("" if spread.deviation is None else f" ± {spread.deviation:.2g}")


def _range(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.least:.4g} to {spread.greatest:.4g}"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.least:.3f} to {spread.greatest:.3f})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _mega(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 1e6


def _compiling(found: Measured) -> str:
    cold, warm = found.compilation
    return f"{warm:.1f}" if cold is None else f"{cold:.1f} cold, {warm:.1f} warm"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def as_json(batches: Sequence[Batch], bandwidth: Bandwidth, command: str, samples: bool) -> dict[str, Any]:
    """Everything, as JSON values; the single runs, in seconds, too where `samples`."""
    work = batches[0][0].work
    return {
        "command": command,
        **machine.description(),
        "bandwidth_gb_per_s": bandwidth.rate,
        "bandwidth_source": bandwidth.source,
        "dtype": batches[0][0].contender.engine.dtype.name,
        "prompt": work.prompt,
        "new": work.new,
        "runs": work.runs,
        "warmup": work.warmup,
        "peak_bytes": api.peak_bytes(),
        "batches": [_batch_json(batch, samples) for batch in batches],
    }


def _batch_json(batch: Batch, samples: bool) -> dict[str, Any]:
    model, *others = batch
    return {
        "batch": model.work.batch,
        "models": [_model_json(found, samples) for found in batch],
        "speedups": [_speedup_json(compare(model, other)) for other in others],
    }


_KEPT = (
    "prefill_ms",
    "first_token_ms",
    "e2e_ms",
    "ms_per_token",
    "prefill_tokens_per_s",
    "prefill_tflops",
    "decode_tokens_per_s",
    "generated_tokens_per_s",
    "compilation",
)


def _model_json(found: Measured, samples: bool) -> dict[str, Any]:
    contender, numbers = found.contender, found._asdict()
    entry = {
        "role": contender.role,
        "model": contender.model,
        "backend": contender.backend,
        "keep": contender.keep,
        "steps_per_dispatch": contender.engine.steps_per_dispatch,
        "buckets": contender.engine.buckets._asdict(),
        "compiled_ahead": contender.engine.held is not None,
        "load_seconds": contender.load_seconds,
        "weight_bytes": contender.weight_bytes,
        "byte_ratio_bound": found.dense_step_bytes / found.step_bytes,
    }
    entry |= {name: value for name, value in numbers.items() if name not in ("contender", "work", "runs", *_KEPT)}
    entry |= {name: numbers[name] and numbers[name]._asdict() for name in _KEPT}
    entry["nxdi_compat"] = found.nxdi
    if samples:
        entry["samples_seconds"] = [run._asdict() for run in found.runs]
    return entry


def _speedup_json(found: Comparison) -> dict[str, Any]:
    return {
        "over": found.other.model,
        "backend": found.other.backend,
        "e2e_nxdi": found.nxdi,
        "e2e": found.e2e._asdict(),
        "decode": found.decode and found.decode._asdict(),
        "prefill": found.prefill._asdict(),
        "byte_ratio_bound": found.bound,
    }


def draw(batches: Sequence[Batch], path: Path) -> None:
    """Draw every sample, by batch size and model, and their medians. `plots.check` comes first."""
    panels = {
        "decode, ms a token": lambda found: token_ms(found.runs, found.contender.engine.steps_per_dispatch),
        "prefill, ms": lambda found: [1e3 * run.prefill for run in found.runs],
        "end to end, ms": lambda found: [1e3 * run.total for run in found.runs],
    }
    figure = plots.figure(4.5 * len(panels), 4)
    count = len(batches[0])
    for axes, (title, samples_of) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for row, batch in enumerate(batches):
            for column, found in enumerate(batch):
                x, samples = row + (column - (count - 1) / 2) * 0.8 / count, samples_of(found)
                label = found.contender.name if row == 0 else None
                axes.plot([x] * len(samples), samples, ".", color=f"C{column}", alpha=0.3)
                if samples:
                    axes.plot(x, sorted(samples)[len(samples) // 2], "_", color=f"C{column}", ms=18, mew=2, label=label)
                if "token" in title:
                    axes.plot(x, found.floor_ms, "k_", ms=18, label="floor" if row == column == 0 else None)
        axes.set_xticks(range(len(batches)), [f"batch {batch[0].work.batch}" for batch in batches])
        axes.set(title=title, xlim=(-0.6, len(batches) - 0.4), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path)
