"""Every rule has a kernel that breaks it and is refused by name, on the targets where it holds."""

import inspect
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsvd.kernels.neuron import emulator
from jaxsvd.kernels.neuron.emulator import isa_dma, isa_scalar, isa_tensor, isa_vector

BROKEN, INSTRUCTIONS = (
    emulator.load(Path(__file__).with_name(name)) for name in ("broken.py", "broken_instructions.py")
)
KERNELS = {
    name: value
    for module in (BROKEN, INSTRUCTIONS)
    for name, value in vars(module).items()
    if type(value).__name__ == "Kernel"
}
TARGETS = ("trn1", "trn2", "trn3")
OLD = ("trn1", "trn2")
X = np.linspace(-1, 1, 128 * 512).reshape(128, 512).astype(ml_dtypes.bfloat16)
W = np.linspace(-1, 1, 128 * 128).reshape(128, 128).astype(ml_dtypes.bfloat16)

# rule: kernels that break it, each with the targets where it holds if those are not all
RULES = {
    "slice-range": ("slice_too_long", "slice_empty", "dynamic_slice_too_long"),
    "index-range": ("index_too_large",),
    "index-rank": ("index_too_many",),
    "view-partition": ("partitions_reshaped", "partitions_permuted"),
    "view-reshape": ("reshape_of_a_gap",),
    "view-flatten": ("flatten_of_a_permutation",),
    "broadcast-write": ("write_to_a_broadcast",),
    "buffer": ("buffer_by_string",),
    "partition-size": ("too_many_partitions",),
    "tensor-rank": ("one_dimension_on_chip",),
    "sbuf-capacity": (("tile_beyond_a_trn1", ("trn1",)), "tiles_beyond_sbuf"),
    "psum-capacity": ("nine_banks", "psum_tile_of_nine_banks"),
    "undefined-read": ("read_of_nothing", "read_beyond_the_edge", "read_between_columns"),
    "start-partition": ("start_at_partition_16", "start_at_partition_32"),
    "input-write": ("write_to_an_input",),
    "output": ("output_of_nothing",),
    "output-buffer": ("output_on_chip", "output_in_private_hbm"),
    "output-undefined": ("output_with_a_hole",),
    "output-view": ("output_cut",),
    "matmul-moving-size": (("matmul_moving_600", OLD), "matmul_moving_9000"),
    "matmul-stationary-size": ("matmul_stationary_256",),
    "matmul-contraction": ("matmul_of_other_partitions", "matmul_of_shifted_partitions"),
    "matmul-dst-shape": ("matmul_into_too_many_columns",),
    "matmul-dst-dtype": (("matmul_into_bfloat16", OLD), "matmul_into_float16"),
    "matmul-dtypes": ("matmul_of_two_dtypes",),
    "matmul-bank": (("matmul_across_banks", OLD),),
    "operand-buffer": ("matmul_into_sbuf", "matmul_from_psum", "copy_from_hbm"),
    "matmul-accumulate": (
        "matmul_adds_to_nothing",
        ("matmul_adds_to_a_memset", OLD),
        ("matmul_infers_adding_to_a_memset", OLD),
        "matmul_adds_to_a_part",
        "matmul_accumulates_by_number",
    ),
    "transpose-dtype": ("transpose_into_float32",),
    "transpose-shape": ("transpose_of_512",),
    "transpose-size": ("transpose_by_vector_of_64",),
    "transpose-buffer": ("transpose_by_tensor_into_sbuf",),
    "nc_transpose-engine": ("transpose_by_scalar",),
    "dma-psum": ("dma_from_psum",),
    "dma-size": ("dma_of_other_size",),
    "dma-hwdge": ("dma_casts_in_hardware", ("dma_descriptors_by_hardware", ("trn1",))),
    "dma-engine": ("dma_engine_without_hwdge",),
    "dma-priority": (("dma_priority", OLD),),
    "dma-transpose-shape": ("dma_transpose_into_other_shape",),
    "dma-transpose-axes": ("dma_transpose_of_other_axes",),
    "dma-transpose-dtype": ("dma_transpose_casts",),
    "dma-transpose-hwdge": ("dma_transpose_in_hardware_of_128",),
    "dma-transpose-buffer": ("dma_transpose_into_hbm",),
    "tensor_copy-engine": (("copy_by_scalar", ("trn1",)),),
    "tensor_copy-shape": ("copy_into_other_shape", "copy_across_partitions"),
    "gpsimd-psum": ("copy_by_gpsimd_from_psum",),
    "enum": ("engine_by_number",),
    "tensor-tensor-psum": ("both_inputs_in_psum",),
    "op": ("tensor_tensor_of_a_function",),
    "activation-bias": (("activation_with_a_bias", ("trn1",)),),
    "operand-dtype": ("activation_scaled_in_bfloat16",),
    "operand-shape": ("activation_with_a_wide_bias",),
    "activation-range": ("square_root_of_negatives",),
    "memset-value": ("memset_by_tensor",),
    "reduce-axis": ("reduce_over_partitions",),
    "tensor_scalar-operand": ("tensor_scalar_with_half_an_op",),
    "keyword-mask": ("masked",),
    "kernel-call": ("calls_a_kernel",),
    "not-modelled": (
        *("unknown_instruction", "unknown_name", "unknown_keyword", "unknown_dtype", "unknown_view"),
        *("steps_over_partitions", "adds_in_python", "adds_by_language", "assigns_elements", "places_a_tensor"),
    ),
}
CASES = [
    (case, TARGETS, rule) if isinstance(case, str) else (*case, rule) for rule, cases in RULES.items() for case in cases
]
# What shows only in elements: matmuls that add to what no matmul wrote, edges, ranges of functions.
NEEDS_VALUES = {
    *("read_beyond_the_edge", "read_between_columns", "output_with_a_hole", "square_root_of_negatives"),
    *("matmul_adds_to_a_memset", "matmul_infers_adding_to_a_memset", "matmul_adds_to_a_part"),
}


