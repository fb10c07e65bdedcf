"""Convert a low-rank checkpoint of any family: python scripts/convert.py SOURCE TARGET (`--help` lists the options)."""

import sys

from jaxsvd.cli import run

if __name__ == "__main__":
    sys.exit(run("convert"))
