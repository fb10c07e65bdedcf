"""The notebook's cells run, in order, in one namespace."""

import json
from pathlib import Path

import numpy as np

import jaxsvd
from jaxsvd.demo import get_speeches

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def test_the_notebook_runs(source, capsys):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or "import" in "".join(cell["source"]) for cell in cells), "execute it: make notebook"
    namespace = {}
    for cell in cells:
        code = "".join(cell["source"])
        if "jaxsvd.compress(" in code:  # of the whole model it takes minutes, as in `make demo`
            assert "Paris" in capsys.readouterr().out
            namespace |= {"get_demo_model": lambda: source, "lm": jaxsvd.load(source)}
        exec(compile(code, str(NOTEBOOK), "exec"), namespace)
    assert 0.85 < namespace["report"].keep_linears < 0.95
    # On a text of other years.
    ids = namespace["lm"].encode(get_speeches(2010, 2012).read_text()[5000:9000])[:256]
    dense, low_rank = (_loss(namespace[name].logits([ids])[0], ids) for name in ("lm", "low_rank"))
    assert abs(low_rank - dense) < 0.3


def _loss(logits, ids):
    """Nats per token."""
    logits = logits[:-1].astype(np.float64)
    top = logits.max(-1)
    return (np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[np.arange(len(ids) - 1), ids[1:]]).mean()
