"""Turn a low-rank checkpoint of any known family, pickled or not, into safetensors with the standard names."""

import argparse
import json
from pathlib import Path

from jaxsvd.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("source", help="a folder, or a .pt, .bin or .safetensors file")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--base", metavar="FOLDER", help="the model that it was made from: config, tokenizer, weights")
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    common.finish(parser, convert)


def convert(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd.checkpoint.convert import convert as run_convert

    report = run_convert(args.source, args.target, args.base, force=args.force, progress=False if args.quiet else None)
    if args.json:
        print(json.dumps(report._asdict() | {"target": str(report.target)}))
        return
    ranks = f" (ranks {report.least_rank} to {report.greatest_rank})" if report.factored else ""
    shared = f", {report.shared} of them with a shared factor" if report.shared else ""
    print(
        f"{report.target}: {report.family}; {report.factored} of {report.matrices} matrices factored{ranks}{shared}; "
        f"kept {report.keep_linears:.3f} of their parameters, {report.keep_parameters:.3f} of all parameters, "
        f"{report.keep_bytes:.3f} of the bytes"
    )
