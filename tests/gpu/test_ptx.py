"""What multiplies, for which the interpreter has no word, on NumPy arrays of all threads' registers."""

import operator
from types import SimpleNamespace as Names

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsvd.kernels.gpu import JAX
from jaxsvd.kernels.gpu.shape import ROWS, SIZES, SPAN, WARPS

pytestmark = pytest.mark.skipif(jax.__version_info__ < JAX, reason="needs the Mosaic dialect of jax 0.11")
WARP, LANE = np.divmod(np.arange(32 * WARPS), 32)
GROUP, QUARTER = np.divmod(LANE, 4)  # as PTX names them: groupID, and threadID_in_group
OPEN = 0x3210  # the selector of prmt that takes a word as it is


class Register:
    """Those of all threads: (128, n)."""

    def __init__(self, values):
        self.values = np.ascontiguousarray(values)

    @property
    def type(self):
        return self.values.dtype


def mma(a, b, c):
    """As the PTX manual tells of m16n8k16: which thread has which elements, for each warp."""
    found = [np.array(one) for one in c]
    halves = [np.ascontiguousarray(word).view(jnp.bfloat16).astype(np.float32).reshape(-1, 2) for word in (*a, *b)]
    for warp in range(WARPS):
        mine = warp == WARP
        group, k = GROUP[mine], 2 * QUARTER[mine]
        left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for i in range(2):
            for part, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
                left[group + row, k + column + i] = halves[part][mine, i]
            for part, row in enumerate((0, 8)):
                right[k + row + i, group] = halves[4 + part][mine, i]
        product = left @ right
        for part, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
            found[part][mine] += product[group + row, k + column]
    return found


def move(_, given, code, constraints, **options):
    """prmt.b32 with the one selector that is used."""
    word, selector = given
    assert code.startswith("prmt.b32 $0, $1, $1, $2") and (selector == OPEN).all()
    return word


def constant(kind, value):
    return np.full(32 * WARPS, value, kind)


@pytest.fixture
def ptx(monkeypatch):
    from jaxsvd.kernels.gpu import ptx

    types = Names(get_signless=lambda _: np.uint32), Names(get=lambda: np.float32), Names(get=lambda _, kind: kind)
    integers, floats, vectors = types
    shims = {
        "ir": Names(IntegerType=integers, F32Type=floats, VectorType=vectors),
        "arith": Names(constant=constant, addi=operator.add, addf=operator.add),
        "vector": Names(
            bitcast=lambda kind, register: Register(register.values.view(kind)),
            from_elements=lambda _, elements: Register(np.stack(elements, 1)),
        ),
        "llvm": Names(inline_asm=move),
        "mgpu": Names(FragmentedArray=lambda **given: Names(**{name[1:]: each for name, each in given.items()})),
        "element": lambda register, i: register.values[:, i],
        "inline": lambda types, run, *given, result=None: run(None, *given),
        "mma": mma,
    }
    for name, shim in shims.items():
        monkeypatch.setattr(ptx, name, shim)
    return ptx


def registers(array):
    """How threads hold weights or x (rows, SPAN), or one x (SPAN,): see `layouts.TILE`."""
    rows = array.reshape(-1, SPAN)
    found = np.empty((-(-rows.shape[0] // ROWS), SPAN // 128), object)
    for tile, part in np.ndindex(found.shape):
        row = ROWS * tile + GROUP if rows.shape[0] > 1 else np.zeros_like(GROUP)
        columns = 128 * part + 32 * WARP + 8 * QUARTER
        found[tile, part] = Register(np.stack([rows[row, columns + i] for i in range(8)], 1))
    return Names(registers=found, layout=None, shape=array.shape, ndim=array.ndim, dtype=array.dtype)


@pytest.mark.parametrize("height", SIZES)
def test_tensor_cores_add_what_each_warp_has(height, ptx, rng):
    from jaxsvd.kernels.gpu.layouts import TILE, inputs, partial_sums

    weights, x = (rng.standard_normal((rows, SPAN)).astype(jnp.bfloat16) for rows in (ROWS, height))
    before = rng.standard_normal((WARPS, height, ROWS)).astype(np.float32)
    places = [(WARP, GROUP + first if height > 1 else 0 * GROUP) for first in range(0, height, 8)]

    def of_threads(sums):
        return [np.stack([sums[*place, 2 * QUARTER + i] for i in range(2)], 1) for place in places]

    sums = Names(registers=np.array(list(map(Register, of_threads(before)))), layout=None, shape=before.shape)
    layouts = partial_sums(height), TILE, inputs(height)
    zero = Names(registers=Names(item=lambda: constant(np.uint32, 0)))
    arranged = ptx.arrange(registers(x[0] if height == 1 else x), layouts[2], zero)
    found = ptx.multiply(sums, registers(weights), arranged, layouts)

    def parts(array):
        return array.astype(np.float32).reshape(len(array), SPAN // 128, WARPS, 32)

    expected = before + np.einsum("nswi,bswi->wbn", parts(weights), parts(x))
    for register, wanted in zip(found.registers, of_threads(expected), strict=True):
        np.testing.assert_allclose(register.values, wanted, rtol=1e-4, atol=1e-3)
