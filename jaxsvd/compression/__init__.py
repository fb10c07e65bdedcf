"""Compressing a dense model folder into a low-rank one."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from jaxsvd import hub
from jaxsvd.checkpoint.files import TensorFiles
from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.checkpoint.write import TensorWriter, atomic_folder, copy_companions, write_json
from jaxsvd.compression.calibrate import DEFAULT_TOKENS, calibration_windows, input_moments
from jaxsvd.compression.svd import whitened_factors
from jaxsvd.errors import UsageError
from jaxsvd.weights import uniform_ranks

FORMAT_VERSION = 1


class Report(NamedTuple):
    """What `compress` made: the target, and the fractions kept of the projections, of all parameters and of bytes."""

    target: Path
    keep_linears: float
    keep_parameters: float
    keep_bytes: float
    factored: int
    matrices: int


def compress(
    source: str | Path,
    target: str | Path,
    keep: float = 0.8,
    *,
    calibration: Sequence[str | Path] = (),
    tokens: int = DEFAULT_TOKENS,
    rank_multiple: int | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Report:
    """Write a low-rank copy of a dense Llama or Qwen3: an ordinary HF folder with SVD-LLM's tensor names.

    Every projection gets the rank that keeps the fraction `keep` of its parameters, by SVD-LLM's truncation-aware
    whitening (Wang et al., ICLR 2025); where that rank, rounded, reaches break-even, the matrix stays dense.

    Args:
        source: a registry name, a Hub id or a folder; dense.
        target: the folder to write; it appears only when it is complete.
        keep: the fraction of each matrix's parameters to keep, between 0 and 1.
        calibration: text files that tell which inputs occur; by default English that comes with Python.
        tokens: how many tokens of them to use.
        rank_multiple: ranks are multiples of it; default 128, and 16 for models narrower than 2048.
        force: replace `target` if it exists.
        progress: a progress bar on stderr; by default where stderr is a terminal.

    Raises UsageError for arguments that can't be used, ModelError for a source that can't be loaded.
    """
    if not 0 < keep < 1:
        raise UsageError(f"keep is {keep}: expected a fraction between 0 and 1, such as 0.8")
    if rank_multiple is not None and rank_multiple < 1:
        raise UsageError(f"rank_multiple is {rank_multiple}: expected at least 1")
    folder, target = hub.resolve(source), Path(target)
    checkpoint = Checkpoint(folder)
    if checkpoint.ranks:
        raise UsageError(f"{folder} is low-rank already: compress the dense model that it was made from")
    multiple = rank_multiple or (128 if checkpoint.config.hidden_size >= 2048 else 16)
    with atomic_folder(target, force) as partial:
        windows, digest = calibration_windows(folder, calibration, tokens)
        hidden = None if progress is None else not progress
        with tqdm(desc="calibrating", unit="batch", file=sys.stderr, disable=hidden) as bar:
            moments = input_moments(checkpoint, windows, bar.update)
        with tqdm(desc="factoring", total=len(moments), unit="matrix", file=sys.stderr, disable=hidden) as bar:
            ranks, base = _write(checkpoint, partial, moments, uniform_ranks(keep, multiple), bar.update)
        copy_companions(folder, partial)
        report = _report(checkpoint, TensorFiles(partial), target, ranks)
        low_rank = {
            "format_version": FORMAT_VERSION,
            "method": "svd-llm",
            "base": {"name": str(source), "digest": base},
            "calibration": {"tokens": int(windows.size), "digest": digest},
            "keep": {
                "asked": keep,
                "linears": round(report.keep_linears, 6),
                "parameters": round(report.keep_parameters, 6),
                "bytes": round(report.keep_bytes, 6),
            },
            "ranks": ranks,
        }
        write_json(partial / "config.json", checkpoint.raw | {"low_rank": low_rank})
    return report


def _write(
    checkpoint: Checkpoint, partial: Path, moments: dict, rank_of: Any, progress: Any
) -> tuple[dict[str, int], str]:
    """Write all tensors, the projections factored; return the ranks, and the digest of the dense weights."""
    paths = {stored.weight: path for path, stored in checkpoint.matrices.items()}
    writer, ranks, digest = TensorWriter(partial), {}, hashlib.sha256()
    for name in sorted(checkpoint.files.entries):
        array, path = checkpoint.files.read(name), paths.get(name)
        digest.update(name.encode())
        digest.update(array.tobytes())
        rank = rank_of(path, array.shape[1], array.shape[0]) if path else None
        if path and rank:
            up, down = whitened_factors(array, moments[path], rank)
            stem = path.removesuffix("_proj")
            writer.add(f"{stem}_v_proj.weight", down.astype(array.dtype))
            writer.add(f"{stem}_u_proj.weight", up.astype(array.dtype))
            ranks[path] = rank
        else:
            writer.add(name, array)
        if path:
            progress(1)
    writer.close()
    return ranks, digest.hexdigest()


def _report(checkpoint: Checkpoint, after: TensorFiles, target: Path, ranks: dict[str, int]) -> Report:
    before = checkpoint.files
    shapes = [before.entries[stored.weight].shape for stored in checkpoint.matrices.values() if stored.weight]
    linears = sum(outputs * inputs for outputs, inputs in shapes)
    return Report(
        target,
        keep_linears=1 - (before.parameters - after.parameters) / linears,
        keep_parameters=after.parameters / before.parameters,
        keep_bytes=after.nbytes / before.nbytes,
        factored=len(ranks),
        matrices=len(shapes),
    )
