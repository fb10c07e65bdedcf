"""Data types: NKI names them by strings. Values are kept as float32 arrays that are already rounded to their dtype."""

import ml_dtypes
import numpy as np

from jaxsvd.kernels.neuron.emulator.errors import not_modelled, refuse

NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SIZES = {name: dtype.itemsize for name, dtype in NUMPY.items()}
UNMODELLED = (
    *("bool_", "int8", "int16", "int32", "uint8", "uint16", "uint32", "tfloat32", "float8_e4m3", "float8_e4m3fn"),
    *("float8_e5m2", "float8_e5m2_x4", "float8_e4m3fn_x4", "float8_e8m0fnu", "float4_e2m1fn_x4"),
)


def check_dtype(dtype: object) -> str:
    """`dtype` as the string it must be; EmulationError for anything that is not one of NKI's, or not modelled."""
    if isinstance(dtype, str) and dtype in NUMPY:
        return dtype
    if dtype in UNMODELLED:
        not_modelled(f"the dtype {dtype}")
    refuse("dtype", "a dtype of nki.language", repr(dtype))


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 array rounded to `dtype`, still in float32."""
    if dtype == "float32":
        return values
    return values.astype(NUMPY[dtype]).astype(np.float32)
