"""Print what the Trainium kernels cost on the emulator: exact bytes, modelled lower bounds of time."""

import argparse
import json
from pathlib import Path

from jaxsvd.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--target", action="append", default=[], help="trn1, trn2 or trn3; repeatable (default: all)")
    parser.add_argument("--model", action="append", default=[], help="whose layers; repeatable (default: all four)")
    parser.add_argument("--no-chain", action="store_true", help="leave out the paper's chain, which takes minutes")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="save every figure")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw traffic and modelled times")
    common.finish(parser, neuron_report)


def neuron_report(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd import neuron_report as report
    from jaxsvd import plots

    if args.plot:
        plots.check(args.plot)
    found = report.measure(args.target, args.model, not args.no_chain, progress=False if args.quiet else None)
    print(json.dumps(report.as_json(found)) if args.json else report.table(found), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report.as_json(found), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        report.draw(found, args.plot)
