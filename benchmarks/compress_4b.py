"""Compress a few layers of a random Qwen3-4B from disk: what the whole would take, in memory and time.

    python benchmarks/compress_4b.py [--layers 2] [--tokens 24576] [--refit] [--out FILE]

Only whole layers are timed, the embedding's share of a 4B model is there in full; what is said of 36 layers is the time
per layer times 36: modelled, not run. Values are random, which costs the same as real ones and means nothing.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

import jaxsvd
from jaxsvd.checkpoint.write import TensorWriter, copy_companions, write_json
from jaxsvd.compression import Workspace
from jaxsvd.demo import get_demo_model, get_speeches

LAYERS = 36
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, layers: int) -> None:
    pool = np.random.default_rng(0).standard_normal(20_000_000, np.float32).astype(ml_dtypes.bfloat16)
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    writer = TensorWriter(folder)

    def add(name, *shape):
        scale = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        values = np.resize(np.roll(pool, len(name)), shape)
        writer.add(
            f"model.{name}.weight", np.ones_like(values) if len(shape) == 1 else values * values.dtype.type(scale)
        )

    add("embed_tokens", CONFIG["vocab_size"], hidden)
    add("norm", hidden)
    for i in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"layers.{i}.{name}", hidden)
        for name in ("q_norm", "k_norm"):
            add(f"layers.{i}.self_attn.{name}", head)
        for part, shapes in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in shapes.items():
                add(f"layers.{i}.{part}.{name}_proj", *shape)
    writer.close()
    copy_companions(get_demo_model(), folder)  # any tokenizer will do whose ids are in range
    write_json(folder / "config.json", CONFIG | {"num_hidden_layers": layers})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    times, save = {}, Workspace.save

    def timed(self, name, arrays):
        save(self, name, arrays)
        if not name.endswith("carry"):
            times.setdefault(name.split("/")[0].split("-")[0], []).append(time.perf_counter())

    Workspace.save = timed
    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
    (folder / "dense").mkdir()
    try:
        write_model(folder / "dense", args.layers)
        report = jaxsvd.compress(
            folder / "dense",
            folder / "low-rank",
            0.8,
            calibration=[get_speeches(1946, 1999)],
            tokens=args.tokens,
            refit=args.refit,
        )
    finally:
        shutil.rmtree(folder)
    # The first layer of a walk compiles; the others are what every further one costs.
    per_layer = {name: (stamps[-1] - stamps[0]) / (len(stamps) - 1) for name, stamps in times.items()}
    result = {
        "command": " ".join(["python", "benchmarks/compress_4b.py", *sys.argv[1:]]),
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax", "numpy")},
        "layers": args.layers,
        "seconds_per_layer": per_layer,
        "modelled_hours_of_36_layers": LAYERS * sum(per_layer.values()) / 3600,
        "seconds": report.seconds,
        "peak_gib": report.peak_bytes / 2**30,
        "keep_linears": report.keep_linears,
    }
    text = json.dumps(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
