"""Show what is in a checkpoint: ranks, sizes, and how fast it can run at most. Reads no weights."""

import argparse
import json
from pathlib import Path

from jaxsvd.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("model", help="a registry name, a Hub id or a folder")
    parser.add_argument(
        "--dtype", default="bfloat16", help="what it is to run in: bfloat16 (default), float16, float32"
    )
    parser.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="NAME",
        help="h200, h100, a100, trn1, trn2 or trn3; repeatable (default: all)",
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of other hardware")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what is kept of each projection, by layer")
    common.finish(parser, inspect)


def inspect(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd import hub, inspection, plots
    from jaxsvd.checkpoint.read import Checkpoint

    if args.plot:
        plots.check(args.plot)
    bandwidths = inspection.bandwidths(args.hardware, args.bandwidth)
    found = inspection.inspect(Checkpoint(hub.resolve(args.model)), args.dtype, bandwidths)
    print(json.dumps(inspection.as_json(found)) if args.json else inspection.table(found), flush=True)
    if args.plot:
        inspection.draw(found, args.plot)
