"""A plan for people: as a table, and as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxsvd import plots
from jaxsvd.compression.plan import Plan, Shape

if TYPE_CHECKING:
    from jaxsvd.compression import Report

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
KEEPS = tuple(percent / 100 for percent in range(40, 100, 5))


def paths_of(layer: int) -> list[str]:
    """The seven projections of a layer, in the order of KINDS."""
    parts = ["self_attn" if kind in "qkvo" else "mlp" for kind in KINDS]
    return [f"model.layers.{layer}.{part}.{kind}_proj" for part, kind in zip(parts, KINDS, strict=True)]


def table(report: "Report") -> str:
    """A line per layer: the rank of every projection, `dense`, or the width of a narrowed MLP."""
    plan = report.plan
    lines = ["layer " + "".join(f"{kind:>8}" for kind in KINDS)]
    for layer in range(report.matrices // len(KINDS)):
        width = plan.widths.get(f"model.layers.{layer}.mlp")
        cells = [
            f"w{width}" if width and ".mlp." in path else str(plan.ranks.get(path, "dense")) for path in paths_of(layer)
        ]
        lines.append(f"{layer:>5} " + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def draw(
    path: Path, shapes: dict[str, Shape], plan: Plan, loss_at: Callable[[float], float | None] | None = None
) -> None:
    """Draw what is kept of every projection, by layer, and the predicted loss against keep.

    Args:
        path: the file to write.
        shapes: of every projection of the dense model.
        plan: the plan.
        loss_at: the predicted loss of the plan for another keep, None where that keep is out of reach.
    """
    import numpy as np

    layers = len(shapes) // len(KINDS)
    kept = [[plan.left(name, shapes[name]) / np.prod(shapes[name]) for name in paths_of(i)] for i in range(layers)]
    figure = plots.figure(10, 6 if loss_at else 3.2)
    upper, *lower = figure.subplots(2 if loss_at else 1, 1, squeeze=False)[:, 0]
    image = upper.imshow(np.transpose(kept), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    upper.set(title="kept of each projection (1: dense)", xlabel="layer", yticks=range(len(KINDS)), yticklabels=KINDS)
    upper.locator_params(axis="x", integer=True)
    figure.colorbar(image, ax=upper)
    if loss_at:
        found = [(keep, loss) for keep in KEEPS if (loss := loss_at(keep)) is not None]
        lower[0].plot(*zip(*found, strict=True), marker="o")
        lower[0].set(title="predicted loss", xlabel="keep of the projections", ylabel="nats per token", yscale="log")
        lower[0].grid(alpha=0.3)
    figure.savefig(path)
