"""Compressing a dense model folder into a low-rank one."""

import hashlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsvd import hub, plots
from jaxsvd.checkpoint.read import Checkpoint, Kept
from jaxsvd.checkpoint.write import (
    FORMAT_VERSION,
    atomic_folder,
    check_target,
    copy_companions,
    remove_partials,
    write_json,
)
from jaxsvd.compression.analysis import Analysis
from jaxsvd.compression.emit import digest, kept, planned, shapes, write_tensors
from jaxsvd.compression.options import Options
from jaxsvd.compression.plan import Cost, Plan, global_plan, parameters, rank_options, uniform_plan, width_options
from jaxsvd.compression.refit import Refit
from jaxsvd.compression.report import draw
from jaxsvd.compression.text import DEFAULT_TOKENS, WINDOW, calibration_windows
from jaxsvd.compression.workspace import Arrays, Workspace
from jaxsvd.config import read_json
from jaxsvd.errors import UsageError
from jaxsvd.progress import bar


class Report(NamedTuple):
    """What `compress` made, or with `dry_run` would make.

    Attributes:
        target: the folder.
        plan: ranks and widths by path, and the predicted loss in nats per token.
        keep_linears: the fraction kept of the parameters of all projections.
        keep_parameters: of all parameters.
        keep_bytes: of all bytes.
        matrices: how many projections the model has.
        seconds: how long it took.
        peak_bytes: the process's peak memory.
    """

    target: Path
    plan: Plan
    keep_linears: float
    keep_parameters: float
    keep_bytes: float
    matrices: int
    seconds: float
    peak_bytes: int


