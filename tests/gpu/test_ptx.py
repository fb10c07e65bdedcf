"""What multiplies, for which the interpreter has no word, on NumPy arrays of all threads' registers."""

import operator
from types import SimpleNamespace as Names

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsvd.kernels.gpu import JAX
from jaxsvd.kernels.gpu.shape import APART, ROWS, SIZES, SPAN, WARPS

pytestmark = pytest.mark.skipif(jax.__version_info__ < JAX, reason="needs the Mosaic dialect of jax 0.11")
WARP, LANE = np.divmod(np.arange(32 * WARPS), 32)
GROUP, QUARTER = np.divmod(LANE, 4)  # as PTX names them: groupID, and threadID_in_group
OPEN = 0x3210  # the selector of prmt that takes a word as it is


class Kind:
    """The type of a vector, or of the same as another."""

    def __init__(self, shape, scalar=None):
        self.shape, self.scalar = getattr(shape, "shape", shape), scalar

    @classmethod
    def get(cls, shape, scalar):
        return cls(shape, scalar)


class Register:
    """Those of all threads: (128, n)."""

    def __init__(self, values):
        self.values = np.ascontiguousarray(values)

    @property
    def type(self):
        return Kind(self.values.shape[1:], self.values.dtype)


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

    types = Names(
        IntegerType=Names(get_signless=lambda _: np.uint32),
        F32Type=Names(get=lambda: np.float32),
        BF16Type=Names(get=lambda: jnp.bfloat16),
        MemRefType=lambda kind: kind,
        VectorType=Kind,
    )
    shims = {
        "ir": types,
        "arith": Names(constant=constant, addi=operator.add, addf=operator.add),
        "vector": Names(
            bitcast=lambda kind, register: Register(register.values.view(kind.scalar)),
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


def spread(layout, shape):
    """Which elements of an array threads have in this layout: (128, registers, elements of each)."""
    layout, found = layout.to_mgpu(), np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, rank = found.ndim - len(tile), len(tile)
        sizes = [size for total, one in zip(found.shape[lead:], tile, strict=True) for size in (total // one, one)]
        order = *range(lead), *range(lead, lead + 2 * rank, 2), *range(lead + 1, lead + 2 * rank, 2)
        found = found.reshape(*found.shape[:lead], *sizes).transpose(order)
    index = [np.zeros_like(WARP), *[slice(None)] * found.ndim]
    for dims, number in ((layout.warp_dims, WARP), (layout.lane_dims, LANE)):
        sizes = [found.shape[dim] if isinstance(dim, int) else dim.times for dim in dims]
        for dim, place in zip(dims, np.unravel_index(number, sizes), strict=True):
            if isinstance(dim, int):
                index[dim] = place
    return found[None][tuple(index)].reshape(32 * WARPS, -1, found.shape[layout.vector_dim])


def held(array, layout):
    """An array in the registers of all threads."""
    found = array.reshape(-1)[spread(layout, array.shape)]
    registers = np.empty(layout.to_mgpu().registers_shape(array.shape), object)
    registers.flat[:] = [Register(found[:, i]) for i in range(found.shape[1])]
    return Names(registers=registers, layout=layout, shape=array.shape)


def shuffle(mask, x, lane, clamp, kind):
    """What another thread of the warp has."""
    return x.reshape(WARPS, 32)[WARP, lane ^ LANE if kind == "bfly" else lane]


def assemble(kind, given, code, constraints, **options):
    """ex2, cvt.rn.bf16x2, and prmt.b32 with the two selectors that are used."""
    if code.startswith("ex2"):
        return np.exp2(given[0])
    first, second = given
    if code.startswith("cvt"):
        return np.stack([second, first], 1).astype(jnp.bfloat16).view(np.uint32)[:, 0]
    first, second = (np.ascontiguousarray(word).view(np.uint16).reshape(-1, 2) for word in given)
    half = {"0x5410;": 0, "0x7632;": 1}[code.split()[-1]]
    return np.stack([first[:, half], second[:, half]], 1).view(np.uint32)[:, 0]


@pytest.fixture
def flash(ptx, monkeypatch):
    """Attention, and how many times as long as they must loads from shared memory take."""
    from jaxsvd.kernels.gpu import flash

    turns = []

    def load(kind, pointer):
        values, first = pointer
        size = kind.shape[0]
        for lanes in (first // size).reshape(-1, 64 // size):  # those that are served at once
            rows = np.unique(lanes)
            turns.append(np.bincount(rows % (64 // size)).max())
        return Register(values[first[:, None] + np.arange(size)])

    operations = Names(
        **{name: getattr(operator, name[:3]) for name in ("addi", "addf", "subi", "subf", "muli", "mulf")},
        divui=operator.floordiv,
        remui=operator.mod,
        maximumf=np.maximum,
        select=np.where,
        constant=constant,
        cmpi=lambda predicate, *two: predicate(*(one.view(np.int32) for one in two)),
        CmpIPredicate=Names(sgt=operator.gt, eq=operator.eq),
    )
    shims = {
        "ir": ptx.ir,
        "arith": operations,
        "vector": ptx.vector,
        "llvm": Names(inline_asm=assemble, load=load),
        "nvvm": Names(shfl_sync=shuffle, ShflKind=Names(bfly="bfly", idx="idx")),
        "mgpu": ptx.mgpu,
        "utils": Names(getelementptr=lambda pointer, places, _: (pointer[0], pointer[1] + places[0])),
    }
    for name, shim in shims.items():
        monkeypatch.setattr(flash, name, shim)
    monkeypatch.setattr(ptx, "thread", lambda: np.arange(32 * WARPS, dtype=np.uint32))
    monkeypatch.setattr(ptx, "pointer", lambda slot, at: (slot.values, at.view(np.int32)))
    return flash, turns


@pytest.mark.parametrize("count", [2 * 32, 45, 7])
@pytest.mark.parametrize("width", [64, 128])
def test_tensor_cores_attend(width, count, ptx, flash, rng):
    flash, turns = flash
    tokens, heads = flash.TOKENS, flash.HEADS
    q = (rng.standard_normal((heads, width)) / width**0.5).astype(jnp.bfloat16)
    slots = [rng.standard_normal(ROWS * (SPAN + APART)).astype(jnp.bfloat16) for _ in range(2)]
    parts = [slot.reshape(2, -1)[:, : tokens * width].reshape(2, tokens, width) for slot in slots]
    given = flash.held([Names(type=Names(shape=slot.shape), values=slot) for slot in slots], width)
    assert max(turns[: len(turns) // 2]) == 1 and max(turns) == 2

    state = [rng.standard_normal((WARPS, heads, *more)).astype(np.float32) for more in ((), (), (width,))]
    layouts = flash.STATS, flash.STATS, flash.mixed(width)
    zero, left = (Names(registers=Names(item=lambda x=x: constant(np.uint32, x))) for x in (0, count))
    queries = Names(**vars(held(q, flash.QUERIES)), ndim=2, dtype=q.dtype)
    arranged = ptx.arrange(queries, flash.QUERIES, zero, beside=True)
    found = flash._step(None, *map(held, state, layouts), arranged, *given, left)
    expected = flash._plain(state, jnp.asarray(q), [part[i] for i in (0, 1) for part in parts], count)
    for one, other, layout in zip(found, expected, layouts, strict=True):
        for register, wanted in zip(one.registers.flat, held(np.asarray(other), layout).registers.flat, strict=True):
            np.testing.assert_allclose(register.values, wanted.values, rtol=1e-2, atol=1e-2)
