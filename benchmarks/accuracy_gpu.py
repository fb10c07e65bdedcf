"""Of a real model on a GPU: the kernel's logits and greedy text beside XLA's.

    python benchmarks/accuracy_gpu.py MODEL [--tokens 64] [--backend gpu] [--out FILE]

Eight prompts, each alone and all as one batch. The text is that of XLA in bfloat16, forced on all; a distance is that
of the decoded tokens' logits from those of XLA in float32, relative. Where the kernel's own greedy text first is
another one, `gap` is by how much float32 prefers XLA's token, in logits, the two texts being the same before it. JSON
as the last line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

import jaxsvd
from jaxsvd.bench.machine import description
from jaxsvd.engine import Engine

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain because",
    "The three most important things in a good kitchen are",
    "In 1969, two astronauts",
    "Dear Sir or Madam, I am writing to",
    "A prime number is a number that",
]


def greedy(engine: Engine, prompts: Sequence[list[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens (rows, count), and the logits (rows, count, vocab) that they are chosen from."""
    logits = np.stack(list(engine.follow(prompts, count, lambda _, logits: logits.argmax(-1))), axis=1)
    return logits.argmax(-1), logits


def forced(engine: Engine, prompts: Sequence[list[int]], text: np.ndarray) -> np.ndarray:
    """The logits (rows, tokens, vocab) that a text's tokens were to be chosen from."""
    return np.stack(list(engine.follow(prompts, text.shape[1], lambda i, _: text[:, i])), axis=1)


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative, of the decoded tokens: a prompt's last one is XLA's in all."""
    return float(np.linalg.norm(actual[:, 1:] - expected[:, 1:]) / np.linalg.norm(expected[:, 1:]))


def compare(exact: Engine, plain: Engine, kernel: Engine, prompts: Sequence[list[int]], count: int) -> dict:
    """One batch of prompts."""
    (text, rounded), (own, _) = (greedy(engine, prompts, count) for engine in (plain, kernel))
    expected, found = (forced(engine, prompts, text) for engine in (exact, kernel))
    differences = []
    for row, (theirs, ours) in enumerate(zip(text, own, strict=True)):
        for at in np.flatnonzero(theirs != ours)[:1]:
            logits = expected[row, at]
            gap = float(logits[theirs[at]] - logits[ours[at]])
            differences.append({"row": row, "token": int(at), "gap": gap})
    distances = {"xla": distance(rounded, expected), "kernel": distance(found, expected)}
    return {
        "rows": len(prompts),
        "distance": distances,
        "ratio": distances["kernel"] / distances["xla"],
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the GPU kernel with XLA on a real model.")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64, help="of each text, at most 96 (default: 64)")
    parser.add_argument("--backend", default="gpu", help="the one that is compared (default: gpu)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 is else rounded to TF32
    kinds = ("float32", "xla"), ("bfloat16", "xla"), ("bfloat16", args.backend)
    models = [jaxsvd.load(args.model, dtype, backend, buckets="32/128") for dtype, backend in kinds]
    prompts = [models[0].tokenizer.encode(text) for text in PROMPTS]
    engines = [model.engine for model in models]
    batches = [*([prompt] for prompt in prompts), prompts]
    with ThreadPoolExecutor() as pool:  # they compile side by side
        list(pool.map(lambda engine: [greedy(engine, batch, 2) for batch in batches[-2:]], engines))
    results = []
    for batch in batches:
        results.append(compare(*engines, batch, args.tokens))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    found = {**description(), "model": args.model, "tokens": args.tokens, "results": results}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
