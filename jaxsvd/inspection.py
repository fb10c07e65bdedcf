"""What is in a checkpoint, from its headers alone, and how fast it can run at most."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsvd.checkpoint.read import Checkpoint, Kept
from jaxsvd.compression import report
from jaxsvd.compression.plan import Plan, Shape
from jaxsvd.config import ModelConfig
from jaxsvd.errors import UsageError
from jaxsvd.weights import break_even

# Peak memory bandwidth, GB/s. GPUs: NVIDIA's data sheets (H200: 4.8 TB/s; H100 SXM: 3.35; A100 80GB SXM: 2.039).
# Trainium: a core's share of its chip's HBM, AWS's pages on the NeuronDevice architectures: trn1 820 / 2 cores,
# trn2 2900 / 8, trn3 4900 / 8.
HARDWARE = {"h200": 4800.0, "h100": 3350.0, "a100": 2039.0, "trn1": 410.0, "trn2": 362.0, "trn3": 612.0}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class MatrixInfo(NamedTuple):
    """One projection: x (…, `inputs`) to (…, `outputs`).

    `rank` is None where it is stored dense; `dense_outputs` and `dense_inputs` are those of the dense model, of which
    `keep` is the fraction of the parameters that are left. From the `break_even` rank on, low rank is not smaller, and
    it runs multiplied out. `nbytes` are those of the file, `dtype` its name for them; a down factor that another
    projection holds, `shared`, is counted there.
    """

    path: str
    inputs: int
    outputs: int
    dense_inputs: int
    dense_outputs: int
    rank: int | None
    keep: float
    break_even: float
    nbytes: int
    dtype: str
    shared: str | None

    @property
    def kind(self) -> str:
        """How it is stored."""
        narrowed = (self.inputs, self.outputs) != (self.dense_inputs, self.dense_outputs)
        return "low rank" if self.rank is not None else "narrowed" if narrowed else "dense"

    @property
    def parameters(self) -> int:
        """What is multiplied: the smaller of the factors, without a shared one, and their product."""
        dense = self.inputs * self.outputs
        if self.rank is None or self.rank >= self.break_even:
            return dense
        return self.rank * (self.outputs + (0 if self.shared else self.inputs))


class Floor(NamedTuple):
    """The least time of a decoded token, batch 1 and no cache, at a bandwidth in GB/s: seconds, and of the dense."""

    hardware: str
    bandwidth: float
    seconds: float
    dense_seconds: float


class Inspection(NamedTuple):
    """A checkpoint.

    `nbytes` are those of its files; `step_bytes` and `dense_step_bytes` what a decode step must read in `dtype`, all
    weights once (of an embedding that is not also the head, a row: not counted), of this model and of the dense one.
    """

    folder: Path
    config: ModelConfig
    matrices: list[MatrixInfo]
    kept: Kept
    parameters: int
    nbytes: int
    dtype: str
    step_bytes: int
    dense_step_bytes: int
    floors: list[Floor]

    @property
    def speedup_bound(self) -> float:
        """The most that low rank can speed decoding up: the dense model's bytes over these."""
        return self.dense_step_bytes / self.step_bytes


def inspect(checkpoint: Checkpoint, dtype: str = "bfloat16", bandwidths: Mapping[str, float] = HARDWARE) -> Inspection:
    """Look into a checkpoint. No weight is read, and nothing gets on a device.

    Args:
        checkpoint: an opened one.
        dtype: what the model is to run in, for the floors: "bfloat16", "float16" or "float32".
        bandwidths: GB/s by the names of the hardware.

    Raises UsageError for a dtype or a bandwidth that there is not.
    """
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    for name, bandwidth in bandwidths.items():
        if not 0 < bandwidth < math.inf:
            raise UsageError(f"the bandwidth of {name} is {bandwidth} GB/s: expected a number above 0")
    matrices, files = _matrices(checkpoint), checkpoint.files
    rest = _rest(checkpoint)
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    step = itemsize * (rest + sum(matrix.parameters for matrix in matrices))
    dense = itemsize * (rest + sum(matrix.dense_inputs * matrix.dense_outputs for matrix in matrices))
    floors = [Floor(name, gb, step / gb / 1e9, dense / gb / 1e9) for name, gb in bandwidths.items()]
    return Inspection(
        checkpoint.folder,
        checkpoint.config,
        matrices,
        checkpoint.keep,
        files.parameters,
        files.nbytes,
        dtype,
        step,
        dense,
        floors,
    )


def bandwidths(names: list[str], given: float | None = None) -> dict[str, float]:
    """The bandwidths of named hardware, and one that was given in GB/s; all named ones where nothing is asked for."""
    if unknown := [name for name in names if name.lower() not in HARDWARE]:
        raise UsageError(
            f"there is no hardware {unknown[0]!r}: choose one of {', '.join(HARDWARE)}, or give its --bandwidth in GB/s"
        )
    found = {name.lower(): HARDWARE[name.lower()] for name in names}
    if given is not None:
        found["given"] = given
    return found or dict(HARDWARE)


