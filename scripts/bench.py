"""Measure how fast a model is: python scripts/bench.py MODEL (`--help` lists the options)."""

import sys

if __name__ == "__main__":
    # This folder's inspect.py would hide the standard library's.
    sys.path[:] = [folder for folder in sys.path if folder != __file__.rpartition("/")[0]]
    from jaxsvd.cli import run

    sys.exit(run("bench"))
