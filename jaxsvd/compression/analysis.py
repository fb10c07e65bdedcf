"""What compressing would cost, matrix by matrix: from calibration to nested factors and predicted losses on disk.

Everything here is independent of the budget: one analysis serves every keep.
"""

from collections.abc import Callable

import numpy as np

from jaxsvd.checkpoint.read import Checkpoint
from jaxsvd.compression.methods import METHODS, Evidence, Moment, factor, losses, tails
from jaxsvd.compression.options import Options
from jaxsvd.compression.passes import LayerPass
from jaxsvd.compression.width import removal_order
from jaxsvd.compression.workspace import Arrays, Workspace
from jaxsvd.weights import break_even

Progress = Callable[[str, int], Callable[[int], object]]  # (what, how many) -> told of each that is done


class Analysis:
    """The analysis of a dense checkpoint, in a workspace.

    Args:
        checkpoint: of the dense model.
        work: where results are kept, and found again.
        options: of which the keep, the plan and the refit don't matter here.
        windows: int32 (n, window) calibration tokens.
        gradient_windows: those of them that gradients are taken on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: Workspace,
        options: Options,
        windows: np.ndarray,
        gradient_windows: np.ndarray,
    ) -> None:
        self.checkpoint, self.options, self.windows = checkpoint, options, windows
        self._work, self._gradient_windows = work, gradient_windows
        self.passes = LayerPass(checkpoint, windows.shape[1])

    def run(self, progress: Progress) -> None:
        """Do what is not done yet."""
        layers, needs = range(self.checkpoint.config.num_layers), self.options.needs
        if needs & {"gradients", "fisher"}:
            told = progress("forward", len(layers))
            last = self._work.sequence("states", layers, self._embedded(self._gradient_windows), self._forward, told)
            told = progress("gradients", len(layers))
            self._work.sequence("gradients", reversed(layers), lambda: self._head(last["x"]), self._backward, told)
        told = progress("factoring", len(layers))
        first = self._embedded(self.windows) if "inputs" in needs else dict
        self._work.sequence("factors", layers, first, self._factor, told)

    def layer(self, index: int, only: str = "") -> Arrays:
        """What is known of a layer: of every selected matrix `{path}.up`, `.down` and `.losses`; with narrower MLPs,
        `order` and `moment` of the MLP's neurons and what keeping k of them loses, `{mlp}.losses`. With `only`, what
        ends so.
        """
        return self._work.load(f"factors/{index}", only)

    def losses(self, index: int) -> dict[str, np.ndarray]:
        """What every rank of a layer's matrices loses (k+1,), by path, and every width of its MLP, under the MLP's."""
        return {name.removesuffix(".losses"): lost for name, lost in self.layer(index, ".losses").items()}

    def evidence(self, index: int) -> dict[str, Evidence]:
        """What was kept of the evidence for a layer's matrices: all but their inputs."""
        if not self.options.needs & {"gradients", "fisher"}:
            return {path: Evidence() for path in self.passes.paths(index)}
        kept = self._work.load(f"gradients/{index}")
        return {
            path: Evidence(
                gradients=Moment(kept[f"{path}.gradients"].astype(np.float64)), fisher=kept.get(f"{path}.fisher")
            )
            for path in self.passes.paths(index)
        }

    def weight(self, path: str) -> np.ndarray:
        """The dense matrix (out, in)."""
        name = self.checkpoint.matrices[path].weight
        assert name
        return self.checkpoint.files.read(name)

    def _embedded(self, windows: np.ndarray) -> Callable[[], Arrays]:
        return lambda: {"x": self.passes.embed(windows)}

    def _forward(self, index: int, carry: Arrays) -> tuple[Arrays, Arrays]:
        return {"x": self.passes.forward(self.passes.load(index), carry["x"])}, carry

    def _head(self, x: np.ndarray) -> Arrays:
        return {"dy": self.passes.loss_gradient(x, self._gradient_windows)[0]}

    def _backward(self, index: int, carry: Arrays) -> tuple[Arrays, Arrays]:
        x = self._work.load(f"states/{index}")["x"]
        fisher = "fisher" in self.options.needs
        dx, gradients, rows = self.passes.backward(self.passes.load(index), x, carry["dy"], fisher)
        paths = self.passes.paths(index)
        result = {f"{path}.gradients": g.astype(np.float32) for path, g in zip(paths, gradients, strict=True)}
        result |= {f"{path}.fisher": row for path, row in zip(paths, rows, strict=False)}
        return {"dy": dx}, result

    def _factor(self, index: int, carry: Arrays) -> tuple[Arrays, Arrays]:
        evidence = self.evidence(index)
        if "inputs" in self.options.needs:
            x, seconds, firsts = self.passes.moments(self.passes.load(index), carry["x"])
            carry = {"x": x}
            for group, second, first in zip(self.passes.groups(index), seconds, firsts, strict=True):
                moment = Moment(second)  # one for the group: its root is taken once
                for path in group:
                    evidence[path].inputs, evidence[path].magnitudes = moment, first
        result: Arrays = {}
        for path, known in evidence.items():
            if self.options.selects(path):
                result |= {f"{path}.{name}": array for name, array in self._factors(path, known).items()}
        mlp = f"model.layers.{index}.mlp"
        down = f"{mlp}.down_proj"
        if self.options.width and self.options.selects(down):
            known = evidence[down]
            assert known.inputs
            order, lost = removal_order(self.weight(down), known.loss_metric, known.inputs)
            result |= {"order": order, f"{mlp}.losses": lost, "moment": known.inputs.matrix.astype(np.float32)}
        return carry, result

    def _factors(self, path: str, known: Evidence) -> Arrays:
        weight = self.weight(path)
        outputs, inputs = weight.shape
        rank = min(outputs, inputs, int(break_even(inputs, outputs)))
        found = factor(weight, METHODS[self.options.method].metric(known), rank)
        result = {"up": found.up.astype(weight.dtype), "down": found.down.astype(weight.dtype)}
        if not self.options.predicts:
            return result
        own = self.options.method == "kfac"
        result["losses"] = tails(found.energies, rank) if own else losses(weight, found, known.loss_metric)
        return result
