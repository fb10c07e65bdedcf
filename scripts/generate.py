"""Continue prompts: python scripts/generate.py --model qwen3-4b --prompt "…" (`--help` lists the options)."""

import sys

from jaxsvd.cli import run

if __name__ == "__main__":
    sys.exit(run("generate"))
