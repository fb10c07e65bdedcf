"""What the commands share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from jaxsvd import __version__
from jaxsvd.errors import UsageError


def prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `prompts` reads."""
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a prompt, or - for stdin; repeatable")
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="a file that is one prompt")


def prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that were given. Raises UsageError for one that can't be read or is empty."""
    found = []
    for text in args.prompt:
        found.append(sys.stdin.read() if text == "-" else text)
    for path in args.prompt_file:
        try:
            found.append(sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the prompt file {path} can't be read ({error})") from None
    if any(not text.strip() for text in found):
        raise UsageError("a prompt is empty: give at least one word")
    return found


def length_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the options that say which lengths are compiled."""
    parser.add_argument(
        "--buckets",
        metavar="RULE",
        help="lengths of padded prompts and of caches: auto (default), off, a list (128,1024), or PROMPTS/CACHES",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of the longest text (default: the model's)")


def backend_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add how a model computes."""
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: by platform)")
    parser.add_argument("--backend", default="auto", help="auto (default), xla, gpu, neuron or neuron-emulated")


def finish(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    """Add the options that every command has, and what it calls."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no statistics on stderr")
    parser.add_argument("--version", action="version", version=f"jaxsvd {__version__}")
    parser.set_defaults(command=command)
