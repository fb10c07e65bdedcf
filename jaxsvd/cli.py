"""The commands: results on stdout, progress and statistics on stderr.

Exit codes: 0 done, 2 something given can't be used, 3 something failed at run time, 130 interrupted.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsvd import __version__
from jaxsvd.errors import JaxsvdError, UsageError

if TYPE_CHECKING:
    from jaxsvd.api import LanguageModel, Prompt, Statistics


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxsvd COMMAND …`; return the exit code."""
    parser = argparse.ArgumentParser(prog="jaxsvd", description="Low-rank LLM inference in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxsvd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_arguments, command) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=command.__doc__, description=command.__doc__))
    return _run(parser, argv)


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command, as the scripts do; return the exit code."""
    add_arguments, command = COMMANDS[name]
    parser = argparse.ArgumentParser(description=command.__doc__)
    parser.add_argument("--version", action="version", version=f"jaxsvd {__version__}")
    add_arguments(parser)
    return _run(parser, argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    logger, handler = logging.getLogger("jaxsvd"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.CRITICAL if args.quiet else logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        args.command(args)
        sys.stdout.flush()
    except JaxsvdError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe has had enough
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return JaxsvdError.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        logger.removeHandler(handler)
    return 0


def _common(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no statistics on stderr")
    parser.set_defaults(command=command)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a registry name (qwen3-4b), a Hub id or a folder")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a prompt, or - for stdin; repeatable")
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="a file that is one prompt")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--chat", action="store_true", default=None, help="use the chat template (default)")
    style.add_argument("--raw", action="store_false", dest="chat", help="continue the prompt as plain text")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the nucleus of probability P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="keep tokens of P times the best's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1: none")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the text here; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="run past the model's end-of-text token")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: by platform)")
    parser.add_argument("--backend", default="auto", help="auto or xla")
    _common(parser, generate)


def generate(args: argparse.Namespace) -> None:
    """Continue prompts, streaming the text."""
    from jaxsvd import api

    prompts = _prompts(args)
    model = api.load(args.model, args.dtype, args.backend, progress=False if args.quiet else None)
    chat = model.tokenizer.has_chat_template if args.chat is None else args.chat
    given: list[Prompt] = [[{"role": "user", "content": text}] if chat else text for text in prompts]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed", "ignore_eos")
    options = {name: getattr(args, name) for name in names}
    session = model.session(given, args.max_new_tokens, args.stop, **options)
    # One text can stream; several would run into each other and are printed whole.
    for _, piece in session:
        if len(prompts) == 1 and not args.json:
            print(piece, end="", flush=True)
    completions = session.completions()
    stats = completions[0].stats
    if args.json:
        results = [
            {"prompt": prompt} | {name: getattr(done, name) for name in ("text", "token_ids", "finish_reason")}
            for prompt, done in zip(prompts, completions, strict=True)
        ]
        print(json.dumps({"model": args.model, "results": results, "statistics": dataclasses.asdict(stats)}))
    elif len(prompts) == 1:
        print()
    else:
        for prompt, done in zip(prompts, completions, strict=True):
            print(f"=== {prompt}\n{done.text}\n")
    if not args.quiet:
        print(describe(model, stats), file=sys.stderr)


def describe(model: "LanguageModel", stats: "Statistics") -> str:
    """A few lines for people."""
    import jax

    device = jax.local_devices()[0].device_kind
    return (
        f"\n{model.folder.name} on {device}, {model.engine.dtype.name}\n"
        f"loaded in {stats.load_seconds:.1f} s, compiled in {stats.compile_seconds:.1f} s, "
        f"first token after {stats.first_token_seconds:.2f} s ({stats.prompt_tokens} prompt tokens)\n"
        f"{stats.new_tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s; "
        f"{stats.bytes_per_step / 1e6:.0f} MB read per step, {stats.bandwidth / 1e9:.1f} GB/s; "
        f"peak memory {stats.peak_bytes / 1e9:.2f} GB"
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = []
    for text in args.prompt:
        prompts.append(sys.stdin.read() if text == "-" else text)
    for path in args.prompt_file:
        try:
            prompts.append(sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the prompt file {path} can't be read ({error})") from None
    if not prompts:
        raise UsageError("there is no prompt: give --prompt TEXT, --prompt - for stdin, or --prompt-file FILE")
    if any(not text.strip() for text in prompts):
        raise UsageError("a prompt is empty: give at least one word")
    return prompts


def _compress_arguments(parser: argparse.ArgumentParser) -> None:
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
    text.add_argument("--seed", type=int, default=0, help="where in the texts they begin")
    work = parser.add_argument_group("work")
    work.add_argument("--dry-run", action="store_true", help="print the plan; keep the analysis, write no model")
    work.add_argument("--report", type=Path, metavar="FILE.png", help="draw the plan")
    work.add_argument("--resume", action="store_true", help="go on with interrupted work")
    work.add_argument("--work", type=Path, metavar="DIR", help="keep the analysis here, for other keeps")
    work.add_argument("--force", action="store_true", help="replace the target if it exists, and unfinished work")
    _common(parser, compress)


def compress(args: argparse.Namespace) -> None:
    """Write a low-rank copy of a dense model."""
    from jaxsvd.compression import DEFAULT_TOKENS
    from jaxsvd.compression import compress as run_compress
    from jaxsvd.compression.report import table

    same = ("method", "allocate", "refit", "width", "only", "dense_layers", "calibration", "gradient_tokens", "seed")
    same += ("rank_multiple", "force", "resume", "work", "dry_run", "report")
    made = run_compress(
        args.source,
        args.target,
        args.keep,
        tokens=DEFAULT_TOKENS if args.tokens is None else args.tokens,
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


def _perplexity_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a registry name, a Hub id or a folder")
    parser.add_argument("--text", action="append", default=[], type=Path, metavar="FILE", help="UTF-8; repeatable")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window (512)")
    parser.add_argument("--windows", type=int, metavar="N", help="take N evenly spaced windows (default: all)")
    parser.add_argument("--compare", action="append", default=[], metavar="MODEL", help="the same windows; repeatable")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows scored at a time (8)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: by platform)")
    parser.add_argument("--backend", default="auto", help="auto or xla")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw perplexity against the fraction kept")
    _common(parser, perplexity)


def perplexity(args: argparse.Namespace) -> None:
    """Measure how well models predict texts, in windows that do not overlap."""
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


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder, or a .pt, .bin or .safetensors file")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--base", metavar="FOLDER", help="the model that it was made from: config, tokenizer, weights")
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    _common(parser, convert)


def convert(args: argparse.Namespace) -> None:
    """Turn a low-rank checkpoint of any known family, pickled or not, into safetensors with the standard names."""
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


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], Any], Callable[[argparse.Namespace], None]]] = {
    "generate": (_generate_arguments, generate),
    "compress": (_compress_arguments, compress),
    "perplexity": (_perplexity_arguments, perplexity),
    "convert": (_convert_arguments, convert),
}


if __name__ == "__main__":
    sys.exit(main())
