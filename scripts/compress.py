"""Compress a dense model: python scripts/compress.py SOURCE TARGET --keep 0.8 (`--help` lists the options)."""

import sys

from jaxsvd.cli import run

if __name__ == "__main__":
    sys.exit(run("compress"))
