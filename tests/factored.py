"""Low-rank model folders made from dense ones, and the torch model that they must equal.

The tensor names are spelled out here, apart from `jaxsvd.checkpoint.families`, so that a slip there shows.
"""

import copy
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

# Layout -> the modules of the first factor, stored (rank, in), and of the second, stored (out, rank).
NAMES = {
    "svd-llm": ("{stem}_v_proj", "{stem}_u_proj"),
    "svd-llm-hf": ("{path}.v_proj", "{path}.u_proj"),
    "asvd": ("{path}.BLinear", "{path}.ALinear"),
    "dobi-svd": ("{path}.ALinear", "{path}.BLinear"),
    "kfac-svd": ("{path}.mod_a", "{path}.mod_b"),
    "aa-svd": ("{path}.V", "{path}.U"),
    "dynrank": ("{path}.first", "{path}.second"),
}
MIXED_RANKS = (7, 13, None, 1, 20, 16, 5, 2)  # all below the break-even of the tiny models' matrices


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an unsharded folder."""
    return load_file(folder / "model.safetensors")


def read_config(folder: Path) -> dict:
    """Its config.json."""
    return json.loads((folder / "config.json").read_text())


def write_folder(folder: Path, tensors: Mapping[str, np.ndarray], config: dict, shards: int = 1) -> Path:
    """Write a model folder; with several shards, an index as well."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: np.array(array, order="C") for name, array in tensors.items()}
    if shards == 1:
        save_file(contiguous, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(contiguous)}
    for file in set(weight_map.values()):
        save_file({name: contiguous[name] for name in contiguous if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def projections(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The paths of a dense model's matrices, without embedding and head."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def mixed_ranks(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Another rank for each matrix; some stay dense."""
    pairs = zip(projections(tensors), itertools.cycle(MIXED_RANKS), strict=False)
    return {path: rank for path, rank in pairs if rank is not None}


@functools.lru_cache(maxsize=512)
def _svd(data: bytes, shape: tuple[int, int], dtype: str):
    """Many tests factor the same few matrices."""
    return np.linalg.svd(np.frombuffer(data, dtype).reshape(shape), full_matrices=False)


def factor(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(out, in) to the factors as they are stored, (rank, in) and (out, rank), by SVD."""
    u, s, vt = _svd(weight.tobytes(), weight.shape, weight.dtype.name)
    root = np.sqrt(s[:rank])
    return root[:, None] * vt[:rank], u[:, :rank] * root


def names(path: str, layout: str) -> tuple[str, str]:
    """The modules of both factors of a matrix."""
    down, up = NAMES[layout]
    stem = path.removesuffix("_proj")
    return down.format(path=path, stem=stem), up.format(path=path, stem=stem)


def write_factored(
    dense: Path,
    target: Path,
    ranks: Mapping[str, int],
    layout: str = "svd-llm",
    second_bias: bool = False,
    dtypes: Sequence = (np.float32,),
    shards: int = 1,
) -> dict[str, np.ndarray]:
    """Factor the matrices that `ranks` names, in a copy of a dense folder.

    Args:
        dense: the unsharded folder to copy.
        target: where to write.
        ranks: matrix path to rank; the other matrices stay dense.
        layout: a key of NAMES.
        second_bias: put the bias of a factored matrix on its second factor, not under its own path.
        dtypes: of the stored tensors, dealt out in turn.
        shards: how many files.

    Returns:
        The dense float32 tensors that the copy stands for, under their dense names.
    """
    dtype_of = itertools.cycle(dtypes)
    stored, equal = {}, {}

    def put(name: str, array: np.ndarray) -> np.ndarray:
        stored[name] = array.astype(next(dtype_of))
        return stored[name].astype(np.float32)

    for name, array in read_tensors(dense).items():
        path, kind = name.rsplit(".", 1)
        if path not in ranks:
            equal[name] = put(name, array)
        elif kind == "bias":
            equal[name] = put(f"{names(path, layout)[1]}.bias" if second_bias else name, array)
        else:
            down, up = names(path, layout)
            first, second = factor(array, ranks[path])
            first, second = put(f"{down}.weight", first), put(f"{up}.weight", second)
            equal[name] = second @ first
    write_folder(target, stored, read_config(dense), shards)
    return equal


def with_weights(model, tensors: Mapping[str, np.ndarray]):
    """A copy of a torch model that has these weights: the oracle of a factored folder."""
    import torch

    changed = copy.deepcopy(model)
    missing, unexpected = changed.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # a tied head has no tensor of its own
    return changed
