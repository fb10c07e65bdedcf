"""Of a real model on a GPU: the kernel's logits and greedy text beside XLA's.

    python benchmarks/accuracy_gpu.py MODEL [--tokens 64] [--backend gpu] [--out FILE]

Eight prompts, each alone and all as one batch. The text is that of XLA in bfloat16, forced on all; a distance is that
of the decoded tokens' logits from those of XLA in float32, relative. Where the kernel's own greedy text first is
another one, `gap` is by how much float32 prefers XLA's token, in logits, the two texts being the same before it. JSON
as the last line.
"""

import argparse
import json
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


Batches = Sequence[Sequence[list[int]]]


def greedy(engine: Engine, batches: Batches, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens (prompts, count), and the logits (prompts, count, vocab) that they are chosen from."""
    found = [np.stack(list(engine.follow(rows, count, lambda _, one: one.argmax(-1))), axis=1) for rows in batches]
    logits = np.concatenate(found)
    return logits.argmax(-1), logits


def forced(engine: Engine, batches: Batches, text: np.ndarray) -> np.ndarray:
    """The logits (prompts, tokens, vocab) that a text's tokens were to be chosen from."""
    left, found = iter(text), []
    for rows in batches:
        own = np.stack([next(left) for _ in rows])
        found.append(np.stack(list(engine.follow(rows, text.shape[1], lambda i, _, own=own: own[:, i])), axis=1))
    return np.concatenate(found)


def exactly(engine: Engine, prompts: Sequence[list[int]], text: np.ndarray) -> np.ndarray:
    """The same, all tokens at once."""
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, text.tolist(), strict=True)]
    starts = [len(prompt) - 1 for prompt in prompts]
    logits = engine.logits(rows)
    return np.stack([one[start : start + text.shape[1]] for one, start in zip(logits, starts, strict=True)])


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative, of the decoded tokens: a prompt's last one is XLA's in all."""
    return float(np.linalg.norm(actual[..., 1:, :] - expected[..., 1:, :]) / np.linalg.norm(expected[..., 1:, :]))


def compare(exact: Engine, plain: Engine, kernel: Engine, batches: Batches, count: int) -> dict:
    """All prompts, in such batches."""
    text, rounded = greedy(plain, batches, count)
    found, (own, _) = forced(kernel, batches, text), greedy(kernel, batches, count)
    expected = exactly(exact, [prompt for rows in batches for prompt in rows], text)
    differences = []
    for prompt, (theirs, ours) in enumerate(zip(text, own, strict=True)):
        for at in np.flatnonzero(theirs != ours)[:1]:
            gap = float(expected[prompt, at, theirs[at]] - expected[prompt, at, ours[at]])
            differences.append({"prompt": prompt, "token": int(at), "gap": gap})
    pairs = zip(found, rounded, expected, strict=True)
    return {
        "rows": len(batches[0]),
        "distance": {"xla": distance(rounded, expected), "kernel": distance(found, expected)},
        "ratio": distance(found, expected) / distance(rounded, expected),
        "ratio_of_each": [distance(ours, one) / distance(theirs, one) for ours, theirs, one in pairs],
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
    exact, plain, kernel = (model.engine for model in models)
    ways = [[prompt] for prompt in prompts], [prompts]
    with ThreadPoolExecutor() as pool:  # they compile side by side
        list(pool.map(lambda engine: [greedy(engine, batches[:1], 2) for batches in ways], (plain, kernel)))
    results = [compare(exact, plain, kernel, batches, args.tokens) for batches in ways]
    found = {**description(), "model": args.model, "tokens": args.tokens, "results": results}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
