"""The Neuron backend: its kernels called from the engine by an emulator, in name only, and not where they can't be."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
import tomllib
import types
from functools import partial
from importlib import metadata
from pathlib import Path

import factored
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from graphs import CAPACITY, MODES, SHAPES, abstract_engine, cache_of, lint, shaped, trace_decode, trace_prefill
from tiny import make_tiny, prompts_of

import jaxsvd
from jaxsvd import cli, kernels
from jaxsvd.errors import JaxsvdError, UsageError
from jaxsvd.kernels import Dense, Factored, shape_of
from jaxsvd.kernels.neuron import Neuron, bridge, emulator, packages
from jaxsvd.kernels.xla import XLA

ROOT = Path(__file__).parents[2]
INPUTS = 24
# (outputs, rank or None) of each member.
GROUPS = {
    "one dense": [(40, None)],
    "one low-rank": [(40, 7)],
    "two": [(40, 7), (40, 13)],
    "dense": [(32, None), (16, None), (16, None)],
    "dense first": [(32, None), (16, 5), (16, None)],
    "dense last": [(32, 1), (17, 5), (16, None)],
}


def make_group(rng, members, inputs=INPUTS, dtype=np.float32):
    """Matrices of small whole numbers, whose products are exact in whatever order they are summed."""

    def draw(*shape):
        return rng.integers(-3, 4, shape).astype(dtype)

    return [
        Dense(draw(inputs, outputs)) if rank is None else Factored(draw(inputs, rank), draw(rank, outputs))
        for outputs, rank in members
    ]


def product(x, matrix):
    for factor in matrix:
        x = x @ factor
    return x


def packed(backend, group):
    plan = backend.plan(tuple(map(shape_of, group)))
    return plan, [jnp.asarray(array) for array in backend.pack(plan, group)]


@pytest.fixture
def calls(monkeypatch):
    """The tokens of x of every run of the emulator."""
    found, run = [], emulator.run

    def counted(kernel, x, *arrays, **options):
        found.append(x.shape[-1 if options["x_layout"] == "tiles" else 0])
        return run(kernel, x, *arrays, **options)

    monkeypatch.setattr(emulator, "run", counted)
    return found


# Packages, device and environment.

RIGHT = {"nki": "0.6.0", "neuronx-cc": "2.27.5334.0", "libneuronxla": "3.0.5356.0"}
RIGHT |= {"jax-neuronx": "0.10.0.1.0.11459", "jax": "0.10.0"}


@pytest.fixture
def machine(monkeypatch):
    """A machine with everything that the kernels need, as far as Python can see: its packages, to be changed."""
    versions = dict(RIGHT)

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv(bridge.LNC_VARIABLE, "1")
    return versions


def test_with_everything_right_the_kernels_are_used(machine):
    for name in ("neuron", "auto"):
        backend = kernels.choose(name, platform="neuron")
        assert backend == Neuron("device") and backend.name == "neuron"
    assert kernels.choose("auto", platform="cpu").name == "xla"


WRONG = {
    **{f"{name}: none": (name, None, "found none") for name in RIGHT},
    **{f"{name}: placeholder": (name, version, "placeholder") for name, version in packages.PLACEHOLDERS.items()},
    "nki: old": ("nki", "0.5.1", "found 0.5.1"),
    "nki: new": ("nki", "0.7.0", "found 0.7.0"),
    "neuronx-cc: new": ("neuronx-cc", "3.0", "found 3.0"),
    "libneuronxla: old": ("libneuronxla", "2.2.1", "found 2.2.1"),
    "jax-neuronx: old": ("jax-neuronx", "0.6.2.1.0.1", "found 0.6.2"),
    "jax: old": ("jax", "0.6.2", "found 0.6.2"),
    "jax: new": ("jax", "0.10.2", "jax 0.7 to 0.10.0, found 0.10.2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_package_is_named(machine, name, caplog):
    package, version, found = WRONG[name]
    if version is None:
        del machine[package]
    else:
        machine[package] = version
    with pytest.raises(UsageError, match=f"needs {package} [0-9]") as raised:
        kernels.choose("neuron", platform="neuron")
    message = str(raised.value)
    assert found in message and message.endswith(packages.INSTALL) and "\n" not in message
    with caplog.at_level("WARNING", "jaxsvd"):
        assert kernels.choose("auto", platform="neuron").name == "xla"
    assert [record.getMessage().count(message) for record in caplog.records] == [1]


def test_the_device_is_looked_for(machine):
    with pytest.raises(UsageError, match="needs a Neuron device, JAX found cpu"):
        kernels.choose("neuron")


@pytest.mark.parametrize(("value", "found"), [(None, "is not set, which means 2"), ("2", "is 2")])
def test_cores_must_agree(machine, monkeypatch, value, found):
    monkeypatch.delenv(bridge.LNC_VARIABLE) if value is None else monkeypatch.setenv(bridge.LNC_VARIABLE, value)
    with pytest.raises(UsageError, match=f"{found}.*`export NEURON_LOGICAL_NC_CONFIG=1`"):
        kernels.choose("neuron", platform="neuron")


def test_the_command_names_what_is_missing(tiny_llama, capsys):
    arguments = ["--model", str(tiny_llama[0]), "-p", "x"]
    assert cli.run("generate", [*arguments, "--backend", "neuron"]) == 2
    assert re.search(r"error: the backend neuron needs \S+ .*, found .*: pip install ", capsys.readouterr().err)


def test_the_extra_installs_what_is_needed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(extras["neuron"]) == sorted(needed.pin for needed in packages.PACKAGES)
    assert packages.INDEX in (ROOT / "README.md").read_text()


def test_the_emulated_chip_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.delenv(bridge.TARGET_VARIABLE, raising=False)
    assert kernels.choose("neuron-emulated") == Neuron("emulated", "trn2")
    monkeypatch.setenv(bridge.TARGET_VARIABLE, "trn3")
    assert kernels.choose("neuron-emulated") == Neuron("emulated", "trn3")
    monkeypatch.setenv(bridge.TARGET_VARIABLE, "tpu")
    with pytest.raises(UsageError, match=r"is 'tpu'.*trn1, trn2, trn3"):
        kernels.choose("neuron-emulated")


def test_nothing_is_emulated_on_a_device():
    with pytest.raises(UsageError, match="callbacks of the host, found neuron"):
        kernels.choose("neuron-emulated", platform="neuron")


def test_choosing_imports_no_kernel():
    code = "from jaxsvd import kernels; kernels.choose('neuron-emulated'); import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = loaded.split()
    assert "jaxsvd.kernels.neuron.bridge" in modules
    assert not {"nki", "jaxsvd.kernels.neuron.xuv", "jaxsvd.kernels.neuron.mlp"} & set(modules)


# Layout and calls.


@pytest.mark.parametrize("name", GROUPS)
def test_groups_go_through_the_kernel(rng, name, calls):
    group, backend = make_group(rng, GROUPS[name]), Neuron("emulated")
    plan, arrays = packed(backend, group)
    assert tuple(array.shape for array in arrays) == plan.array_shapes
    assert hash(plan) == hash(backend.plan(tuple(map(shape_of, group))))
    assert arrays[0].shape == (INPUTS, sum(rank or outputs for outputs, rank in GROUPS[name]))  # nothing is padded
    x = rng.integers(-3, 4, (2, 3, INPUTS)).astype(np.float32)
    ys = jax.jit(partial(backend.project, plan))(x, arrays)
    assert calls == [6]
    for y, matrix in zip(ys, group, strict=True):
        np.testing.assert_array_equal(y, product(x, matrix))


@pytest.mark.parametrize(("tokens", "chunks"), [(1, [1]), (7, [7]), (8, [7, 1]), (20, [7, 7, 6])])
def test_many_tokens_go_in_chunks(rng, monkeypatch, calls, tokens, chunks):
    group, backend = make_group(rng, GROUPS["dense first"]), Neuron("emulated")
    plan, arrays = packed(backend, group)
    x = rng.integers(-3, 4, (tokens, INPUTS)).astype(np.float32)
    whole = backend.project(plan, x, arrays)
    monkeypatch.setattr(bridge, "TOKENS", 7)
    calls.clear()
    pieces = jax.jit(partial(backend.project, plan))(x, arrays)
    assert sorted(calls, reverse=True) == chunks
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)
    lowered = jax.jit(partial(Neuron("lowered").project, plan)).trace(x, arrays).lower(lowering_platforms=("neuron",))
    assert lowered.as_text().count(f"custom_call @{bridge.CUSTOM_CALL}") == len(chunks)


@pytest.mark.parametrize("ranks", [(7, 5, 9), (None, 5, None), (7, None, 9), (None, None, None)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_gated_mlp_takes_two_kernels(rng, monkeypatch, calls, ranks, tokens):
    monkeypatch.setattr(bridge, "TOKENS", 4)
    inner, backend, oracle = 150, Neuron("emulated"), XLA("neuron")  # 150 features are more than one tile
    groups = [make_group(rng, [(inner, ranks[0]), (inner, ranks[1])]), make_group(rng, [(INPUTS, ranks[2])], inner)]
    groups = [[type(matrix)(*(0.1 * factor for factor in matrix)) for matrix in group] for group in groups]
    (gate_up, first), (down, second) = (packed(backend, group) for group in groups)
    x = rng.standard_normal((2, tokens, INPUTS)).astype(np.float32)
    found = jax.jit(partial(backend.mlp, gate_up, down))(x, first, second)
    np.testing.assert_allclose(found, oracle.mlp(gate_up, down, x, first, second), rtol=1e-4, atol=1e-5)
    assert sorted(calls) == ([2, 2] if tokens == 1 else [2, 2, 4, 4])
    backend.check_mlp(gate_up, down, first, second)


def test_a_broken_mlp_is_refused(rng, breaking):
    breaking(lambda ys: [y * np.float32(1.01) for y in ys])
    backend = Neuron("emulated")
    (gate_up, first), (down, second) = (
        packed(backend, make_group(rng, members, inputs))
        for members, inputs in (([(40, 7), (40, 13)], INPUTS), ([(INPUTS, 9)], 40))
    )
    with pytest.raises(JaxsvdError, match=r"differs from XLA by 0\.02 of the result where 0\.0002 is allowed"):
        backend.check_mlp(gate_up, down, first, second)


def test_on_a_device_the_kernel_is_called_with_its_cores(rng, monkeypatch):
    seen = []

    class Kernel:
        def __getitem__(self, cores):
            def call(x, u, v0=None, v1=None, v2=None, widths=(), x_layout="rows"):
                second = [v0, v1, v2][: len(widths)]
                assert x_layout == "rows"
                seen.append((cores, [v is None for v in second], widths))
                ys = [strip if v is None else strip @ v for strip, v in zip(split(x @ u, widths), second, strict=True)]
                return ys[0] if len(ys) == 1 else tuple(ys)

            return call

    def split(strip, widths):
        return jnp.split(strip, np.cumsum(widths)[:-1].tolist(), axis=-1)

    monkeypatch.setitem(sys.modules, "jaxsvd.kernels.neuron.xuv", types.SimpleNamespace(xuv_group=Kernel()))
    for name in ("dense first", "one low-rank"):
        group = make_group(rng, GROUPS[name])
        plan, arrays = packed(Neuron(), group)
        x = np.ones((3, INPUTS), np.float32)
        for y, matrix in zip(jax.jit(partial(Neuron().project, plan))(x, arrays), group, strict=True):
            np.testing.assert_array_equal(y, product(x, matrix))
        Neuron().check(plan, arrays)
    assert seen[0] == (1, [True, False, True], (32, 5, 16)) and seen[-1] == (1, [False], (7,))


def test_what_a_device_says_is_passed_on(rng, monkeypatch):
    class Kernel:
        def __getitem__(self, cores):
            raise RuntimeError("[NCC_IXGM002] a long story\nit does not fit")

    monkeypatch.setitem(sys.modules, "jaxsvd.kernels.neuron.xuv", types.SimpleNamespace(xuv_group=Kernel()))
    with pytest.raises(JaxsvdError, match=r"can't be run \(it does not fit\): use backend xla"):
        Neuron().check(*packed(Neuron(), make_group(rng, GROUPS["one low-rank"])))


def test_loops_and_large_arrays_do_not_stop_the_callback(calls):
    # A callback that waits for XLA's threads would wait for ever here.
    wide = 1024
    group = [Factored(np.eye(wide, dtype=np.float32)[:, :130], np.eye(wide, dtype=np.float32)[:130])]
    backend = Neuron("emulated")
    plan, arrays = packed(backend, group)

    def loop(x, arrays):
        return jax.lax.scan(lambda x, _: (backend.project(plan, x, arrays)[0], None), x, length=3)[0]

    x = np.random.default_rng(0).standard_normal((300, wide)).astype(np.float32)
    compiled = jax.jit(loop).lower(x, arrays).compile()
    wanted = np.where(np.arange(wide) < 130, x, 0)
    np.testing.assert_array_equal(compiled(x, arrays), wanted)
    assert calls == [300] * 3


def test_too_many_matrices_are_refused(rng):
    group = make_group(rng, [(8, 1)] * 4)
    with pytest.raises(UsageError, match="groups of up to 3 matrices, found 4"):
        Neuron("emulated").plan(tuple(map(shape_of, group)))


# The check at load.

BROKEN = {
    "zeros": lambda ys: [np.zeros_like(y) for y in ys],
    "nan": lambda ys: [np.full_like(y, np.nan) for y in ys],
    "one output": lambda ys: [*ys[:-1], np.concatenate([ys[-1][:, :-1], 0 * ys[-1][:, -1:]], axis=1)],
    "exchanged": lambda ys: [ys[0], ys[2], ys[1]],
}


@pytest.fixture
def breaking(monkeypatch):
    """Make the emulator return something else."""

    def install(change):
        run = emulator.run
        monkeypatch.setattr(
            emulator,
            "run",
            lambda *args, **options: types.SimpleNamespace(outputs=tuple(change(run(*args, **options).outputs))),
        )

    return install


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_right_kernels_pass_the_check(rng, dtype, calls):
    backend = Neuron("emulated")
    shapes = [(INPUTS, 7), (7, 40)]
    u, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    plan, arrays = packed(backend, [Factored(u, v), Dense(rng.standard_normal((INPUTS, 16)).astype(dtype))])
    backend.check(plan, arrays)
    assert calls == [1, 130]
    backend.check(plan, arrays)
    assert calls == [1, 130]  # once for each plan


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_refused(rng, breaking, name):
    breaking(BROKEN[name])
    group = make_group(rng, [(32, None), (16, 5), (16, None)])
    backend = Neuron("emulated")
    with pytest.raises(JaxsvdError, match=r"differs from XLA by .* where 0.0001 is allowed.*\(24, 53\) and \(5, 16\)"):
        backend.check(*packed(backend, group))


def test_partial_sums_in_bfloat16_are_refused(rng, breaking):
    breaking(lambda ys: [y.astype(ml_dtypes.bfloat16).astype(np.float32) for y in ys])
    backend = Neuron("emulated")
    u, v = rng.standard_normal((2, 64, 64)).astype(np.float32)
    with pytest.raises(JaxsvdError, match=r"differs from XLA by 0\.001"):
        backend.check(*packed(backend, [Factored(u, v)]))


def test_kernels_that_the_emulator_refuses_are_refused(rng, breaking):
    def refuse(ys):
        raise emulator.EmulationError("a-rule", "broken")

    breaking(refuse)
    backend = Neuron("emulated")
    with pytest.raises(JaxsvdError, match=r"can't be run \(EmulationError: a-rule: broken\): use backend xla"):
        backend.check(*packed(backend, make_group(rng, [(32, 5)])))


def test_a_kernel_of_zeros_is_refused_at_load(tiny_llama, breaking):
    breaking(BROKEN["zeros"])
    with pytest.raises(JaxsvdError, match="a kernel of backend neuron-emulated differs from XLA by 1 of the result"):
        jaxsvd.load(tiny_llama[0], backend="neuron-emulated", progress=False)


# The whole engine on emulated kernels.


@pytest.fixture(scope="module", params=["llama-biased", "qwen3"])
def folders(request, tmp_path_factory):
    """A tiny model, dense and with another rank for each matrix, some dense."""
    dense = tmp_path_factory.mktemp(request.param)
    make_tiny(request.param, dense)
    low_rank = tmp_path_factory.mktemp(request.param + "-low-rank")
    factored.write_factored(dense, low_rank, factored.mixed_ranks(factored.read_tensors(dense)))
    return {"dense": dense, "low-rank": low_rank}


@pytest.mark.parametrize("kind", ["dense", "low-rank"])
def test_the_engine_gives_the_same_tokens_as_on_xla(folders, kind, calls):
    prompts, new = prompts_of(3, 17, 40), 8
    model = jaxsvd.load(folders[kind], backend="neuron-emulated", progress=False)
    assert model.engine.dtype == np.float32 and calls
    calls.clear()
    found = [done.token_ids for done in model.generate(prompts, new)]
    groups = 4 * model.config.num_layers
    assert calls == [3 * 64] * groups + [3] * groups * new
    oracle = jaxsvd.load(folders[kind], backend="xla", progress=False)
    assert found == [done.token_ids for done in oracle.generate(prompts, new)]


def test_the_engine_gives_the_logits_of_xla(tiny_llama, calls):
    tokens = prompts_of(5)
    model, oracle = (jaxsvd.load(tiny_llama[0], backend=name, progress=False) for name in ("neuron-emulated", "xla"))
    calls.clear()
    np.testing.assert_allclose(model.logits(tokens), oracle.logits(tokens), atol=1e-4)
    assert calls == [16] * 4 * model.config.num_layers


# The whole engine, lowered for Neuron.

QWEN3 = SHAPES["qwen3-4b"]


def mixed(path, inputs, outputs):
    """Odd ranks; keys and the matrices back to the stream are dense."""
    return {"q_proj": 333, "v_proj": 77, "gate_proj": 1000, "up_proj": 129}.get(path.rsplit(".", 1)[1])


def custom_calls(traced):
    """The decoded configuration of every custom call, and its operands."""
    text = traced.lower(lowering_platforms=("neuron",)).as_text()
    lines = [line for line in text.splitlines() if "custom_call @" in line]
    assert all("api_version = 2 " in line for line in lines)
    configs = [re.search(r'backend_config = "([^"]*)"', line)[1] for line in lines]
    return [json.loads(base64.b64decode(config)) for config in configs], [
        re.search(r"custom_call @\w+\(([^)]*)\)", line)[1].count("%") for line in lines
    ]


@pytest.mark.parametrize(
    ("keep", "layers", "operands"),
    [(0.8, QWEN3.num_layers, [5, 3, 4, 3]), (None, 4, [2, 2, 2, 2]), (mixed, 4, [4, 2, 4, 2])],
    ids=["low-rank", "dense", "mixed"],
)
def test_every_group_is_one_custom_call(keep, layers, operands):
    engine = abstract_engine(dataclasses.replace(QWEN3, num_layers=layers), keep, Neuron("lowered"))
    for traced in (trace_prefill(engine), trace_decode(engine, MODES["all"])):
        assert lint(traced, allowed=[bridge.CUSTOM_CALL]) == []
        configs, found = custom_calls(traced)
        assert found == operands * layers
        names = ["xuv_group", "xuv_group", "swiglu_xuv", "xuv_group"]  # qkv, o, gate and up, down
        assert [config["func_name"] for config in configs] == names * layers
        assert all(config["grid"] == [bridge.LNC] for config in configs)


def test_every_other_step_is_clean_too():
    engine = abstract_engine(dataclasses.replace(QWEN3, num_layers=2), 0.8, Neuron("lowered"))
    args = shaped((2, 32)), shaped((2,)), cache_of(engine, CAPACITY), shaped(())
    extend = jax.jit(engine.extend, donate_argnums=(3,)).trace(engine.leaves, *args)
    hidden = shaped((2, 32, QWEN3.hidden_size), engine.dtype)
    score = jax.jit(engine.score_tokens).trace(engine.leaves, hidden, shaped((2, 32)))
    assert lint(extend, allowed=[bridge.CUSTOM_CALL]) == []
    assert lint(score) == []


def test_a_long_prefill_is_cut(rng):
    engine = abstract_engine(dataclasses.replace(QWEN3, num_layers=1), 0.8, Neuron("lowered"))
    configs, _ = custom_calls(trace_prefill(engine, batch=9, bucket=512))
    assert len(configs) == 4 * -(-9 * 512 // bridge.TOKENS) == 12


def test_the_plan_is_that_of_xla_but_for_padding_and_order(rng):
    shapes = tuple(map(shape_of, make_group(rng, GROUPS["dense first"])))
    ours, theirs = Neuron().plan(shapes), XLA("neuron").plan(shapes)
    assert ours.widths == (32, 5, 16) and theirs.widths == (32, 16, 16)
    assert not ours.first.transposed
