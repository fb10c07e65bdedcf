"""Write a low-rank copy of a dense model."""

import argparse
import json
import sys
from pathlib import Path

from jaxsvd.cli import common
from jaxsvd.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("source", help="the dense model: a registry name, a Hub id or a folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--keep", type=float, default=0.8, help="the part of the projections' parameters to keep")
    method = parser.add_argument_group("method")
    method.add_argument("--method", default="kfac", help="kfac (default), svd-llm, asvd, fwsvd or svd")
    method.add_argument("--allocate", default="global", help="global (default): spend where it pays; or uniform")
    method.add_argument("--refit", action="store_true", help="fit each layer to what the compressed ones hand on")
    method.add_argument("--width", action="store_true", help="let the plan narrow MLPs where that loses less")
    method.add_argument("--only", default="all", help="all (default), attention or mlp")
    method.add_argument("--dense-layers", type=int, nargs="+", default=[], metavar="N", help="layers to leave alone")
    method.add_argument("--rank-multiple", type=int, metavar="N", help="ranks are multiples of N (128; 16 if narrow)")
    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", nargs="+", action="extend", default=[], metavar="FILE", help="UTF-8 texts")
    text.add_argument("--tokens", type=int, metavar="N", help="how many tokens of them to use")
    text.add_argument("--gradient-tokens", type=int, metavar="N", help="on how many of these to take gradients (half)")
    text.add_argument("--seed", type=int, metavar="N", help="where in the texts they begin (0)")
    work = parser.add_argument_group("work")
    work.add_argument("--dry-run", action="store_true", help="print the plan; keep the analysis, write no model")
    work.add_argument("--report", type=Path, metavar="FILE.png", help="draw the plan")
    work.add_argument("--resume", action="store_true", help="go on with interrupted work")
    work.add_argument("--work", type=Path, metavar="DIR", help="keep the analysis here, for other keeps")
    work.add_argument("--force", action="store_true", help="replace the target if it exists, and unfinished work")
    common.finish(parser, compress)


def compress(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd.compression import DEFAULT_TOKENS
    from jaxsvd.compression import compress as run_compress
    from jaxsvd.compression.report import table

    _refuse_unread(args)
    same = ("method", "allocate", "refit", "width", "only", "dense_layers", "calibration", "gradient_tokens")
    same += ("rank_multiple", "force", "resume", "work", "dry_run", "report")
    made = run_compress(
        args.source,
        args.target,
        args.keep,
        tokens=DEFAULT_TOKENS if args.tokens is None else args.tokens,
        seed=args.seed or 0,
        progress=False if args.quiet else None,
        **{name: getattr(args, name) for name in same},
    )
    if args.json:
        print(json.dumps(made._asdict() | {"target": str(made.target), "plan": made.plan._asdict()}))
        return
    if args.dry_run:
        print(table(made))
    narrowed = f", MLPs narrowed: {len(made.plan.widths)}" if made.plan.widths else ""
    predicted = "" if made.plan.loss is None else f"; predicted loss {made.plan.loss:.3f} nats a token"
    print(
        f"{'plan: ' if args.dry_run else ''}{made.target}: {len(made.plan.ranks)} of {made.matrices} matrices "
        f"factored{narrowed}; kept {made.keep_linears:.3f} of their parameters, {made.keep_parameters:.3f} of all "
        f"parameters, {made.keep_bytes:.3f} of the bytes{predicted}"
    )
    if not args.quiet:
        print(f"{made.seconds:.0f} s, peak memory {made.peak_bytes / 1e9:.2f} GB", file=sys.stderr)


def _refuse_unread(args: argparse.Namespace) -> None:
    """Raises UsageError for options of a text that nothing will read."""
    from jaxsvd.compression.options import Options

    chosen = (args.keep, args.method, args.allocate, args.refit, args.width, args.only, tuple(args.dense_layers))
    needs = Options(*chosen, rank_multiple=1).needs  # whatever the multiple is
    unread = () if needs & {"gradients", "fisher"} else ("gradient_tokens",)
    unread += () if needs else ("calibration", "tokens", "seed")
    if given := [f"--{name.replace('_', '-')}" for name in unread if getattr(args, name) not in (None, [])]:
        read = "reads no text" if not needs else "takes no gradients"
        raise UsageError(
            f"{', '.join(given)} would change nothing: {args.method} with --allocate {args.allocate} {read}"
        )
