"""Measure how well models predict texts, in windows that do not overlap."""

import argparse
import json
from pathlib import Path

from jaxsvd.cli import common
from jaxsvd.errors import UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("model", help="a registry name, a Hub id or a folder")
    parser.add_argument("--text", action="append", default=[], type=Path, metavar="FILE", help="UTF-8; repeatable")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window (512)")
    parser.add_argument("--windows", type=int, metavar="N", help="take N evenly spaced windows (default: all)")
    parser.add_argument("--compare", action="append", default=[], metavar="MODEL", help="the same windows; repeatable")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows scored at a time (8)")
    common.backend_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw perplexity against the fraction kept")
    common.finish(parser, perplexity)


def perplexity(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd import plots
    from jaxsvd.evaluate import measure, report

    if not args.text:
        raise UsageError("there is no text: give --text FILE")
    models, progress = [args.model, *args.compare], False if args.quiet else None
    if args.plot:
        plots.check(args.plot)
    rows = measure(
        models, args.text, args.window, args.windows, args.batch_size, args.dtype, args.backend, progress=progress
    )
    print(json.dumps(report.as_json(rows, window=args.window)) if args.json else report.table(rows), flush=True)
    if args.plot:
        report.plot(rows, args.plot)
