"""How a kernel is called from inside `jax.jit`: by nki on a device, by the emulator on the host, or in name only.

Which of the three is chosen in Python when the backend is built: the graph then holds one custom call, and no branch.
"""

import base64
import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

How = Literal["device", "emulated", "lowered"]

MEMBERS = 3  # matrices that the kernel takes at most: q, k and v
# Rows of x per call. All loops of a kernel are unrolled: the gate and up of a 4B at keep 0.8 take 12,000 instructions
# for so many, and AWS's compiler has needed half an hour and 30 GB for large matmuls (aws-neuron-sdk issue 1374).
TOKENS = 2048
# Physical cores that work as one. A kernel called without it takes one, but a Trainium2 is set to two by default.
LNC = 1
LNC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
CUSTOM_CALL = "AwsNeuronCustomNativeKernel"
KERNELS = {"xuv_group": "xuv", "swiglu_xuv": "mlp"}  # and the files that they are in
SECOND = {"xuv_group": ("v0", "v1", "v2"), "swiglu_xuv": ("v_gate", "v_up")}  # what they call the V of each member


class Call(NamedTuple):
    """Static under `jax.jit`: how a kernel is called, for which chip, which one, and what it is told beside arrays."""

    how: How
    target: str
    kernel: str
    widths: tuple[int, ...]
    x_layout: str = "rows"

    @property
    def options(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        return {"widths": self.widths, "x_layout": self.x_layout}


Outputs = Sequence[jax.ShapeDtypeStruct]
Arrays = Sequence[jax.Array | None]


def call(kernel: Call, outputs: Outputs, *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """Call a kernel on arrays, None for the V of a dense member; `outputs` are the shapes of what it gives."""
    return _CALLS[kernel.how](kernel, outputs, arrays)


def in_chunks(run: Callable[[jax.Array], Sequence[jax.Array]], x: jax.Array) -> list[jax.Array]:
    """`run` over x (tokens, in), `TOKENS` rows at a time, and its results (tokens, …) put together."""
    chunks = [run(x[start : start + TOKENS]) for start in range(0, x.shape[0], TOKENS)]  # static slices
    return list(chunks[0]) if len(chunks) == 1 else [jnp.concatenate(ys) for ys in zip(*chunks, strict=True)]


def _run(kernel: Call, outputs: Outputs, arrays: Arrays) -> tuple[jax.Array, ...]:
    """Call nki's kernel, which makes the custom call itself, on an explicit number of physical cores."""
    module = importlib.import_module(f"jaxsvd.kernels.neuron.{KERNELS[kernel.kernel]}")
    x, first, *second = arrays
    given = {name: v for name, v in zip(SECOND[kernel.kernel], second, strict=False) if v is not None}
    ys = getattr(module, kernel.kernel)[LNC](x, first, **given, **kernel.options)
    return tuple(ys) if isinstance(ys, tuple | list) else (ys,)


def _emulate(kernel: Call, outputs: Outputs, arrays: Arrays) -> tuple[jax.Array, ...]:
    """Run the kernel's file in NumPy, by a callback of the host."""
    from jaxsvd.kernels.neuron import emulator

    function = getattr(emulator.load(KERNELS[kernel.kernel]), kernel.kernel)

    def run(arrays: list[Any]) -> tuple[np.ndarray, ...]:
        # NumPy only: a JAX computation that starts in here can wait for ever for the one that called it.
        given = [None if array is None else np.asarray(array) for array in arrays]
        return tuple(emulator.run(function, *given, target=kernel.target, **kernel.options).outputs)

    return jax.pure_callback(run, tuple(outputs), list(arrays))


def _lower(kernel: Call, outputs: Outputs, arrays: Arrays) -> tuple[jax.Array, ...]:
    """Make the custom call that nki would, without the kernel in it: it can be lowered, not run.

    With it, a machine without AWS's packages sees the engine's graphs as they are on Trainium.
    """
    config = {"func_name": kernel.kernel, "grid": [LNC], "has_collectives": False}
    custom_call = jax.ffi.ffi_call(
        CUSTOM_CALL,
        tuple(outputs),
        custom_call_api_version=2,  # API_VERSION_STATUS_RETURNING
        legacy_backend_config=base64.b64encode(json.dumps(config).encode()).decode(),
    )
    return tuple(custom_call(*(array for array in arrays if array is not None)))


_CALLS = {"device": _run, "emulated": _emulate, "lowered": _lower}
