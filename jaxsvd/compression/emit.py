"""From a plan to the tensors of the target."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxsvd.checkpoint.read import Checkpoint, Kept
from jaxsvd.checkpoint.write import TensorWriter
from jaxsvd.compression.analysis import Analysis
from jaxsvd.compression.methods import Moment
from jaxsvd.compression.plan import Plan, Shape
from jaxsvd.compression.width import kept_neurons, repaired
from jaxsvd.compression.workspace import Arrays


def kept(checkpoint: Checkpoint, plan: Plan) -> Kept:
    """What is left of a dense checkpoint."""
    files, linears, saved, saved_bytes = checkpoint.files, 0, 0, 0
    names = {path: stored.weight for path, stored in checkpoint.matrices.items() if stored.weight}
    for path, shape in shapes(checkpoint).items():
        whole = shape.inputs * shape.outputs
        gone = whole - plan.left(path, shape)
        linears += whole
        saved += gone
        saved_bytes += gone * files.itemsize(names[path])
    return Kept(1 - saved / linears, 1 - saved / files.parameters, 1 - saved_bytes / files.nbytes)


def shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """The shape of every projection of a dense checkpoint."""
    return {path: Shape(*shape) for path, shape in checkpoint.shapes.items()}


def digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 of all tensors, by name and content."""
    total = hashlib.sha256()
    for name in sorted(checkpoint.files.entries):
        total.update(name.encode())
        total.update(np.ascontiguousarray(checkpoint.files.read(name)).view(np.uint8).data)
    return total.hexdigest()


def write_tensors(
    checkpoint: Checkpoint, results: Callable[[int], Arrays], target: Path, progress: Callable[[int], object]
) -> None:
    """Write the target's tensors layer by layer, those of `results` in the place of the dense ones.

    `results(layer)` has `{path}.up` (out, r) and `.down` (r, in), or `.weight` (out, in), of matrices that changed.
    """
    writer = TensorWriter(target)
    paths = {stored.weight: path for path, stored in checkpoint.matrices.items() if stored.weight}
    for layer, names in _by_layer(checkpoint):
        changed = results(layer) if layer is not None else {}
        for name in names:
            path = paths.get(name, "")
            stem = path.removesuffix("_proj")
            if f"{path}.up" in changed:
                writer.add(f"{stem}_v_proj.weight", changed[f"{path}.down"])
                writer.add(f"{stem}_u_proj.weight", changed[f"{path}.up"])
            else:
                writer.add(name, changed.get(f"{path}.weight", checkpoint.files.read(name)))
        progress(layer is not None)
    writer.close()


def planned(analysis: Analysis, plan: Plan) -> Callable[[int], Arrays]:
    """The results of a plan as the analysis has them: the leading ranks of nested factors, and narrowed MLPs."""

    def results(layer: int) -> Arrays:
        known, changed = analysis.layer(layer), {}
        for path in analysis.passes.paths(layer):
            if rank := plan.ranks.get(path):
                changed[f"{path}.up"] = known[f"{path}.up"][:, :rank]
                changed[f"{path}.down"] = known[f"{path}.down"][:rank]
        mlp = f"model.layers.{layer}.mlp"
        if width := plan.widths.get(mlp):
            neurons = kept_neurons(known["order"], width)
            for name in ("gate_proj", "up_proj"):
                changed[f"{mlp}.{name}.weight"] = analysis.weight(f"{mlp}.{name}")[neurons]
            down = analysis.weight(f"{mlp}.down_proj")
            moment = Moment(known["moment"].astype(np.float64))
            changed[f"{mlp}.down_proj.weight"] = repaired(down, moment, neurons).astype(down.dtype)
        return changed

    return results


def _by_layer(checkpoint: Checkpoint) -> Iterator[tuple[int | None, list[str]]]:
    """The names of all tensors: those of no layer first, then layer by layer."""
    groups: dict[int | None, list[str]] = {None: []}
    for name in sorted(checkpoint.files.entries):
        parts = name.split(".")
        groups.setdefault(int(parts[2]) if name.startswith("model.layers.") else None, []).append(name)
    yield None, groups.pop(None)
    yield from sorted(groups.items())
