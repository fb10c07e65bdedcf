"""Continue prompts, streaming the text."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from jaxsvd.cli import common
from jaxsvd.errors import UsageError

if TYPE_CHECKING:
    from jaxsvd.api import LanguageModel, Prompt, Statistics


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--model", required=True, help="a registry name (qwen3-4b), a Hub id or a folder")
    common.prompt_arguments(parser)
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
    common.backend_arguments(parser)
    common.length_arguments(parser)
    parser.add_argument("--artifacts", metavar="DIR", help="take the steps that scripts/compile.py has compiled there")
    common.finish(parser, generate)


def generate(args: argparse.Namespace) -> None:
    """The command."""
    from jaxsvd import api

    prompts = common.prompts(args)
    if not prompts:
        raise UsageError("there is no prompt: give --prompt TEXT, --prompt - for stdin, or --prompt-file FILE")
    model = api.load(
        args.model,
        args.dtype,
        args.backend,
        progress=False if args.quiet else None,
        buckets=args.buckets,
        max_length=args.max_length,
        artifacts=args.artifacts,
    )
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
