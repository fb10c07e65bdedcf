"""Measure perplexity: python scripts/perplexity.py MODEL --text FILE (`--help` lists the options)."""

import sys

from jaxsvd.cli import run

if __name__ == "__main__":
    sys.exit(run("perplexity"))
