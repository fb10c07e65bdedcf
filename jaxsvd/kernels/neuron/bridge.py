"""How a kernel is called from inside `jax.jit`: by nki on a device, by the emulator on the host, or in name only.

Which of the three is chosen in Python when the backend is built: the graph then holds one custom call, and no branch.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

How = Literal["device", "emulated", "lowered"]

MEMBERS = 3  # matrices that the kernel takes at most: q, k and v
# Rows of x per call. All loops of a kernel are unrolled: the gate and up of a 4B at keep 0.8 take 13,000 instructions
# for so many, and AWS's compiler has needed half an hour and 30 GB for large matmuls (aws-neuron-sdk issue 1374).
TOKENS = 2048
# Physical cores that work as one. A kernel called without it takes one, but a Trainium2 is set to two by default.
LNC = 1
LNC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
TARGETS = ("trn1", "trn2", "trn3")
CUSTOM_CALL = "AwsNeuronCustomNativeKernel"


class Call(NamedTuple):
    """Static under `jax.jit`: how the kernel is called, for which chip, and the columns of `first` of each member."""

    how: How
    target: str
    widths: tuple[int, ...]


def project(call: Call, x: jax.Array, first: jax.Array, second: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """x (tokens, in) through a group's matrices: (tokens, out) of each in x's dtype, `TOKENS` rows at a time.

    Args:
        call: see `Call`.
        x: any number of rows.
        first: (in, sum of widths), each low-rank member's U and each dense one's matrix side by side.
        second: each low-rank member's V (width, out); None for a dense one.
    """
    chunks = [x[start : start + TOKENS] for start in range(0, x.shape[0], TOKENS)]  # static slices
    results = [_CALLS[call.how](call, chunk, first, second) for chunk in chunks]
    if len(results) == 1:
        return results[0]
    return tuple(jnp.concatenate(ys) for ys in zip(*results, strict=True))


def _shapes(call: Call, x: jax.Array, second: Sequence[jax.Array | None]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the kernel returns."""
    outputs = [width if v is None else v.shape[1] for width, v in zip(call.widths, second, strict=True)]
    return tuple(jax.ShapeDtypeStruct((x.shape[0], width), x.dtype) for width in outputs)


def _run(call: Call, x: jax.Array, first: jax.Array, second: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """Call nki's kernel, which makes the custom call itself, on an explicit number of physical cores."""
    from jaxsvd.kernels.neuron.xuv import xuv_group

    kernel: Any = xuv_group  # `nki.jit` makes it one
    ys = kernel[LNC](x, first, *second, widths=call.widths)
    return tuple(ys) if isinstance(ys, tuple | list) else (ys,)


def _emulate(call: Call, x: jax.Array, first: jax.Array, second: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """Run the kernel's file in NumPy, by a callback of the host."""
    from jaxsvd.kernels.neuron import emulator

    kernel = emulator.load("xuv").xuv_group

    def run(x: Any, first: Any, second: list[Any]) -> tuple[np.ndarray, ...]:
        # NumPy only: a JAX computation that starts in here can wait for ever for the one that called it.
        arrays = [None if array is None else np.asarray(array) for array in (x, first, *second)]
        return tuple(emulator.run(kernel, *arrays, target=call.target, widths=call.widths).outputs)

    return jax.pure_callback(run, _shapes(call, x, second), x, first, list(second))


def _lower(call: Call, x: jax.Array, first: jax.Array, second: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """Make the custom call that nki would, without the kernel in it: it can be lowered, not run.

    With it, a machine without AWS's packages sees the engine's graphs as they are on Trainium.
    """
    config = {"func_name": "xuv_group", "grid": [LNC], "has_collectives": False}
    custom_call = jax.ffi.ffi_call(
        CUSTOM_CALL,
        _shapes(call, x, second),
        custom_call_api_version=2,  # API_VERSION_STATUS_RETURNING
        legacy_backend_config=base64.b64encode(json.dumps(config).encode()).decode(),
    )
    return tuple(custom_call(x, first, *(v for v in second if v is not None)))


_CALLS = {"device": _run, "emulated": _emulate, "lowered": _lower}