def compress(
    source: str | Path,
    target: str | Path,
    keep: float = 0.8,
    *,
    method: str = "kfac",
    allocate: str = "global",
    refit: bool = False,
    width: bool = False,
    only: str = "all",
    dense_layers: Sequence[int] = (),
    calibration: Sequence[str | Path] = (),
    tokens: int = DEFAULT_TOKENS,
    gradient_tokens: int | None = None,
    seed: int = 0,
    rank_multiple: int | None = None,
    cost: Cost = parameters,
    force: bool = False,
    resume: bool = False,
    work: str | Path | None = None,
    dry_run: bool = False,
    report: str | Path | None = None,
    progress: bool | None = None,
) -> Report:
    """Write a low-rank copy of a dense Llama or Qwen3: an ordinary HF folder with SVD-LLM's tensor names.

    Calibration text goes through the dense model once, forward and backward, a layer at a time; every matrix is
    factored once for all ranks; a plan then gives each a rank or leaves it dense. docs/compression.md has the formulas
    and what each choice costs in perplexity.

    Args:
        source: a registry name, a Hub id or a folder; dense.
        target: the folder to write; it appears only when it is complete.
        keep: the fraction of the parameters of the selected projections to keep, between 0 and 1.
        method: how a matrix is factored: kfac, svd-llm, asvd, fwsvd or svd.
        allocate: "global" spends the budget where it saves most predicted loss and leaves matrices dense where that
            pays; "uniform" keeps the same of every matrix.
        refit: fit the factors to what the compressed layers before them hand on.
        width: let the plan narrow MLPs instead of factoring them, where that loses less (global only).
        only: which projections: "all", "attention" or "mlp".
        dense_layers: layers to leave as they are.
        calibration: text files that tell which inputs occur; by default English that comes with Python.
        tokens: how many tokens of them to use.
        gradient_tokens: on how many of these gradients are taken; by default half.
        seed: where in the texts they begin.
        rank_multiple: ranks and widths are multiples of it; default 128, and 16 for models narrower than 2048.
        cost: what the budget is counted in; default: parameters.
        force: replace `target` if it exists, and unfinished work.
        resume: go on where an earlier call with the same arguments was interrupted.
        work: a folder that keeps the analysis, to compress to other keeps without doing it again; by default a hidden
            one beside the target, removed in the end.
        dry_run: make the plan and write nothing; the analysis stays, for `resume`.
        report: a PNG file to draw the plan in.
        progress: progress bars on stderr; by default where stderr is a terminal.

    Raises UsageError for arguments that can't be used, ModelError for a source that can't be loaded.
    """
    began = time.perf_counter()
    folder, target = hub.resolve(source), Path(target)
    checkpoint = Checkpoint(folder)
    multiple = rank_multiple if rank_multiple is not None else 128 if checkpoint.config.hidden_size >= 2048 else 16
    options = Options(keep, method, allocate, refit, width, only, tuple(dense_layers), multiple, cost)
    _check_layers(checkpoint, options)
    if report:
        plots.check(Path(report))
    hidden = target.parent / f".{target.name}.work"
    # A run that was killed behind its last step has left the target, and the work that it wanted to remove.
    maybe_done = resume and hidden.exists() and target.exists()
    if not dry_run and not maybe_done:
        check_target(target, force)
    if hidden.exists() and not (work or resume or force):
        raise UsageError(
            f"{hidden} holds unfinished work: go on with --resume (resume=True), "
            "or start again with --force (force=True)"
        )
    if gradient_tokens is not None and not WINDOW <= gradient_tokens <= tokens:
        raise UsageError(f"gradient_tokens is {gradient_tokens}: expected {WINDOW} to the {tokens} of all tokens")
    if options.needs:
        windows, chosen = calibration_windows(folder, calibration, tokens, seed=seed)
    else:  # plain SVD looks at no text
        windows, chosen = np.zeros((0, WINDOW), np.int32), None
    count = max(1, min(len(windows), (tokens // 2 if gradient_tokens is None else gradient_tokens) // WINDOW))
    gradient_windows = windows[np.arange(count) * len(windows) // count] if len(windows) else windows
    stamp = _stamp(checkpoint, options) | {"calibration": chosen, "gradient_windows": count}
    workspace = Workspace(Path(work) if work else hidden, stamp, resume or bool(work))
    remove_partials(target)
    with _Bars(progress) as bars:
        analysis = Analysis(checkpoint, workspace, options, windows, gradient_windows)
        analysis.run(bars)
        plan_at = planner(analysis, options)
        plan = plan_at(keep)
        fractions = kept(checkpoint, plan)
        if report:
            draw(Path(report), shapes(checkpoint), plan, _loss_at(plan_at) if options.predicts else None)
        entry = _entry(str(source), stamp, options, plan, fractions, windows.size)
        done = maybe_done and read_json(target / "config.json").get("low_rank") == entry
        if not dry_run and not done:
            with atomic_folder(target, force) as partial:
                results = _refitted(analysis, plan, workspace, bars) if refit else planned(analysis, plan)
                write_tensors(checkpoint, results, partial, bars("writing", checkpoint.config.num_layers))
                copy_companions(folder, partial)
                write_json(partial / "config.json", checkpoint.raw | {"low_rank": entry})
                Checkpoint(partial)  # it must load before it is shown
    if not work and not dry_run:
        workspace.remove()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    matrices = len(checkpoint.matrices)
    return Report(target, plan, *fractions, matrices, time.perf_counter() - began, peak)


def planner(analysis: Analysis, options: Options) -> Callable[[float], Plan]:
    """What makes the plan of a finished analysis for any keep, which counts selected projections only."""
    all_shapes = shapes(analysis.checkpoint)
    selected = {path: shape for path, shape in all_shapes.items() if options.selects(path)}
    if not options.predicts:
        return lambda keep: uniform_plan(selected, keep, options.rank_multiple, options.cost)
    choices, widths = {}, {}
    for index in range(analysis.checkpoint.config.num_layers):
        known = analysis.losses(index)
        paths = [path for path in analysis.passes.paths(index) if path in selected]
        for path in paths:
            choices[path] = rank_options(selected[path], known[path], options.rank_multiple, options.cost)
        mlp = f"model.layers.{index}.mlp"
        if options.width and mlp in known:
            narrower = width_options(
                analysis.checkpoint.config.hidden_size, known[mlp], options.rank_multiple, options.cost
            )
            widths[mlp] = [path for path in paths if path.startswith(mlp)], narrower
    dense_cost = sum(all_[0].cost for all_ in choices.values())
    return lambda keep: global_plan(choices, widths, keep * dense_cost)


def _loss_at(plan_at: Callable[[float], Plan]) -> Callable[[float], float | None]:
    def predicted(keep: float) -> float | None:
        try:
            return plan_at(keep).loss
        except UsageError:  # less than the plan's floor
            return None

    return predicted


def _check_layers(checkpoint: Checkpoint, options: Options) -> None:
    if checkpoint.ranks:
        raise UsageError(f"{checkpoint.folder} is low-rank already: compress the dense model that it was made from")
    layers = checkpoint.config.num_layers
    if wrong := [layer for layer in options.dense_layers if not 0 <= layer < layers]:
        raise UsageError(f"dense_layers has {wrong[0]}: the model has layers 0 to {layers - 1}")
    if not any(options.selects(path) for path in checkpoint.matrices):
        raise UsageError("only and dense_layers together leave nothing to compress: choose fewer dense layers")


def _stamp(checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """What an analysis depends on, beside its text."""
    return {
        "base": digest(checkpoint),
        "method": options.method,
        "needs": sorted(options.needs),
        "predicts": options.predicts,
        "width": options.width,
        "only": options.only,
        "dense_layers": list(options.dense_layers),
    }


def _refitted(analysis: Analysis, plan: Plan, workspace: Workspace, bars: "_Bars") -> Callable[[int], Arrays]:
    # A workspace may serve several plans.
    name = "refit-" + hashlib.sha256(json.dumps([plan.ranks, plan.widths], sort_keys=True).encode()).hexdigest()[:12]
    layers, refit = range(analysis.checkpoint.config.num_layers), Refit(analysis, plan)
    workspace.sequence(name, layers, refit.first, refit.step, bars("refitting", len(layers)))
    return lambda layer: workspace.load(f"{name}/{layer}")


def _entry(
    source: str, stamp: dict[str, Any], options: Options, plan: Plan, fractions: Kept, tokens: int
) -> dict[str, Any]:
    """The `low_rank` entry of the target's config.json."""
    entry = {
        "format_version": FORMAT_VERSION,
        "method": options.method,
        "allocate": options.allocate,
        "refit": options.refit,
        "only": options.only,
        "base": {"name": source, "digest": stamp["base"]},
        "calibration": {"tokens": tokens, "digest": stamp["calibration"]},
        "keep": {"asked": options.keep} | {name: round(value, 6) for name, value in fractions._asdict().items()},
        "predicted_loss": plan.loss,
        "ranks": plan.ranks,
    }
    return entry | ({"widths": plan.widths} if plan.widths else {})


class _Bars:
    """Progress bars, one after the other."""

    def __init__(self, progress: bool | None) -> None:
        self._show = progress
        self._open = ExitStack()

    def __call__(self, what: str, count: int) -> Callable[[int], object]:
        self._open.close()
        return self._open.enter_context(bar(what, count, "layer", self._show)).update

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
