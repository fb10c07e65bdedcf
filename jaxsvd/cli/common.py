"""What the commands share."""

import argparse
from collections.abc import Callable


def finish(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]) -> None:
    """Add the options that every command has, and what it calls."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no statistics on stderr")
    parser.set_defaults(command=command)
