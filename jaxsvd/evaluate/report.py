"""What perplexity says: a table for people, JSON for programs, a plot of quality against size."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsvd import hub
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.errors import UsageError
from jaxsvd.evaluate.perplexity import Row, keep_of

_KINDS = (".png", ".pdf", ".svg")


def table(rows: Sequence[Row]) -> str:
    """A line per model and text, ± one standard error; the ratio, where models are compared, is to the first."""
    compared = any(row.comparison for row in rows)
    head = ["model", "keep", "text", "perplexity", *(["ratio"] if compared else []), "windows", "tokens", "tokens/s"]
    lines = [head]
    for row in rows:
        keep = "?" if row.keep is None else f"{row.keep:.3f}"
        result, ratio = row.result, row.comparison
        cells = [row.model, keep, row.text, _plus_minus(result.perplexity, result.standard_error, 3)]
        if compared:
            cells.append(_plus_minus(ratio.ratio, ratio.ratio * ratio.log_error, 4) if ratio else "1")
        lines.append([*cells, str(result.windows), str(result.tokens), f"{result.tokens_per_second:.0f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def as_json(rows: Sequence[Row], **settings: Any) -> dict[str, Any]:
    """The rows as JSON values, None for what is undefined."""
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
        results.append({name: None if _undefined(value) else value for name, value in found.items()})
    return {**settings, "results": results}


def check_plot(path: Path, models: Sequence[str]) -> None:
    """Raise UsageError where a plot of models can't be drawn or written, before the work is done rather than after."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError:
        raise UsageError("a plot needs the package matplotlib: pip install 'jaxsvd[plot]'") from None
    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"the plot {path} can't be drawn: expected a name that ends in {', '.join(_KINDS)}")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise UsageError(f"the plot {path} can't be written ({error.strerror}): choose another file") from None
    if new:
        path.unlink()
    for model in models:
        if keep_of(Checkpoint(hub.resolve(model))) is None:
            raise UsageError(
                f"{model} can't be put in a plot: it is low-rank, and its config.json has no low_rank.keep.linears "
                "to say how much it kept; leave --plot out"
            )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw perplexity against keep, a line per text, ± one standard error. `check_plot` comes first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which keeps figures and looks for a screen.
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for text in dict.fromkeys(row.text for row in rows):
        shown = [(row.keep or 0, row.result) for row in rows if row.text == text]
        points = sorted((keep, result.perplexity, result.standard_error) for keep, result in shown)
        keeps, values, errors = zip(*points, strict=True)
        errors = [0 if _undefined(error) else error for error in errors]
        axes.errorbar(keeps, values, yerr=errors, marker="o", capsize=3, label=text)
    axes.set_xlabel("parameters kept in the projections (1: dense)")
    axes.set_ylabel("perplexity per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _plus_minus(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if _undefined(error) else f" ± {error:.{digits}f}")


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
