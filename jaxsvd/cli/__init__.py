"""The commands: results on stdout, progress and statistics on stderr.

A command is a module of this package: its docstring is what `--help` says, its `arguments` describes what it takes, and
what it does is the function that this names. Exit codes: 0 done, 1 a check failed, 2 something given can't be used,
3 something failed at run time, 130 interrupted.
"""

import argparse
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from jaxsvd import __version__
from jaxsvd.cli import bench, check_accuracy, compile, compress, convert, generate, inspect, neuron_report, perplexity
from jaxsvd.errors import JaxsvdError

COMMANDS: dict[str, ModuleType] = {
    "generate": generate,
    "compile": compile,
    "compress": compress,
    "perplexity": perplexity,
    "bench": bench,
    "check-accuracy": check_accuracy,
    "inspect": inspect,
    "convert": convert,
    "neuron-report": neuron_report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxsvd COMMAND …`; return the exit code."""
    parser = argparse.ArgumentParser(prog="jaxsvd", description="Low-rank LLM inference in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxsvd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.__doc__, description=command.__doc__))
    return _run(parser, argv)


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command, as the scripts do; return the exit code."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(description=command.__doc__)
    command.arguments(parser)
    return _run(parser, argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    args.command_line = shlex.join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    if args.quiet:  # nor the Hub's own bars, which read this when they are first imported
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
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
    except Exception:  # memory that is not there, or a bug: Python would end with 1, as if a check had failed
        traceback.print_exc()
        return JaxsvdError.exit_code
    finally:
        logger.removeHandler(handler)
    return 0
