"""Numbers that are late: one block sends them, another waits for them. Only a GPU has two blocks at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsvd.kernels.gpu import JAX, obstacle
from jaxsvd.kernels.gpu.shape import SPAN

WIDE = 2 * SPAN
WIDTHS = (WIDE, jnp.bfloat16), (WIDE, jnp.bfloat16), (512, jnp.float32)
runs = obstacle(jax.local_devices()[0]) is None
kernel = pytest.mark.skipif(jax.__version_info__ < JAX, reason="the kernel is written for jax 0.11")


@pytest.mark.skipif(not runs, reason="needs a Hopper GPU")
def test_what_is_late_is_waited_for(rng):
    halves = jnp.asarray(rng.standard_normal((2, WIDE)), jnp.bfloat16)
    halves = halves.at[:, 3].set(jnp.nan)  # which is there, too
    singles = jnp.asarray(rng.standard_normal((1, 512)), jnp.float32)
    received = jax.jit(exchange())(halves, singles)
    brought, read, number, cleared, kept = (np.asarray(array, np.float32) for array in received)
    np.testing.assert_array_equal(brought[0], np.asarray(halves, np.float32)[0])
    np.testing.assert_array_equal(read[0], np.asarray(halves, np.float32)[1])
    np.testing.assert_array_equal(number, np.asarray(singles))
    bits = np.asarray(received[3]).view(np.int16)
    assert (bits[:, 16:528] == -1).all() and not np.isnan(np.delete(cleared, np.r_[3, 16:528], axis=1)).any()
    bits = np.asarray(received[4]).view(np.int32)
    assert (bits[:, 4:11] == -1).all() and not np.isnan(np.delete(kept, np.s_[4:11], axis=1)).any()


@kernel
def test_it_is_lowered_for_a_gpu_anywhere():
    shapes = (jax.ShapeDtypeStruct((2, WIDE), jnp.bfloat16), jax.ShapeDtypeStruct((1, 512), jnp.float32))
    jax.jit(exchange()).trace(*shapes).lower(lowering_platforms=("cuda",))


def exchange():
    """What calls a kernel of two blocks: the first sends late, and the other waits, and clears some afterwards."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxsvd.kernels.gpu import present, ptx
    from jaxsvd.kernels.gpu.layouts import strided
    from jaxsvd.kernels.gpu.perlayer import load

    layouts = strided(8), strided(4)

    def body(halves, singles, sent, numbers, brought, read, number, held, barrier):
        block = lax.axis_index("block")

        @pl.when(block == 0)
        def send():
            for ref, row, layout, source in ((sent, 0, 0, halves), (sent, 1, 0, halves), (numbers, 0, 1, singles)):
                ptx.instruct("nanosleep.u32 300000;")
                ref.at[row][...] = load(source.at[row], layouts[layout])

        @pl.when(block == 1)
        def wait():
            peeked = present.peek([sent.at[1]], layouts[0]), present.peek([numbers.at[0]], layouts[1])
            for part in (0, SPAN):
                ptx.bring(sent, jnp.int32(part), jnp.int32(SPAN), held, part)
                ptx.cut()
            for behind, part in ((1, 0), (0, SPAN)):
                present.ensure(sent, jnp.int32(part), held, part, behind)
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
            brought.at[0][...] = load(held.at[0], layouts[0])
            regions, targets = (sent.at[1], numbers.at[0]), (read, number)
            for ref, target, found, layout in zip(regions, targets, peeked, layouts, strict=True):
                (late,) = present.settle([ref], found, layout)
                target.at[0][...] = late
            present.clear(sent, jnp.int32(16), 512, jnp.int32(0), 1)
            present.clear(numbers, jnp.int32(4), 7, jnp.int32(0), 1)

    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((1, width), dtype) for width, dtype in WIDTHS],
        scratch_types=[plgpu.SMEM((1, WIDE), jnp.bfloat16), plgpu.Barrier()],
        grid=(2,),
        grid_names=("block",),
        num_threads=1,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )

    def call(halves, singles):
        sent, numbers = (
            jax.new_ref(lax.bitcast_convert_type(present.nothing(array.shape, array.dtype), array.dtype))
            for array in (halves, singles)
        )
        return *run(halves, singles, sent, numbers), sent[...], numbers[...]

    return call
