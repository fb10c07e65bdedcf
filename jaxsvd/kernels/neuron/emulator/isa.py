"""`nki.isa`: the instructions that are modelled, by the engine that runs them, and their enums."""

from typing import Any

from jaxsvd.kernels.neuron.emulator.isa_dma import dma_copy, dma_transpose
from jaxsvd.kernels.neuron.emulator.isa_scalar import activation
from jaxsvd.kernels.neuron.emulator.isa_tensor import nc_matmul, nc_transpose
from jaxsvd.kernels.neuron.emulator.isa_vector import (
    memset,
    reciprocal,
    tensor_copy,
    tensor_reduce,
    tensor_scalar,
    tensor_tensor,
)
from jaxsvd.kernels.neuron.emulator.machine import current
from jaxsvd.kernels.neuron.emulator.operands import DgeMode, Engine, MatmulPerfMode, NcVersion, OobMode, ReduceCmd


def get_nc_version() -> NcVersion:
    """The generation of the target."""
    return NcVersion(current().target.generation)


SURFACE: dict[str, Any] = {
    **{"engine": Engine, "dge_mode": DgeMode, "oob_mode": OobMode, "nc_version": NcVersion},
    **{"matmul_perf_mode": MatmulPerfMode, "reduce_cmd": ReduceCmd},
    **{
        function.__name__: function
        for function in (
            *(activation, dma_copy, dma_transpose, get_nc_version, memset, nc_matmul, nc_transpose, reciprocal),
            *(tensor_copy, tensor_reduce, tensor_scalar, tensor_tensor),
        )
    },
}
