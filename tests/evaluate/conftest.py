import shutil

import pytest
from evaluating import write_tokenizer


@pytest.fixture(scope="session")
def worded(tiny_llama, tmp_path_factory):
    """(folder, torch model) of a tiny Llama that reads and writes text, character by character."""
    folder = tmp_path_factory.mktemp("worded") / "model"
    shutil.copytree(tiny_llama[0], folder)
    write_tokenizer(folder)
    return folder, tiny_llama[1]
