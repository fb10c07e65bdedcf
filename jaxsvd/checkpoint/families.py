"""How low-rank matrices are named in checkpoints. A new family is a new row of `LAYOUTS`."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxsvd.checkpoint.files import Entry
from jaxsvd.errors import ModelError


class Layout(NamedTuple):
    """Templates of a factored matrix's tensors. `{path}` is the projection's HF path, `{stem}` that without `_proj`.

    `down` is stored (r, in) and is our U transposed; `up` is stored (out, r) and is our V transposed.
    """

    name: str
    down: str
    up: str


LAYOUTS = (
    # SVD-LLM v1 and v2, and SVD-Flash (its current files factor the MLP only, the legacy ones attention too).
    Layout("svd-llm", "{stem}_v_proj", "{stem}_u_proj"),
    # SVD-LLM's Hugging Face export.
    Layout("svd-llm-hf", "{path}.v_proj", "{path}.u_proj"),
)


class Stored(NamedTuple):
    """The tensors of one projection: `weight` where it is dense, `down` and `up` where it is factored."""

    weight: str | None = None
    down: str | None = None
    up: str | None = None
    bias: str | None = None
    rank: int | None = None


class Findings(NamedTuple):
    """What `find` made of a projection: its tensors, the names it accounts for, and what is wrong with them."""

    stored: Stored | None
    names: set[str]
    problems: list[str]


def find(entries: Mapping[str, Entry], path: str, inputs: int, outputs: int, bias: bool) -> Findings:
    """Look for a projection (inputs, outputs) under every name that it may have.

    Names are built from the path and looked up, never parsed, so `v_proj`, `v_v_proj` and `v_proj.v_proj` can't be
    taken for each other.
    """
    stem = path.removesuffix("_proj")
    candidates = [Stored(weight=f"{path}.weight")] if f"{path}.weight" in entries else []
    for layout in LAYOUTS:
        down, up = (f"{template.format(path=path, stem=stem)}.weight" for template in (layout.down, layout.up))
        if down in entries or up in entries:
            candidates.append(Stored(down=down, up=up))
    names = {name for stored in candidates for name in stored[:3] if name and name in entries}
    problems = []
    if not candidates:
        problems.append(f"missing: {path}.weight ({outputs}, {inputs}), dense or factored")
    if len(candidates) > 1:
        problems.append(f"duplicate: {path} is given as {' and as '.join(_names(stored) for stored in candidates)}")
    biases = [name for name in (f"{path}.bias", *(f"{_module(stored.up)}.bias" for stored in candidates if stored.up))]
    biases = [name for name in dict.fromkeys(biases) if name in entries]
    if bias:
        names.update(biases)
        if not biases:
            problems.append(f"missing: {path}.bias ({outputs},)")
        if len(biases) > 1:
            problems.append(f"duplicate: {path} has the biases {' and '.join(biases)}")
        problems += [_wrong(entries, name, (outputs,)) for name in biases if entries[name].shape != (outputs,)]
    for stored in candidates:
        problems += _mis_shaped(entries, stored, inputs, outputs)
    if problems:
        return Findings(None, names, problems)
    stored = candidates[0]._replace(bias=biases[0] if bias else None)
    return Findings(stored._replace(rank=entries[stored.down].shape[0] if stored.down else None), names, [])


def _mis_shaped(entries: Mapping[str, Entry], stored: Stored, inputs: int, outputs: int) -> list[str]:
    if stored.weight:
        shape = entries[stored.weight].shape
        return [] if shape == (outputs, inputs) else [_wrong(entries, stored.weight, (outputs, inputs))]
    assert stored.down and stored.up
    missing = [
        f"missing: {name}, the other factor is there" for name in (stored.down, stored.up) if name not in entries
    ]
    if missing:
        return missing
    down, up = entries[stored.down].shape, entries[stored.up].shape
    problems = []
    if len(down) != 2 or down[1] != inputs or down[0] < 1:
        problems.append(_wrong(entries, stored.down, ("rank", inputs)))
    if len(up) != 2 or up[0] != outputs or up[1] < 1:
        problems.append(_wrong(entries, stored.up, (outputs, "rank")))
    if not problems and down[0] != up[1]:
        problems.append(f"mis-shaped: {stored.down} has rank {down[0]}, {stored.up} has rank {up[1]}")
    return problems


def _wrong(entries: Mapping[str, Entry], name: str, expected: tuple[int | str, ...]) -> str:
    return f"mis-shaped: {name} is {entries[name].shape}, expected ({', '.join(map(str, expected))})"


def _names(stored: Stored) -> str:
    return stored.weight or f"{stored.down} with {stored.up}"


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def listing(folder: object, problems: list[str]) -> ModelError:
    """One error for everything that is wrong with a checkpoint."""
    shown = problems[:50] + ([f"and {len(problems) - 50} more"] if len(problems) > 50 else [])
    return ModelError(
        f"{folder} does not hold the model that its config.json describes; {len(problems)} "
        f"{'thing is' if len(problems) == 1 else 'things are'} wrong:\n  " + "\n  ".join(shown)
    )
