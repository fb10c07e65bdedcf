"""A strict emulator of AWS NKI 0.6 in NumPy: it runs kernel files as they are, checks every documented rule and counts.

    from jaxsvd.kernels.neuron import emulator

    xuv = emulator.load("xuv")
    result = emulator.run(xuv.kernel, x, u, v, target="trn2")
    result.outputs, result.cost.as_dict()

It is strict: an instruction, keyword, dtype, view or name that is not modelled raises EmulationError, as every broken
rule does. Not modelled, among others: integers, float8 and MX types, access patterns (`ap`), views of another dtype,
indirect addressing, tiling and double rows of the Tensor Engine, reductions of activations, run-time loops, two logical
cores, collectives, placement by address, aliasing of inputs and outputs.

What it does not show: scheduling, overlap, queues, the compiler's allocation and spills, whether a kernel compiles, the
real clock. Kernels that pass have been checked against the documentation, and have not been run on Trainium.
"""

from jaxsvd.kernels.neuron.emulator.cost import Cost, TensorTraffic
from jaxsvd.kernels.neuron.emulator.errors import EmulationError
from jaxsvd.kernels.neuron.emulator.lint import Finding, lint
from jaxsvd.kernels.neuron.emulator.loader import load
from jaxsvd.kernels.neuron.emulator.runner import Run, run
from jaxsvd.kernels.neuron.emulator.targets import TARGETS, Target

__all__ = ["TARGETS", "Cost", "EmulationError", "Finding", "Run", "Target", "TensorTraffic", "lint", "load", "run"]
