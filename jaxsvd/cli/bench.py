"""Measure how fast a model is: prefill, decode and whole texts, beside how fast they could be."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxsvd.cli import common
from jaxsvd.errors import UsageError

if TYPE_CHECKING:
    from jaxsvd.bench.contenders import Contender

RANK_MULTIPLE, NEW = 128, 64


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("model", help="a registry name, a Hub id or a folder; with --random, whose shape to take")
    parser.add_argument("--compare", metavar="DENSE", help="run this model in turns with it, and say what is gained")
    made = parser.add_argument_group("without weights")
    made.add_argument("--random", action="store_true", help="the model's shape with random weights, made here")
    made.add_argument("--keep", type=float, help="low-rank at this keep, and in turns with the dense model (--random)")
    made.add_argument("--rank-multiple", type=int, metavar="N", help=f"of --keep's ranks ({RANK_MULTIPLE})")
    work = parser.add_argument_group("work")
    work.add_argument("--batch", "--batch-size", type=int, nargs="+", default=[1], metavar="N", help="rows (1)")
    work.add_argument(
        "--prompt", "--max-context-length", type=int, default=512, metavar="N", help="prompt tokens a row (512)"
    )
    length = work.add_mutually_exclusive_group()
    length.add_argument("--new", type=int, metavar="N", help=f"tokens to generate a row ({NEW})")
    length.add_argument("--seq-len", type=int, metavar="N", help="the same: prompt and new tokens together")
    work.add_argument("--runs", type=int, default=20, metavar="N", help="how often, in turns (20)")
    work.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before, which do not count (1)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--dtype", help="float32, bfloat16 or float16 (default: by platform)")
    how.add_argument("--backend", default="auto", help="as for generate; XLA runs in turns with any other one")
    common.length_arguments(how)
    how.add_argument("--artifacts", metavar="DIR", help="take the model's steps that scripts/compile.py compiled there")
    how.add_argument("--bandwidth", type=float, metavar="GB/s", help="of memory, for the floor (known, or measured)")
    results = parser.add_argument_group("results")
    results.add_argument("--samples", action="store_true", help="every run in the JSON")
    results.add_argument("--out", type=Path, metavar="FILE.json", help="keep the JSON")
    results.add_argument("--plot", type=Path, metavar="FILE.png", help="draw every run")
    common.finish(parser, bench)


def bench(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd import plots
    from jaxsvd.bench import machine, report
    from jaxsvd.bench.measure import Work, fresh_compilation_cache, measure

    new = _new(args)
    if args.plot:
        plots.check(args.plot)
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        wrong = "it is a folder" if args.out.is_dir() else f"there is no folder {args.out.parent}"
        raise UsageError(f"{args.out} can't be written: {wrong}")
    bandwidth = machine.bandwidth(args.bandwidth)
    with fresh_compilation_cache() as cold:
        contenders = _contenders(args)
        works = [Work(rows, args.prompt, new, args.runs, args.warmup) for rows in dict.fromkeys(args.batch)]
        batches = [measure(contenders, work, bandwidth.rate, cold) for work in works]
    found = report.as_json(batches, bandwidth, args.command_line, args.samples)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if args.plot:
        report.draw(batches, args.plot)
    if not args.json:
        print(report.table(batches, bandwidth))
    print(json.dumps(found), flush=True)


def _new(args: argparse.Namespace) -> int:
    if args.seq_len is None:
        return NEW if args.new is None else args.new
    if args.seq_len <= args.prompt:
        raise UsageError(f"--seq-len is {args.seq_len}: expected more than the prompt's {args.prompt} tokens")
    return args.seq_len - args.prompt


def _contenders(args: argparse.Namespace) -> list["Contender"]:
    """The model, what it is compared with, and both on XLA where the backend is another one."""
    from jaxsvd.bench import contenders

    if not args.random and (args.keep is not None or args.rank_multiple is not None):
        raise UsageError("--keep and --rank-multiple are of random weights: add --random, or compress the model first")
    if args.random and args.compare:
        raise UsageError("--random compares with the dense model of its own shape: give --keep instead of --compare")
    if args.rank_multiple is not None and args.keep is None:
        raise UsageError("--rank-multiple is of low-rank weights: give --keep as well")
    if args.random and args.artifacts:
        raise UsageError("--random makes a model here and --artifacts has one's steps: leave one of them out")
    options = {"dtype": args.dtype, "buckets": args.buckets, "max_length": args.max_length}
    progress = False if args.quiet else None
    multiple = RANK_MULTIPLE if args.rank_multiple is None else args.rank_multiple
    found = []
    for backend in contenders.backends_of(args.backend, args.dtype):
        if args.random:
            keeps = {"model": args.keep} if args.keep is None else {"model": args.keep, "compare": None}
            found += [
                contenders.random(role, args.model, keep, multiple, backend, **options) for role, keep in keeps.items()
            ]
            continue
        models = {"model": args.model} | ({"compare": args.compare} if args.compare else {})
        for role, name in models.items():
            held = args.artifacts if not found else None  # an artefact is of one model, and of one backend
            found.append(contenders.load(role, name, backend, progress=progress, artifacts=held, **options))
    return found
