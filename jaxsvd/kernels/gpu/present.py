"""Numbers in global memory that tell whether they are there.

A block need not wait until what it has stored is where others see it, which takes longer than to tell them that it is
on its way: until then they find what was there before, nothing but ones in every bit, and read again. No arithmetic
ends like that, as what is not a number is another one. So what is sent must have been cleared, with a fence between.
"""

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxsvd.kernels.gpu import ptx
from jaxsvd.kernels.gpu.regions import Parts, offset


def nothing(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers that are not there, for XLA: as integers, lest it makes anything else of what is not a number."""
    return jnp.full(shape, -1, f"int{8 * jnp.dtype(dtype).itemsize}")


def clear(ref: Any, start: Any, size: int, block: jax.Array, blocks: int) -> None:
    """Take away elements [start, start + size) of each row, every block its part: for a warpgroup.

    A `ptx.fence` is to follow. Rows are to begin at multiples of 16 bytes, and so is `start`.
    """

    def run(_: Any, ref: Any, *numbers: Any) -> None:
        i32, kind = ir.IntegerType.get_signless(32), ir.MemRefType(ref.type)
        start, block = (value.registers.item() for value in numbers)
        bits = utils.bitwidth(kind.element_type)
        words = 4 if size * bits % 128 == 0 else 1  # that a thread takes at once
        rows, pitch, each = kind.shape[0], kind.get_strides_and_offset()[0][0], size * bits // (32 * words)
        first = arith.addi(arith.muli(block, arith.constant(i32, utils.WARPGROUP_SIZE)), ptx.thread())
        threads = blocks * utils.WARPGROUP_SIZE
        many = f".v{words}" if words > 1 else ""
        for i in range(-(-rows * each // threads)):
            number = arith.addi(first, arith.constant(i32, i * threads))
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, number, arith.constant(i32, rows * each))):
                row, column = (op(number, arith.constant(i32, each)) for op in (arith.divui, arith.remui))
                at = arith.addi(arith.muli(row, arith.constant(i32, pitch)), start)
                at = arith.addi(at, arith.muli(column, arith.constant(i32, 32 * words // bits)))
                ptx.perform(
                    f"st.relaxed.gpu.global{many}.b32 [$0], {{{', '.join(['$1'] * words)}}};",
                    "l,r",
                    ptx.pointer(ref, at),
                    arith.constant(i32, -1),
                )

    numbers = (jnp.asarray(number, jnp.int32) for number in (start, block))
    ptx.inline((plgpu.RefType(), ptx.NUMBER, ptx.NUMBER), run, ref, *numbers)


def ensure(source: Any, start: Any, target: Any, place: int, rows: int) -> None:
    """Look whether what was copied of some rows is there, eight elements of each to a thread, and copy it until it is.

    They went from element `start` of each row there to `place` here. All rows are read at once: they are late together.
    """
    words = [[f"w{row}{word}" for word in range(4)] for row in range(rows)]
    most = " ".join(f"max.u16x2 a, a, {word};" for row in words for word in row)
    look = f"mov.b32 a, 0; {most} {_gone('a')}"

    def each(code: str, pitch: int) -> str:
        """An instruction for every row, which are so many bytes apart."""
        return " ".join(code.format(offset=i * pitch, words=", ".join(row)) for i, row in enumerate(words))

    def run(_: Any, source: Any, target: Any, start: Any) -> None:
        mine = arith.muli(ptx.thread(), arith.constant(ir.IntegerType.get_signless(32), 8))
        at = arith.addi(mine, arith.constant(mine.type, place))
        here, there = (2 * ir.MemRefType(ref.type).get_strides_and_offset()[0][0] for ref in (target, source))
        code = f"""{{
        .reg .pred gone;
        .reg .b32 a, b, {", ".join(word for row in words for word in row)};
        {each("ld.shared.v4.b32 {{{words}}}, [$0 + {offset}];", here)}
        {look}
        @!gone bra over;
        again:
        {each("ld.relaxed.gpu.global.v4.b32 {{{words}}}, [$1 + {offset}];", there)}
        {look}
        @gone bra again;
        {each("st.shared.v4.b32 [$0 + {offset}], {{{words}}};", here)}
        fence.proxy.async.shared::cta;
        over:
        }}"""
        given = ptx.shared(ptx.pointer(target, at)), ptx.pointer(source, arith.addi(mine, start.registers.item()))
        ptx.perform(code, "r,l", *given)

    types = plgpu.RefType(), plgpu.RefType(), ptx.NUMBER
    ptx.inline(types, run, source, target, jnp.asarray(start, jnp.int32))


def _gone(word: str) -> str:
    """Whether one of two halves is all ones: if and only if a bit of these remains."""
    return f"sub.u32 b, 0xfffefffe, {word}; and.b32 b, b, {word}; and.b32 b, b, 0x80008000; setp.ne.u32 gone, b, 0;"


def peek(regions: Sequence[Any], layout: Any) -> list[jax.Array]:
    """Read references, or what warps have of them, into registers in a layout, whether they are there or not."""

    def run(_: Any, *given: Any) -> list[Any]:
        return [
            _array(region.shape, layout, [_load(place, kind) for place, kind, _ in _places(region, layout, given)])
            for region, given in _apart(regions, given)
        ]

    return ptx.inline(_types(regions), run, *_given(regions), result=_results(regions, layout))


def settle(regions: Sequence[Any], found: Sequence[jax.Array], layout: Any) -> list[jax.Array]:
    """What `peek` has found in them, but of what was not there what comes."""

    def run(_: Any, *given: Any) -> list[Any]:
        found, given = given[: len(regions)], given[len(regions) :]
        places = [place[:2] for region, one in _apart(regions, given) for place in _places(region, layout, one)]
        settled = iter(_settled(places, [register for array in found for register in array.registers.flat]))
        return [
            _array(region.shape, layout, [next(settled) for _ in array.registers.flat])
            for region, array in zip(regions, found, strict=True)
        ]

    types = (*(layout for _ in regions), *_types(regions))
    return ptx.inline(types, run, *found, *_given(regions), result=_results(regions, layout))


def send(region: Any, values: jax.Array, layout: Any) -> None:
    """Store what warps have of a reference."""

    def run(_: Any, values: Any, *given: Any) -> None:
        for (place, _, real), register in zip(_places(region, layout, given), values.registers.flat, strict=True):
            with utils.when(real):
                llvm.store(register, place)

    ptx.inline((layout, *_types([region])), run, values, *_given([region]))


def _given(regions: Sequence[Any]) -> list[Any]:
    """What the code for regions is given: of each the reference, and its numbers."""
    each = ((region.ref, *region.numbers) if isinstance(region, Parts) else (region,) for region in regions)
    return [one for given in each for one in given]


def _types(regions: Sequence[Any]) -> tuple[Any, ...]:
    """Of the same."""
    return tuple(one for region in regions for one in (plgpu.RefType(), *[ptx.NUMBER] * (len(_given([region])) - 1)))


def _apart(regions: Sequence[Any], given: Sequence[Any]) -> list[tuple[Any, list[Any]]]:
    """The regions, each with what is given of it."""
    left = iter(given)
    return [(region, list(islice(left, len(_given([region]))))) for region in regions]


def _results(regions: Sequence[Any], layout: Any) -> list[Any]:
    return [plgpu.ShapeDtypeStruct(region.shape, region.dtype, layout=layout) for region in regions]


def _array(shape: Sequence[int], layout: Any, vectors: Sequence[Any]) -> Any:
    chosen = layout.to_mgpu()
    registers = np.empty(chosen.registers_shape(tuple(shape)), dtype=object)
    registers.flat[:] = vectors
    return mgpu.FragmentedArray(_registers=registers, _layout=chosen, _is_signed=None)


def _places(region: Any, layout: Any, given: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """Pointers to what this thread has of a region, a register each, the register's type, and whether it is real."""
    ref, numbers = given[0], [number.registers.item() for number in given[1:]]
    chosen, always = layout.to_mgpu(), arith.constant(ir.IntegerType.get_signless(1), 1)
    register = ir.VectorType.get((chosen.vector_length,), ir.MemRefType(ref.type).element_type)
    place = region.place if isinstance(region, Parts) else lambda ref, index: (offset(ref, index), always)
    found = (place(ref, index, *numbers) for index in chosen.thread_idxs(tuple(region.shape)))
    return [(ptx.pointer(ref, at), register, real) for at, real in found]


def _bits(kind: Any) -> int:
    """The bits of a register of this type."""
    return kind.shape[0] * utils.bitwidth(kind.element_type)


def _words(register: Any) -> list[Any]:
    """A register's bits, 32 to each; a lone half one has zeros above."""
    i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (16, 32))
    bits = _bits(ir.VectorType(register.type))
    if bits < 32:
        half = vector.bitcast(ir.VectorType.get((1,), i16), register)
        return [arith.extui(i32, ptx.element(half, 0))]
    return ptx.words(register, bits // 32)


def _register(words: Sequence[Any], kind: Any) -> Any:
    """The register of these bits."""
    i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (16, 32))
    if _bits(kind) < 32:
        half = vector.from_elements(ir.VectorType.get((1,), i16), [arith.trunci(i16, words[0])])
        return vector.bitcast(kind, half)
    return vector.bitcast(kind, vector.from_elements(ir.VectorType.get((len(words),), i32), words))


