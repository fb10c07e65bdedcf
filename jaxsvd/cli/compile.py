"""Compile everything ahead, so that a start compiles nothing."""

import argparse
import json

from jaxsvd.cli import common


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("model", help="a registry name, a Hub id or a folder")
    parser.add_argument("--artifacts", required=True, metavar="DIR", help="the folder that will hold what is compiled")
    common.length_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time (1)")
    parser.add_argument(
        "--modes", default="greedy,random", metavar="LIST", help="of greedy, random, penalties (greedy,random)"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: by platform)")
    parser.add_argument("--backend", default="auto", help="auto (default), xla, gpu or neuron")
    parser.add_argument("--force", action="store_true", help="replace an artefact that is there")
    common.finish(parser, compile_ahead)


def compile_ahead(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd import api

    made = api.compile_ahead(
        args.model,
        args.artifacts,
        args.dtype,
        args.backend,
        buckets=args.buckets,
        max_length=args.max_length,
        batch_size=args.batch_size,
        modes=args.modes.split(","),
        force=args.force,
    )
    size = sum(graph["bytes"] for graph in made.graphs.values())
    if args.json:
        print(json.dumps({"artifacts": str(made.folder), "bytes": size} | made.manifest))
        return
    said = made.manifest
    prompts, caches = (", ".join(map(str, said["buckets"][name])) for name in ("prefill", "decode"))
    print(
        f"{made.folder}: {len(made.graphs)} compiled steps, {size / 1e6:.1f} MB\n"
        f"prompts padded to {prompts}; caches of {caches} tokens; texts of up to {made.buckets.length}\n"
        f"batch {made.batch}; {', '.join(said['modes'])}; {said['dtype']} on {said['platform']}"
    )
