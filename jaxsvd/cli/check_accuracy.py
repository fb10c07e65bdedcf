"""Check that a model answers here as it should: its logits or its tokens against a reference in float32."""

import argparse
import json
from pathlib import Path

from jaxsvd.cli import common
from jaxsvd.errors import CheckFailed, UsageError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("model", help="a registry name, a Hub id or a folder")
    parser.add_argument("--mode", default="logits", help="logits (default): match them; tokens: the same greedy text")
    common.prompt_arguments(parser)
    parser.add_argument("--num-tokens", type=int, metavar="N", help="new tokens a prompt (32, or the golden file's)")
    expected = parser.add_argument_group("reference: float32 on CPU")
    source = expected.add_mutually_exclusive_group()
    source.add_argument("--reference", default="jaxsvd", help="who computes it: jaxsvd (default) or transformers")
    source.add_argument("--golden", type=Path, metavar="FILE", help="take it from a file of --save-golden")
    expected.add_argument("--save-golden", type=Path, metavar="FILE.safetensors", help="keep it in a file")
    expected.add_argument("--against", metavar="DENSE", help="of another model: measures compression as well")
    rules = parser.add_argument_group("tolerances of --mode logits")
    bounds = rules.add_mutually_exclusive_group()
    bounds.add_argument(
        "--tol",
        action="append",
        metavar="K:ATOL:RTOL",
        help="of the K greatest logits, or all; repeatable (5:1e-5:0.01 50:1e-5:0.02 1000:1e-5:0.03 all:1e-5:0.05)",
    )
    bounds.add_argument("--tol-map", metavar="LITERAL", help='as NxD Inference has it: "{5: (1e-5, 0.02)}"')
    rules.add_argument("--divergence-tol", type=float, metavar="X", help="near-ties are closer than X (0.001)")
    rules.add_argument(
        "--projection-tol",
        type=float,
        metavar="X",
        help="of each projection alone against its weights (0.02); inf: any",
    )
    tested = parser.add_argument_group("what is tested")
    common.backend_arguments(tested)
    tested.add_argument("--round-weights", metavar="DTYPE", help="round them to bfloat16 or float16, then compute")
    common.finish(parser, check_accuracy)


def check_accuracy(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd.evaluate import accuracy, accuracy_report, matching

    rules = (args.tol, args.tol_map, args.divergence_tol, args.projection_tol)
    if args.mode == "tokens" and any(rule is not None for rule in rules):
        raise UsageError("tokens are the same or not: tolerances (--tol, --tol-map, …-tol) belong to --mode logits")
    tolerances = list(matching.TOLERANCES)
    if args.tol:
        tolerances = [matching.tolerance_of(text) for text in args.tol]
    elif args.tol_map is not None:
        tolerances = matching.tolerances_of_map(args.tol_map)
    given = {"divergence": args.divergence_tol, "projection_tolerance": args.projection_tol}
    outcome = accuracy.check(
        args.model,
        args.mode,
        common.prompts(args),
        args.num_tokens,
        args.against,
        args.reference,
        args.golden,
        args.save_golden,
        tolerances,
        dtype=args.dtype,
        backend=args.backend,
        round_weights=args.round_weights,
        progress=False if args.quiet else None,
        **{name: value for name, value in given.items() if value is not None},
    )
    print(json.dumps(accuracy_report.as_json(outcome)) if args.json else accuracy_report.table(outcome), flush=True)
    if not outcome.passed:
        raise CheckFailed(accuracy_report.verdict(outcome))
