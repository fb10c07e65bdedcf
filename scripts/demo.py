"""`make demo`: get SmolLM2-135M-Instruct, compress it to keep 0.9, and let the low-rank model write."""

import sys

from jaxsvd.cli import run
from jaxsvd.demo import NAME, get_demo_model, get_speeches
from jaxsvd.errors import JaxsvdError
from jaxsvd.hub import local_copy

KEEP = "0.9"
PROMPT = "The most important task before this Congress is"


def main() -> int:
    try:
        source = get_demo_model()
        target = local_copy(f"{NAME}-keep-{KEEP}")
        if not (target / "config.json").exists():
            text = get_speeches(1950, 1999)
            print(f"== compressing {source} to keep {KEEP} (a minute, once)", file=sys.stderr, flush=True)
            if code := run("compress", [str(source), str(target), "--keep", KEEP, "--calibration", str(text)]):
                return code
    except JaxsvdError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"== {target} writes:\n{PROMPT}", end="", flush=True)
    return run("generate", ["--model", str(target), "--prompt", PROMPT, "--raw", "--max-new-tokens", "60"])


if __name__ == "__main__":
    sys.exit(main())
