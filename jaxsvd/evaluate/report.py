"""What perplexity says: a table for people, JSON for programs, a plot of quality against size."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsvd import plots
from jaxsvd.evaluate.scoring import Row


def table(rows: Sequence[Row]) -> str:
    """A line per model and text, ± one standard error; the ratio, where models are compared, is to the first."""
    compared = any(row.comparison for row in rows)
    head = ["model", "keep", "text", "perplexity", *(["ratio"] if compared else []), "windows", "tokens", "tokens/s"]
    lines = [head]
    for row in rows:
        result, ratio = row.result, row.comparison
        cells = [row.model, f"{row.keep:.3f}", row.text, _plus_minus(result.perplexity, result.standard_error, 3)]
        if compared:
            cells.append(_plus_minus(ratio.ratio, ratio.ratio * ratio.log_error, 4) if ratio else "1")
        lines.append([*cells, str(result.windows), str(result.tokens), f"{result.tokens_per_second:.0f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def as_json(rows: Sequence[Row], **settings: Any) -> dict[str, Any]:
    """The rows as JSON values. What is undefined is None; what is infinite, as a broken model's perplexity, "Infinity".

    JSON has neither, but None would say that nothing was found; Python's `float` and JavaScript's `Number` take the
    word back.
    """
    results = []
    for row in rows:
        ratio, log_error = row.comparison or (None, None)
        numbers = {name: value for name, value in row.result._asdict().items() if name != "nlls"}
        found = {
            "model": row.model,
            "keep": row.keep,
            "text": row.text,
            **numbers,
            "ratio": ratio,
            "ratio_log_error": log_error,
        }
        results.append({name: json_value(value) for name, value in found.items()})
    return {**settings, "results": results}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw perplexity against keep, a line per text, ± one standard error. `jaxsvd.plots.check` comes first."""
    figure = plots.figure(6.4, 4.4)
    axes = figure.add_subplot()
    for text in dict.fromkeys(row.text for row in rows):
        shown = [(row.keep, row.result) for row in rows if row.text == text]
        points = sorted((keep, result.perplexity, result.standard_error) for keep, result in shown)
        keeps, values, errors = zip(*points, strict=True)
        errors = [error if math.isfinite(error) else 0 for error in errors]
        axes.errorbar(keeps, values, yerr=errors, marker="o", capsize=3, label=text)
    axes.set_xlabel("parameters kept in the projections (1: dense)")
    axes.set_ylabel("perplexity per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _plus_minus(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def json_value(value: Any) -> Any:
    """A number that JSON has: None for what is undefined, a word for what is infinite."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