def _read(kind: Any, targets: Sequence[str], pointer: str) -> str:
    """The instruction that reads a register's words from where all blocks see the same."""
    if _bits(kind) < 32:
        return f"ld.relaxed.gpu.global.u16 {targets[0]}, [{pointer}];"
    many = f".v{len(targets)}" if len(targets) > 1 else ""
    return f"ld.relaxed.gpu.global{many}.b32 {{{', '.join(targets)}}}, [{pointer}];"


def _load(pointer: Any, kind: Any) -> Any:
    count = max(1, _bits(kind) // 32)
    targets = [f"${i}" for i in range(count)]
    return _register(_assembled(_read(kind, targets, f"${count}"), count, [pointer], []), kind)


def _settled(places: Sequence[tuple[Any, Any]], registers: Sequence[Any]) -> list[Any]:
    """Registers that were read at some places, but read again, all that were not there at once, until they are."""
    words = list(map(_words, registers))
    starts = np.cumsum([0, *map(len, words)]).tolist()
    lines = ["look:", "mov.b32 any, 0;"]
    for i, (start, end) in enumerate(pairwise(starts)):
        targets, (_, kind) = [f"${word}" for word in range(start, end)], places[i]
        lines += ["mov.b32 a, 0;"]
        if utils.bitwidth(kind.element_type) == 32:
            lines += [f"set.eq.u32.u32 b, {target}, 0xffffffff; or.b32 a, a, b;" for target in targets]
            lines += ["setp.ne.u32 gone, a, 0;"]
        else:
            lines += [f"max.u16x2 a, a, {target};" for target in targets]
            lines += [_gone("a")]
        lines += ["@gone mov.b32 any, 1;", f"@gone {_read(kind, targets, f'${starts[-1] + i}')}"]
    lines += ["setp.ne.u32 gone, any, 0;", "@gone bra look;"]
    code = "{\n.reg .pred gone;\n.reg .b32 a, b, any;\n" + "\n".join(lines) + "\n}"
    found = _assembled(code, starts[-1], [pointer for pointer, _ in places], [one for each in words for one in each])
    return [_register(found[start:end], kind) for (start, end), (_, kind) in zip(pairwise(starts), places, strict=True)]


def _assembled(code: str, count: int, pointers: Sequence[Any], words: Sequence[Any]) -> list[Any]:
    """Words that PTX gives of pointers and, if any, of what the words were before."""
    i32 = ir.IntegerType.get_signless(32)
    kind = i32 if count == 1 else llvm.StructType.get_literal([i32] * count)
    constraints = ["=&r"] * count + ["l"] * len(pointers) + [str(i) for i in range(len(words))] + ["~{memory}"]
    made: Any = llvm.inline_asm(kind, [*pointers, *words], code, ",".join(constraints), has_side_effects=True)
    return [made] if count == 1 else [llvm.extractvalue(i32, made, [i]) for i in range(count)]
