"""How low-rank matrices are named in checkpoints. A new family is a new row of `LAYOUTS`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxsvd.checkpoint.files import Entry
from jaxsvd.errors import ModelError


class Layout(NamedTuple):
    """Templates of a factored matrix's tensors.

    `{path}` is the projection's HF path (`model.layers.0.self_attn.q_proj`), `{stem}` that without `_proj`, `{short}`
    the last part of the stem (`q`), `{layer}` the number of the layer. `down` is stored (r, in) and is our U
    transposed; `up` is stored (out, r) and is our V transposed. `keys` are what config.json has where a matrix is
    stored so: they decide where names and shapes leave a choice.
    """

    name: str
    down: str
    up: str
    elsewhere: str = ""  # a second name of the same down factor
    keys: tuple[str, ...] = ()


LAYOUTS = (
    # SVD-LLM v1 and v2, and SVD-Flash (its current files factor the MLP only, the legacy ones attention too).
    Layout("svd-llm", "{stem}_v_proj.weight", "{stem}_u_proj.weight"),
    # SVD-LLM's Hugging Face export.
    Layout("svd-llm-hf", "{path}.v_proj.weight", "{path}.u_proj.weight"),
    # ASVD, and LowRankArena's own layout; Dobi-SVD has the same names the other way round.
    Layout("asvd", "{path}.BLinear.weight", "{path}.ALinear.weight", keys=("truncation_ranks", "low_rank_modules")),
    Layout("dobi-svd", "{path}.ALinear.weight", "{path}.BLinear.weight", keys=("dobi_target_modules",)),
    # Basis Sharing: the layers of a group share `down`, and `up` has the name of the dense matrix.
    Layout("basis-sharing", "{stem}_basis.weight", "{path}.weight", elsewhere="model.{short}_basis.{layer}.weight"),
    # KFAC-SVD (LEMS), below `wrapped_model.`.
    Layout("kfac-svd", "{path}.mod_a.weight", "{path}.mod_b.weight"),
    Layout("aa-svd", "{path}.V.weight", "{path}.U.weight"),
    # DynRank, with factors that are parameters or modules.
    Layout("dynrank", "{path}.first", "{path}.second"),
    Layout("dynrank", "{path}.first.weight", "{path}.second.weight"),
)
# Basis Sharing says in config.json which layers share the basis of which projection: {"k_groups": [[0, 1], [2, 3]]}.
GROUPS = {
    "self_attn": {name: f"{name}_groups" for name in "qkvo"},
    "mlp": {name: f"{name}_groups" for name in ("gate", "up", "down")},
}


class Stored(NamedTuple):
    """The tensors of one projection: `weight` where it is dense, `down` and `up` where it is factored."""

    weight: str | None = None
    down: str | None = None
    up: str | None = None
    bias: str | None = None
    rank: int | None = None
    layout: str | None = None
    copies: tuple[str, ...] = ()  # further names of `down`, whose tensors must be equal to it


class Findings(NamedTuple):
    """What `find` made of a projection: its tensors, the names it accounts for, and what is wrong with them."""

    stored: Stored | None
    names: set[str]
    problems: list[str]


def find(
    entries: Mapping[str, Entry],
    path: str,
    inputs: int,
    outputs: int,
    bias: bool,
    raw: Mapping[str, Any] | None = None,
    partners: tuple[str, ...] = (),
) -> Findings:
    """Look for a projection (inputs, outputs) under every name that it may have.

    Names are built from the path and looked up, never parsed, so `v_proj`, `v_v_proj` and `v_proj.v_proj` can't be
    taken for each other.

    Args:
        entries: the tensors of the checkpoint.
        path: the HF path of the projection.
        inputs: its width.
        outputs: its outputs.
        bias: whether it has one.
        raw: config.json, asked only where the tensors leave a choice.
        partners: the projections that share a down factor with it, in the order in which to look for it (`sharing`).
    """
    factored = [stored for layout in LAYOUTS if (stored := _candidate(entries, layout, path, partners or (path,)))]
    factored, problems = _one_order(entries, factored, inputs, outputs, raw or {})
    candidates = list(factored)
    if f"{path}.weight" in entries and all(stored.up != f"{path}.weight" for stored in factored):
        candidates.insert(0, Stored(weight=f"{path}.weight"))
    named = [name for stored in candidates for name in (*stored[:3], *stored.copies)]
    names = {name for name in named if name and name in entries}
    if not candidates and not problems:
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


def _spell(template: str, path: str) -> str:
    parts = path.split(".")
    stem = path.removesuffix("_proj")
    return template.format(
        path=path, stem=stem, short=stem.split(".")[-1], layer=parts[2] if parts[:2] == ["model", "layers"] else ""
    )


def _candidate(entries: Mapping[str, Entry], layout: Layout, path: str, partners: tuple[str, ...]) -> Stored | None:
    """The projection in this layout, if any of its tensors is there."""
    up = _spell(layout.up, path)
    downs = [_spell(t, partner) for t in (layout.down, layout.elsewhere) if t for partner in partners]
    present = [name for name in dict.fromkeys(downs) if name in entries]
    if not present and (up not in entries or up == f"{path}.weight"):
        return None
    down, *copies = present or [_spell(layout.down, partners[0])]
    return Stored(down=down, up=up, layout=layout.name, copies=tuple(copies))


def _one_order(
    entries: Mapping[str, Entry], found: list[Stored], inputs: int, outputs: int, raw: Mapping[str, Any]
) -> tuple[list[Stored], list[str]]:
    """Of ASVD's and Dobi-SVD's reading of the same two tensors, keep the one that their shapes allow.

    The shapes decide but where r = in = out, when both tensors are square: then config.json does.
    """
    either = [stored for stored in found if stored.layout in ("asvd", "dobi-svd")]
    if len(either) < 2:
        return found, []
    rest = [stored for stored in found if stored not in either]
    fitting = [stored for stored in either if not _mis_shaped(entries, stored, inputs, outputs)]
    if len(fitting) != 1:
        keys = {layout.name: layout.keys for layout in LAYOUTS}
        named = [stored for stored in either if any(key in raw for key in keys[stored.layout or ""])]
        if len(named) == 1:
            return [*rest, *named], []
        if fitting:
            down, up = either[0].down, either[0].up
            return rest, [
                f"ambiguous: {up} and {down} are both square, so they may be ASVD's or Dobi-SVD's, and config.json "
                "names neither: add `truncation_ranks` for ASVD, or `dobi_target_modules` for Dobi-SVD"
            ]
    return [*rest, *(fitting or either[:1])], []


def sharing(raw: Mapping[str, Any], paths: Mapping[str, Any]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Who shares a down factor with whom, as config.json says: path → where to look for its factor, and problems.

    That is `low_rank.shared` of our own folders, {path: the path that holds the factor}, and Basis Sharing's groups.
    """
    partners: dict[str, tuple[str, ...]] = {}
    problems = []
    descriptor = raw.get("low_rank")
    shared = descriptor.get("shared", {}) if isinstance(descriptor, dict) else {}
    if not isinstance(shared, dict):
        return {}, ["config.json: low_rank.shared is no object of matrix paths to matrix paths"]
    for path, owner in shared.items():
        if path not in paths or not isinstance(owner, str) or owner not in paths or owner in shared:
            problems.append(f"config.json: low_rank.shared says that {path} has the factor of {owner}, which it can't")
        else:
            partners[path] = (owner, path)
    for module, keys in GROUPS.items():
        for short, key in keys.items():
            groups = raw.get(key) or []
            if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
                problems.append(f"config.json: {key} is no list of lists of layers")
                continue
            for group in groups:
                members = tuple(f"model.layers.{layer}.{module}.{short}_proj" for layer in group)
                if unknown := [path for path in members if path not in paths or path in partners]:
                    problems.append(f"config.json: {key} has {unknown[0]}, which is not there or in another group")
                else:
                    partners |= dict.fromkeys(members, members)
    return partners, problems


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


def advice(name: str) -> str:
    """What to do about an unexpected tensor, where that is known."""
    if ".lora_" in name:
        return ": `jaxsvd convert` merges LoRA pairs"
    if name.startswith("lm_head"):
        return ": `jaxsvd convert` multiplies a factored head out"
    return ""


def listing(folder: object, problems: list[str]) -> ModelError:
    """One error for everything that is wrong with a checkpoint."""
    shown = problems[:50] + ([f"and {len(problems) - 50} more"] if len(problems) > 50 else [])
    return ModelError(
        f"{folder} does not hold the model that its config.json describes; {len(problems)} "
        f"{'thing is' if len(problems) == 1 else 'things are'} wrong:\n  " + "\n  ".join(shown)
    )
