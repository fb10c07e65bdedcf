"""The notebook's cells run, in order, in one namespace."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


def test_the_notebook_runs(smollm, capsys):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or "import" in "".join(cell["source"]) for cell in cells), "execute it: make notebook"
    namespace = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), namespace)
    assert "Paris" in capsys.readouterr().out
    assert 0.85 < namespace["report"].keep_linears < 0.95
