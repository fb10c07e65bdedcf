"""Numbers that are late: one block sends them, another waits for them. Only a GPU has two blocks at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsvd.kernels.gpu import JAX, obstacle
from jaxsvd.kernels.gpu.shape import SPAN

WIDE = 2 * SPAN
ROWS = 6  # of several
SHAPES = ((1, WIDE), jnp.bfloat16), ((1, WIDE), jnp.bfloat16), ((1, 512), jnp.float32), ((ROWS, SPAN), jnp.bfloat16)
runs = obstacle(jax.local_devices()[0]) is None
kernel = pytest.mark.skipif(jax.__version_info__ < JAX, reason="the kernel is written for jax 0.11")


@pytest.mark.skipif(not runs, reason="needs a Hopper GPU")
def test_what_is_late_is_waited_for(rng):
    halves = jnp.asarray(rng.standard_normal((2, WIDE)), jnp.bfloat16)
    halves = halves.at[:, 3].set(jnp.nan)  # which is there, too
    singles = jnp.asarray(rng.standard_normal((1, 512)), jnp.float32)
    several = jnp.asarray(rng.standard_normal((ROWS, WIDE)), jnp.bfloat16)
    received = jax.jit(exchange())(halves, singles, several)
    brought, read, number, rows, cleared, kept = (np.asarray(array, np.float32) for array in received)
    np.testing.assert_array_equal(brought[0], np.asarray(halves, np.float32)[0])
    np.testing.assert_array_equal(read[0], np.asarray(halves, np.float32)[1])
    np.testing.assert_array_equal(number, np.asarray(singles))
    np.testing.assert_array_equal(rows, np.asarray(several, np.float32)[:, SPAN:])
    bits = np.asarray(received[4]).view(np.int16)
    assert (bits[:, 16:528] == -1).all() and not np.isnan(np.delete(cleared, np.r_[3, 16:528], axis=1)).any()
    bits = np.asarray(received[5]).view(np.int32)
    assert (bits[:, 4:11] == -1).all() and not np.isnan(np.delete(kept, np.s_[4:11], axis=1)).any()


@kernel
def test_it_is_lowered_for_a_gpu_anywhere():
    given = ((2, WIDE), jnp.bfloat16), ((1, 512), jnp.float32), ((ROWS, WIDE), jnp.bfloat16)
    shapes = (jax.ShapeDtypeStruct(*one) for one in given)
    jax.jit(exchange()).trace(*shapes).lower(lowering_platforms=("cuda",))


def exchange():
    """What calls a kernel of two blocks: the first sends late, and the other waits, and clears some afterwards."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxsvd.kernels.gpu import copies, present, ptx
    from jaxsvd.kernels.gpu.layouts import strided
    from jaxsvd.kernels.gpu.perlayer import load

    layouts = strided(8), strided(4)

    def body(halves, singles, several, sent, numbers, many, brought, read, number, rows, held, some, barrier):
        block = lax.axis_index("block")

        @pl.when(block == 0)
        def send():
            one = ((sent, 0, 0, halves), (sent, 1, 0, halves), (numbers, 0, 1, singles))
            for ref, row, layout, source in (*one, *((many, row, 0, several) for row in (1, 0, 5, 3, 4, 2))):
                ptx.instruct("nanosleep.u32 300000;")
                ref.at[row][...] = load(source.at[row], layouts[layout])

        @pl.when(block == 1)
        def wait():
            peeked = present.peek([sent.at[1]], layouts[0]), present.peek([numbers.at[0]], layouts[1])
            for part in (0, SPAN):
                copies.bring(sent, jnp.int32(part), jnp.int32(SPAN), held, part)
                copies.cut()
            for row in range(ROWS):
                some.at[row, pl.ds(SPAN, SPAN)][...] = load(many.at[row, pl.ds(SPAN, SPAN)], layouts[0])
            for behind, part in ((1, 0), (0, SPAN)):
                ptx.instruct(f"cp.async.wait_group {behind};")
                present.ensure(sent, jnp.int32(part), held, part, 1)
            present.ensure(many, jnp.int32(SPAN), some, SPAN, ROWS)
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
            for row in range(ROWS):
                rows.at[row][...] = load(some.at[row, pl.ds(SPAN, SPAN)], layouts[0])
            brought.at[0][...] = load(held.at[0], layouts[0])
            regions, targets = (sent.at[1], numbers.at[0]), (read, number)
            for ref, target, found, layout in zip(regions, targets, peeked, layouts, strict=True):
                (late,) = present.settle([ref], found, layout)
                target.at[0][...] = late
            present.clear(sent, jnp.int32(16), 512, jnp.int32(0), 1)
            present.clear(numbers, jnp.int32(4), 7, jnp.int32(0), 1)

    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*one) for one in SHAPES],
        scratch_types=[plgpu.SMEM((1, WIDE), jnp.bfloat16), plgpu.SMEM((ROWS, WIDE), jnp.bfloat16), plgpu.Barrier()],
        grid=(2,),
        grid_names=("block",),
        num_threads=1,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )

    def call(*given):
        sent, numbers, many = (
            jax.new_ref(lax.bitcast_convert_type(present.nothing(array.shape, array.dtype), array.dtype))
            for array in given
        )
        return *run(*given, sent, numbers, many), sent[...], numbers[...]

    return call
