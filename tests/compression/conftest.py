"""What the tests of compression share."""

import json

import pytest

from jaxsvd import demo
from jaxsvd.checkpoint.files import TensorFiles
from jaxsvd.checkpoint.write import TensorWriter, copy_companions, write_json


@pytest.fixture(scope="session")
def text():
    return demo.get_speeches(1950, 1999)


@pytest.fixture(scope="session")
def source(smollm, tmp_path_factory):
    """SmolLM2's first two layers: real matrices in little time."""
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