def _matrices(checkpoint: Checkpoint) -> list[MatrixInfo]:
    files, shared, dense = checkpoint.files, checkpoint.shared, checkpoint.dense_shapes
    found = []
    for path, stored in checkpoint.matrices.items():
        inputs, outputs = checkpoint.shapes[path]
        names = [stored.weight, stored.up, None if path in shared else stored.down]
        sizes = {name: math.prod(files.entries[name].shape) for name in names if name}
        found.append(
            MatrixInfo(
                path,
                inputs,
                outputs,
                *dense[path],
                stored.rank,
                sum(sizes.values()) / math.prod(dense[path]),
                break_even(inputs, outputs),
                sum(size * files.itemsize(name) for name, size in sizes.items()),
                "+".join(dict.fromkeys(files.entries[name].dtype for name in sizes)),
                shared.get(path),
            )
        )
    return found


def _rest(checkpoint: Checkpoint) -> int:
    """The parameters beside the projections that a decode step reads: norms, biases and the head."""
    entries, config = checkpoint.files.entries, checkpoint.config
    names = [*checkpoint.arrays, *(stored.bias for stored in checkpoint.matrices.values() if stored.bias)]
    table = 0 if config.tied else config.vocab_size * config.hidden_size
    return sum(math.prod(entries[name].shape) for name in names) - table


def table(found: Inspection) -> str:
    """The architecture, a line per projection, the totals and the floors."""
    config = found.config
    lines = [
        f"{found.folder}: {config.architecture}, {config.num_layers} layers of {config.hidden_size}, "
        f"MLP {config.intermediate_size}, {config.num_heads} heads ({config.num_kv_heads} of keys) of "
        f"{config.head_dim}, vocabulary {config.vocab_size}{', tied' if config.tied else ''}",
        "",
    ]
    rows = [["projection", "in", "out", "rank", "break-even", "keep", "MB", "dtype", "stored"]]
    for each in found.matrices:
        rank = "" if each.rank is None else str(each.rank)
        numbers = [f"{each.break_even:.0f}", f"{each.keep:.3f}", f"{each.nbytes / 1e6:.2f}"]
        rows.append([each.path, str(each.inputs), str(each.outputs), rank, *numbers, each.dtype, _stored(each)])
    lines += [*_aligned(rows), "", *_totals(found), ""]
    rows = [["floor per token", "GB/s", "ms", "dense, ms"]]
    for floor in found.floors:
        times = [f"{1e3 * seconds:.3f}" for seconds in (floor.seconds, floor.dense_seconds)]
        rows.append([floor.hardware, f"{floor.bandwidth:g}", *times])
    return "\n".join([*lines, *_aligned(rows)])


def _stored(each: MatrixInfo) -> str:
    if each.rank is not None and each.rank >= each.break_even:
        return "low rank, runs dense: at or above break-even"
    return each.kind + (f", shares the factor of {each.shared}" if each.shared else "")


def _totals(found: Inspection) -> list[str]:
    factored = sum(each.rank is not None for each in found.matrices)
    kept = found.kept
    return [
        f"low rank   {factored} of {len(found.matrices)} projections",
        f"keep       {kept.linears:.4f} of the projections, {kept.parameters:.4f} of all parameters, "
        f"{kept.bytes:.4f} of all bytes",
        f"size       {found.parameters / 1e6:.1f} M parameters, {found.nbytes / 1e6:.1f} MB of files",
        f"a token    reads {found.step_bytes / 1e6:.1f} MB in {found.dtype}, of the dense model "
        f"{found.dense_step_bytes / 1e6:.1f} MB, the cache not counted",
        f"speed-up   at most {found.speedup_bound:.3f} over the dense model where memory is the limit (predicted)",
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def as_json(found: Inspection) -> dict[str, Any]:
    """All of it. Times are in seconds, bandwidths in GB/s."""
    numbers = found._asdict() | {"folder": str(found.folder), "kept": found.kept._asdict()}
    config = {name: getattr(found.config, name) for name in _SHOWN}
    matrices = [each._asdict() | {"stored": each.kind, "parameters": each.parameters} for each in found.matrices]
    floors = [floor._asdict() for floor in found.floors]
    return numbers | {
        "config": config,
        "matrices": matrices,
        "floors": floors,
        "speedup_bound": found.speedup_bound,
    }


_SHOWN = (
    "architecture",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_positions",
    "tied",
    "mlp_widths",
)


def draw(found: Inspection, path: Path) -> None:
    """Draw what is kept of every projection, by layer, as the compressor's report does. `plots.check` comes first."""
    shapes = {each.path: Shape(each.dense_inputs, each.dense_outputs) for each in found.matrices}
    ranks = {each.path: each.rank for each in found.matrices if each.rank is not None}
    widths = {f"model.layers.{layer}.mlp": width for layer, width in found.config.mlp_widths}
    costs = (sum(each.parameters for each in found.matrices), sum(map(math.prod, shapes.values())))
    report.draw(path, shapes, Plan(ranks, widths, *costs, None))
