"""`make demo`: get SmolLM2-135M-Instruct, compress it to keep 0.8, and let the low-rank model answer."""

import sys

PROMPTS = ("What is the capital of France?", "Write one sentence about the work of the Congress.")


def main() -> int:
    # This folder's inspect.py would hide the standard library's.
    sys.path[:] = [folder for folder in sys.path if folder != __file__.rpartition("/")[0]]
    import subprocess
    from pathlib import Path

    from jaxsvd.demo import get_low_rank_model
    from jaxsvd.errors import JaxsvdError

    try:
        model = get_low_rank_model()
    except JaxsvdError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    # A process of its own, as a user would run it, so that its memory and its time are its own too.
    script = Path(__file__).with_name("generate.py")
    return subprocess.run([sys.executable, str(script), "--model", str(model), *prompts]).returncode


if __name__ == "__main__":
    sys.exit(main())