@pytest.mark.parametrize(("kernel", "targets", "rule"), CASES, ids=[case[0] for case in CASES])
def test_refused_by_name(kernel, targets, rule):
    function = KERNELS[kernel]
    for target in TARGETS:
        for values in (True, False):
            if target in targets and (values or kernel not in NEEDS_VALUES):
                with pytest.raises(emulator.EmulationError, match=f"^{rule}: ") as caught:
                    emulator.run(function, X, W, target=target, values=values)
                assert caught.value.rule == rule
            elif target not in targets:
                emulator.run(function, X, W, target=target, values=values)


def test_every_broken_kernel_is_a_case():
    assert set(KERNELS) == {case[0] for case in CASES}


def test_messages_say_what_was_expected_and_found():
    with pytest.raises(emulator.EmulationError, match="expected at most 512 columns on trn2, found 600 of sbuf"):
        emulator.run(INSTRUCTIONS.matmul_moving_600, X, W)


def test_kernels_run_in_emulator_run_only():
    with pytest.raises(emulator.EmulationError, match=r"emulator\.run"):
        BROKEN.masked(X, W)
    with pytest.raises(emulator.EmulationError, match="call kernels through"):
        BROKEN.loaded(X)
    with pytest.raises(emulator.EmulationError, match=r"^kernel: "):
        emulator.run(BROKEN.loaded, X)


def test_logical_cores():
    kernel = INSTRUCTIONS.dma_priority
    assert kernel[1] is kernel
    with pytest.raises(emulator.EmulationError, match=r"kernel\[2\]"):
        kernel[2]


@pytest.mark.parametrize("argument", [[1, 2], {"a": 1}, object()])
def test_arguments(argument):
    with pytest.raises(emulator.EmulationError, match=r"^kernel-argument: "):
        emulator.run(INSTRUCTIONS.dma_priority, argument, W)


def test_argument_dtypes_and_targets():
    with pytest.raises(emulator.EmulationError, match="float64"):
        emulator.run(INSTRUCTIONS.dma_priority, X.astype(np.float64), W)
    with pytest.raises(emulator.EmulationError, match=r"^target: expected one of trn1, trn2, trn3, found 'inf2'"):
        emulator.run(INSTRUCTIONS.dma_priority, X, W, target="inf2")


FUNCTIONS = {
    name: function
    for module in (isa_dma, isa_scalar, isa_tensor, isa_vector)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and "unknown" in inspect.signature(function).parameters and name != "begin"
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_instruction_refuses_keywords_that_it_has_not_got(name):
    needed = [p for p in inspect.signature(FUNCTIONS[name]).parameters.values() if p.default is p.empty]
    operands = [None for p in needed if p.kind is not p.VAR_KEYWORD]
    with pytest.raises(emulator.EmulationError, match="keyword-mask"):
        FUNCTIONS[name](*operands, mask=None)
    with pytest.raises(emulator.EmulationError, match=f"these keywords of {name}: colour"):
        FUNCTIONS[name](*operands, colour=None)


def test_the_instructions_are_all_there():
    assert len(FUNCTIONS) == 11
