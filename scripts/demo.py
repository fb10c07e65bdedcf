"""`make demo`: get SmolLM2-135M-Instruct, compress it to keep 0.9, and let the low-rank model write."""

import subprocess
import sys
from pathlib import Path

from jaxsvd.demo import NAME, get_demo_model, get_speeches
from jaxsvd.errors import JaxsvdError
from jaxsvd.hub import local_copy

KEEP = "0.9"
PROMPT = "The most important task before this Congress is"


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def script(name: str, *arguments: str) -> int:
    """Each step is a process of its own, as a user would run it, so that its memory is its own too."""
    return subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments]).returncode


def main() -> int:
    try:
        source, text = get_demo_model(), get_speeches(1950, 1999)
    except JaxsvdError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    target = local_copy(f"{NAME}-keep-{KEEP}")
    if not (target / "config.json").exists():
        say(f"compressing {source} to keep {KEEP} (a minute, once)")
        if code := script("compress", str(source), str(target), "--keep", KEEP, "--calibration", str(text)):
            return code
    say(f"{target} continues: {PROMPT}")
    return script("generate", "--model", str(target), "--prompt", PROMPT, "--raw", "--max-new-tokens", "60")


if __name__ == "__main__":
    sys.exit(main())
