"""Damaged and hostile model folders: each is refused with an error that says why, or runs and gives real numbers.

Whatever else happens (another exception, NaN, a hang) is a bug. The copies follow from their seeds.
"""

import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from factored import read_config, read_tensors, write_folder
from tiny import make_tiny

import jaxsvd

SECONDS = 20
PROMPT = [5, 17, 3, 99]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a folder with one layer, by file name."""
    folder = tmp_path_factory.mktemp("whole")
    make_tiny("llama-untied", folder)
    tensors = {name: array for name, array in read_tensors(folder).items() if ".layers.1." not in name}
    write_folder(folder, tensors, read_config(folder) | {"num_hidden_layers": 1})
    assert outcome(folder) == "ran"
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}


@pytest.fixture(scope="module", autouse=True)
def _cache_short_compilations():
    """Most copies that run are alike to the compiler; what it made of one serves the next."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


def outcome(folder: Path) -> str:
    """ "ran", or the message of the error on purpose. Anything else is raised."""
    start = time.perf_counter()
    try:
        lm = jaxsvd.load(folder, dtype="float32")
        tokens = lm.generate(PROMPT, max_new_tokens=4).token_ids
    except jaxsvd.JaxsvdError as error:
        message = str(error)
        assert len(message) >= 20
        # A file, a field of config.json, a tensor, the weights as such, or the request that does not fit the model.
        assert re.search(r"config\.json|safetensors|\w+\.weight|the weights|eos_token_id|prompt 0", message), message
        return message
    finally:
        assert time.perf_counter() - start < SECONDS
    assert all(0 <= token < lm.config.vocab_size for token in tokens)
    assert np.isfinite(lm.logits(PROMPT)).all()
    return "ran"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def split(weights: bytes) -> tuple[dict, bytes]:
    """A safetensors file to its header and its data."""
    (size,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def join(header: dict | bytes, data: bytes, size: int | None = None) -> bytes:
    """The reverse, with a header that may be any bytes and a length that may be a lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


# Random damage: (random numbers, bytes of both files) -> the bytes of the files that changed.


def flip(rng: np.random.Generator, data: bytes, start: int, end: int) -> bytes:
    """Flip a bit in one to four of the bytes."""
    damaged = bytearray(data)
    for at in rng.integers(start, end, rng.integers(1, 5)):
        damaged[at] ^= 1 << rng.integers(8)
    return bytes(damaged)


def flipped_header(rng, files):
    weights = files[WEIGHTS]
    return {WEIGHTS: flip(rng, weights, 0, len(weights) - len(split(weights)[1]))}


def flipped_data(rng, files):
    weights = files[WEIGHTS]
    return {WEIGHTS: flip(rng, weights, len(weights) - len(split(weights)[1]), len(weights))}


def flipped_config(rng, files):
    return {CONFIG: flip(rng, files[CONFIG], 0, len(files[CONFIG]))}


def cut_weights(rng, files):
    return {WEIGHTS: files[WEIGHTS][: rng.integers(len(files[WEIGHTS]))]}


def cut_config(rng, files):
    return {CONFIG: files[CONFIG][: rng.integers(len(files[CONFIG]))]}


def changed_shape(rng, files):
    """Another shape in the header: sometimes of as many numbers as before, mostly not."""
    header, data = split(files[WEIGHTS])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    shape = entry["shape"]
    changes = [
        shape[::-1],
        [1, *shape],
        [*shape, 0],
        shape[:-1],
        [2 * size for size in shape],
        [-size for size in shape],
    ]
    changes += [[int(np.prod(shape))], [2**40, 2**40], [*shape[:-1], shape[-1] - 1]]
    entry["shape"] = changes[rng.integers(len(changes))]
    return {WEIGHTS: join(header, data)}


ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**9, -(10**9), 2**63, 10**400, 0.5, 1e-300, 1e308, float("nan")),
    *(float("inf"), "", "64", "x" * 5000, [], {}, [[[[1]]]], [64], {"a": 1}),
]


def changed_field(rng, files):
    config = json.loads(files[CONFIG])
    holder = config["rope_parameters"] if rng.random() < 0.3 else config
    holder[rng.choice(sorted(holder))] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    return {CONFIG: json.dumps(config).encode()}


DAMAGES: dict[Callable, int] = {
    flipped_header: 40,
    flipped_data: 25,
    flipped_config: 35,
    cut_weights: 12,
    cut_config: 12,
    changed_shape: 16,
    changed_field: 30,
}


@pytest.mark.parametrize(
    ("damage", "seed"),
    [pytest.param(damage, seed, id=f"{damage.__name__}-{seed}") for damage, n in DAMAGES.items() for seed in range(n)],
)
def test_damaged_copy(whole, damage, seed, tmp_path):
    damaged = damage(np.random.default_rng(seed), whole)
    result = outcome(write(tmp_path, whole | damaged))
    if damage in (cut_weights, cut_config):
        assert result != "ran"


# Headers made to hurt.


def edited(name: str, **changes) -> Callable[[bytes], bytes]:
    def edit(weights: bytes) -> bytes:
        header, data = split(weights)
        header[name] = header.get(name, {}) | changes
        return join(header, data)

    return edit


def twice_named(weights: bytes) -> bytes:
    """JSON allows a key twice; the second entry points at other numbers."""
    header, data = split(weights)
    entry = header["model.norm.weight"] | {"data_offsets": [0, 256]}
    raw = json.dumps(header).encode()
    return join(raw[:-1] + b', "model.norm.weight": ' + json.dumps(entry).encode() + b"}", data)


NORM = "model.norm.weight"
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HOSTILE_HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda weights: b"",
    "seven bytes": lambda weights: weights[:7],
    "header length only": lambda weights: weights[:8],
    "header length 0": lambda weights: join(b"", split(weights)[1]),
    "header length 2**63": lambda weights: join(*split(weights), size=2**63),
    "header length 2**64-1": lambda weights: join(*split(weights), size=2**64 - 1),
    "header length 10**8": lambda weights: join(*split(weights), size=10**8),
    "header too short by one": lambda weights: join(
        split(weights)[0], b"", size=len(json.dumps(split(weights)[0])) - 1
    ),
    "deep JSON": lambda weights: join(DEEP, split(weights)[1]),
    "list": lambda weights: join(b"[1, 2, 3]", split(weights)[1]),
    "null": lambda weights: join(b"null", split(weights)[1]),
    "not JSON": lambda weights: join(b"\x80\x04]q\x00.", split(weights)[1]),
    "not UTF-8": lambda weights: join(b'{"\xff\xfe": 1}', split(weights)[1]),
    "UTF-16": lambda weights: join(json.dumps(split(weights)[0]).encode("utf-16"), split(weights)[1]),
    "overlapping": edited(NORM, data_offsets=[0, 256]),
    "beyond the end": edited(NORM, data_offsets=[10**12, 10**12 + 256]),
    "backwards": edited(NORM, data_offsets=[256, 0]),
    "negative offsets": edited(NORM, data_offsets=[-256, 0]),
    "offsets beyond 64 bits": edited(NORM, data_offsets=[2**64, 2**64 + 256]),
    "offsets no list": edited(NORM, data_offsets="0, 256"),
    "negative size": edited(NORM, shape=[-64]),
    "absurd size": edited(NORM, shape=[2**62, 2**62]),
    "product wraps around": edited(NORM, shape=[2**32, 2**32]),
    "fractional size": edited(NORM, shape=[64.5]),
    "many dimensions": edited(NORM, shape=[1] * 10_000 + [64]),
    "unknown dtype": edited(NORM, dtype="F31"),
    "dtype of another size": edited(NORM, dtype="F64"),
    "same size, no float": edited(NORM, dtype="I32"),
    "twice named": twice_named,
    "nothing": lambda weights: join(b"{}", b""),
    "bytes behind the end": lambda weights: weights + b"\0" * 100,
    "metadata of numbers": edited("__metadata__", format=5),
}


@pytest.mark.parametrize("kind", HOSTILE_HEADERS)
def test_hostile_header(whole, kind, tmp_path):
    result = outcome(write(tmp_path, whole | {WEIGHTS: HOSTILE_HEADERS[kind](whole[WEIGHTS])}))
    assert result != "ran" or kind == "twice named"  # then the norm's weights are other finite numbers


# Configs made to hurt.

HOSTILE_FIELDS = [
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", "1"),
    ("num_hidden_layers", [[1]]),
    ("hidden_size", 10**9),
    ("hidden_size", float("nan")),
    ("vocab_size", 2**31 - 1),
    ("vocab_size", {"a": [1]}),
    ("intermediate_size", 2**31 - 1),
    ("num_attention_heads", 2**31 - 1),
    ("num_attention_heads", 1),
    ("num_key_value_heads", 2**31 - 1),
    ("num_key_value_heads", 0),
    ("head_dim", 2**31 - 2),
    ("head_dim", 3),
    ("max_position_embeddings", 1),
    ("max_position_embeddings", 2**31 - 1),
    ("max_position_embeddings", "many"),
    ("rms_norm_eps", 10**400),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", 1e308),
    ("rms_norm_eps", 1e-300),
    ("model_type", ["llama"]),
    ("model_type", {}),
    ("model_type", "gpt2"),
    ("hidden_act", ["silu"]),
    ("tie_word_embeddings", "no"),
    ("attention_bias", [[True]]),
    ("rope_parameters", [1]),
    ("rope_parameters", "llama3"),
    ("rope_parameters", {"rope_type": ["llama3"]}),
    ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 10**400}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e-300}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e308}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-300}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "8"}),
    ("rope_scaling", [[1]]),
    ("eos_token_id", "</s>"),
    ("eos_token_id", [[2]]),
    ("eos_token_id", 2**70),
    ("eos_token_id", -5),
    ("low_rank", {"ranks": {"model.layers.0.mlp.up_proj": [[1]]}}),
    ("low_rank", [[[]]]),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [pytest.param(field, value, id=f"{field}={value!s:.40}") for field, value in HOSTILE_FIELDS],
)
def test_hostile_field(whole, field, value, tmp_path):
    config = json.loads(whole[CONFIG]) | {field: value}
    outcome(write(tmp_path, whole | {CONFIG: json.dumps(config).encode()}))


HOSTILE_CONFIGS = {
    "empty": b"",
    "list": b"[]",
    "number": b"5",
    "nothing": b"{}",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep field": b'{"model_type": "llama", "low_rank": ' + DEEP + b"}",
    "not UTF-8": b'{"model_type": "\xff"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "a number of 10000 digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}",
    "null bytes": b"\0" * 500,
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGS)
def test_hostile_config(whole, kind, tmp_path):
    assert "config.json" in outcome(write(tmp_path, whole | {CONFIG: HOSTILE_CONFIGS[kind]}))


def test_there_are_enough():
    assert sum(DAMAGES.values()) + len(HOSTILE_HEADERS) + len(HOSTILE_FIELDS) + len(HOSTILE_CONFIGS) >= 200
