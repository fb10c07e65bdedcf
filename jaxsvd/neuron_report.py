"""What the Trainium kernels cost, by the emulator's model: `scripts/neuron_report.py`.

Every time is a modelled lower bound, never a measurement: all engines overlap perfectly and DMA runs at its full rate.
Bytes are exact. Beside them stands what NeuronMM's authors measured on trn1, read off their figures.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes

from jaxsvd.errors import UsageError
from jaxsvd.kernels.neuron import emulator
from jaxsvd.kernels.neuron.emulator import Cost
from jaxsvd.named import CONFIGS
from jaxsvd.progress import bar
from jaxsvd.weights import uniform_ranks

KEEP, RANK_MULTIPLE = 0.8, 128
PREFILL, DECODE = 1024, (1, 16)
CHAIN, CHAIN_TOKENS = (8192, 4096, 16384), (1024, 2048, 4096, 8192, 16384, 32768)
SIZE = 2  # bytes of a bfloat16


class Shapes(NamedTuple):
    """Widths of a model's projections."""

    hidden: int
    inner: int
    queries: int
    keys: int


def _shapes(name: str) -> Shapes:
    config = CONFIGS[name]
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return Shapes(config.hidden_size, config.intermediate_size, queries, keys)


MODELS = {name: _shapes(name) for name in ("llama-3.2-1b", "llama-3.2-3b", "qwen3-1.7b", "qwen3-4b")}
# NeuronMM (arXiv 2510.25977) on one core of trn1, read off the figures of github.com/Jerry2423/neuron-mm, by tokens:
# ms and GiB of its own kernels (the baselines are NKI tutorials), ms and GiB of what AWS's compiler makes of the same.
Measured = tuple[float | None, float | None, float | None, float | None]
MEASURED: dict[str, dict[int, Measured]] = {
    "fused": {
        4096: (10.2, 0.95, None, None),
        8192: (21.0, 1.88, None, None),
        16384: (41.9, 3.78, None, None),
        32768: (84.3, 7.47, None, None),
    },
    "pair": {
        4096: (14.3, None, 12.5, None),
        8192: (26.7, 3.43, 24.5, 4.3),
        16384: (56.8, 9.7, 50.2, 8.5),
        32768: (116.8, 22.3, 100.1, 17.0),
    },
    "dense": {
        1024: (None, 0.75, 4.3, 0.5),
        2048: (8.5, 1.16, 8.9, 0.9),
        4096: (16.5, 2.02, 15.7, 1.4),
        8192: (43.9, 4.38, 32.9, 5.4),
        16384: (89.0, 15.6, 65.7, 10.5),
        32768: (186.4, 35.6, 130.3, 21.0),
    },
}


class Group(NamedTuple):
    """Projections of one x: its width, and (outputs, rank) of each; `kernel` is what fuses them."""

    name: str
    inputs: int
    members: tuple[tuple[int, int], ...]
    kernel: str

    @property
    def compulsory(self) -> int:
        """Bytes of the weights, which every call must read."""
        return SIZE * sum(rank * (self.inputs + outputs) for outputs, rank in self.members)


def groups_of(shapes: Shapes) -> list[Group]:
    """A layer's groups at KEEP."""
    choose = uniform_ranks(KEEP, RANK_MULTIPLE)

    def group(name: str, inputs: int, outputs: Sequence[int], kernel: str) -> Group:
        ranks = [choose(name, inputs, width) for width in outputs]
        assert all(ranks), f"{name} is dense at keep {KEEP}"
        return Group(name, inputs, tuple((n, r or 0) for n, r in zip(outputs, ranks, strict=True)), kernel)

    return [
        group("qkv", shapes.hidden, (shapes.queries, shapes.keys, shapes.keys), "xuv_group"),
        group("o", shapes.queries, (shapes.hidden,), "xuv"),
        group("gate,up", shapes.hidden, (shapes.inner, shapes.inner), "swiglu_xuv"),
        group("down", shapes.inner, (shapes.hidden,), "xuv, x in tiles"),
    ]


def _run(module: str, kernel: str, target: str, *shapes: tuple[int, ...], **options: Any) -> Cost:
    arrays = [jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for shape in shapes]
    function = getattr(emulator.load(module), kernel)
    return emulator.run(function, *arrays, target=target, values=False, **options).cost


def fused(group: Group, tokens: int, target: str) -> list[Cost]:
    """The fused kernel of a group."""
    x, ranks = (tokens, group.inputs), tuple(rank for _, rank in group.members)
    u, vs = (group.inputs, sum(ranks)), [(rank, outputs) for outputs, rank in group.members]
    if group.kernel == "xuv_group":
        return [_run("xuv", "xuv_group", target, x, u, *vs, widths=ranks)]
    if group.kernel == "swiglu_xuv":
        return [_run("mlp", "swiglu_xuv", target, x, u, *vs, widths=ranks)]
    if group.kernel == "xuv":
        return [_run("xuv", "xuv", target, x, u, *vs)]
    tiles = (128, -(-group.inputs // 128), tokens)
    return [_run("xuv", "xuv", target, tiles, u, *vs, x_layout="tiles")]


def pair(group: Group, tokens: int, target: str) -> list[Cost]:
    """The same unfused: one product with all U, then one with each V, the strips going through HBM."""
    ranks = sum(rank for _, rank in group.members)
    first = _run("baselines", "matmul", target, (tokens, group.inputs), (group.inputs, ranks))
    return [first] + [_run("baselines", "matmul", target, (tokens, r), (r, n)) for n, r in group.members]


def dense(group: Group, tokens: int, target: str) -> list[Cost]:
    """The dense matrices side by side, with the largest block of tokens that fits."""
    outputs = sum(n for n, _ in group.members)
    return [_run("baselines", "matmul", target, (tokens, group.inputs), (group.inputs, outputs))]


WAYS = {"fused": fused, "pair": pair, "dense": dense}


def measure(
    targets: Sequence[str] = (), models: Sequence[str] = (), chain: bool = True, progress: bool | None = None
) -> list[dict[str, Any]]:
    """One row per target, group, number of tokens and way.

    Args:
        targets: trn1, trn2 or trn3; by default all.
        models: those of MODELS whose layers to take; by default all.
        chain: whether to take NeuronMM's chain, too, which takes minutes.
        progress: a progress bar on stderr; by default where stderr is a terminal.

    Raises UsageError for other targets and models.
    """
    for given, known in ((targets, emulator.TARGETS), (models, MODELS)):
        if unknown := [name for name in given if name not in known]:
            raise UsageError(f"there is no {unknown[0]!r} here: choose among {', '.join(known)}")
    jobs: list[Callable[[], Iterable[dict[str, Any]]]] = []
    for target in targets or emulator.TARGETS:
        (k, r, n), sizes = CHAIN, CHAIN_TOKENS if chain else ()
        widest = Group("8192→4096→16384", k, ((n, r),), "xuv")
        jobs += [partial(_measure, target, "chain", widest, tokens) for tokens in sizes]
        for model in models or MODELS:
            tokens_of = (PREFILL, *DECODE)
            jobs += [
                partial(_measure, target, model, group, m) for group in groups_of(MODELS[model]) for m in tokens_of
            ]
            jobs += [partial(_measure_mlp, target, model, tokens) for tokens in tokens_of]
    found: list[dict[str, Any]] = []
    with bar("emulating", len(jobs), "group", progress) as shown:
        for job in jobs:
            found += job()
            shown.update()
    return found


def _measure(target: str, model: str, group: Group, tokens: int) -> Iterator[dict[str, Any]]:
    # gate,up leaves as one product, not as two outputs.
    outputs = group.members[0][0] if group.kernel == "swiglu_xuv" else sum(n for n, _ in group.members)
    compulsory = group.compulsory + SIZE * tokens * (group.inputs + outputs)
    for way, run in WAYS.items():
        costs = run(group, tokens, target)
        row = _row(target, model, group.name, tokens, way, compulsory, costs)
        if way != "pair":  # whose two products have blocks of their own
            name, columns = (
                ("u", sum(r for _, r in group.members)) if way == "fused" else ("w", sum(n for n, _ in group.members))
            )
            times = costs[0].traffic[name].read // (SIZE * group.inputs * columns)
            row["token_block"] = -(-tokens // times)
        yield row | _measured(target, model, way, tokens)


def _measure_mlp(target: str, model: str, tokens: int) -> list[dict[str, Any]]:
    """The whole MLP in one kernel; its other ways are those of its two groups together."""
    *_, first, second = groups_of(MODELS[model])
    (inner, rank), (hidden, last) = first.members[0], second.members[0]
    shapes = [(tokens, hidden), (hidden, 2 * rank), (inner, last), (rank, inner), (rank, inner), (last, hidden)]
    cost = _run("mlp", "mlp_xuv", target, *shapes, widths=(rank, rank))
    compulsory = first.compulsory + second.compulsory + SIZE * tokens * 2 * hidden
    return [_row(target, model, "mlp", tokens, "fused", compulsory, [cost])]


def _row(
    target: str, model: str, group: str, tokens: int, way: str, compulsory: int, costs: Sequence[Cost]
) -> dict[str, Any]:
    row = {"target": target, "model": model, "group": group, "tokens": tokens, "way": way}
    return row | {"compulsory_bytes": compulsory} | _summary(costs)


def _summary(costs: Sequence[Cost]) -> dict[str, Any]:
    """Of kernels that run one after the other."""
    seconds = {engine: sum(cost.seconds[engine] for cost in costs) for engine in costs[0].seconds}
    weights = [traffic for cost in costs for name, traffic in cost.traffic.items() if name[0] in "uvw"]
    return {
        "hbm_bytes": sum(cost.hbm_bytes for cost in costs),
        "instructions": sum(sum(cost.instructions.values()) for cost in costs),
        "array_use": sum(c.macs for c in costs) / (128 * 128 * sum(c.array_cycles for c in costs)),
        "modelled_lower_bound_seconds": seconds | {"total": sum(max(cost.seconds.values()) for cost in costs)},
        "modelled_bound": max(seconds, key=lambda engine: seconds[engine]),
        "weight_bytes_in_runs_below_2048": sum(t.below_2048 for t in weights) / sum(t.read for t in weights),
        "sbuf_peak": max(cost.sbuf_peak for cost in costs),
        "sbuf_margin": min(cost.sbuf_margin for cost in costs),
        "psum_banks": max(cost.psum_banks for cost in costs),
    }


def _measured(target: str, model: str, way: str, tokens: int) -> dict[str, Any]:
    if target != "trn1" or model != "chain" or tokens not in MEASURED[way]:
        return {}
    keys = ("ms", "gib", "compiler_ms", "compiler_gib")
    return {f"neuronmm_measured_{key}": value for key, value in zip(keys, MEASURED[way][tokens], strict=True)}


COLUMNS = [
    "target",
    "model",
    "group",
    "tokens",
    "way",
    "block",
    "GiB",
    "×least",
    "×fused",
    "use",
    "ms",
    "bound",
    "margin",
]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows for people: HBM traffic, that over the least possible and over the fused kernel's, use of the array."""
    lines = ["  ".join(_cells(COLUMNS))]
    fused_bytes: dict[tuple, int] = {}
    for row in found:
        key = (row["target"], row["model"], row["group"], row["tokens"])
        fused_bytes.setdefault(key, row["hbm_bytes"])
        cells = [row["target"], row["model"][:14], row["group"], row["tokens"], row["way"], row.get("token_block", "")]
        cells += [f"{row['hbm_bytes'] / 2**30:.3f}", f"{row['hbm_bytes'] / row['compulsory_bytes']:.2f}"]
        cells += [f"{row['hbm_bytes'] / fused_bytes[key]:.2f}", f"{row['array_use']:.3f}"]
        cells += [f"{row['modelled_lower_bound_seconds']['total'] * 1e3:.3f}", row["modelled_bound"]]
        cells += [f"{row['sbuf_margin'] / 1024:.0f}K"]
        lines.append("  ".join(_cells(cells)) + _beside(row))
    return "\n".join(lines)


def _beside(row: dict[str, Any]) -> str:
    """What NeuronMM's authors measured, for people."""
    found = []
    for name, prefix in (("NeuronMM", ""), ("AWS's compiler", "compiler_")):
        values = [(row.get(f"neuronmm_measured_{prefix}{unit}"), word) for unit, word in (("ms", "ms"), ("gib", "GiB"))]
        if any(value for value, _ in values):
            found.append(f"{name} " + ", ".join(f"{value} {word}" for value, word in values if value))
    return f"  measured: {'; '.join(found)}" if found else ""


def _cells(values: Sequence[Any]) -> list[str]:
    widths = (6, 14, 16, 6, 5, 5, 8, 6, 6, 6, 9, 7, 6)
    padded = zip(values, widths, "<<<<<>>>>>>>>", strict=True)
    return [f"{value!s:{side}{width}}" for value, width, side in padded]


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Traffic of the chain by tokens on each target, and modelled time of a layer's groups against dense."""
    from jaxsvd import plots

    targets = sorted({row["target"] for row in found})
    figure = plots.figure(4.5 * len(targets), 7)
    for column, (upper, lower) in enumerate(figure.subplots(2, len(targets), squeeze=False).T):
        own = [row for row in found if row["target"] == targets[column]]
        _draw_chain(upper, [row for row in own if row["model"] == "chain"])
        upper.set(title=f"{targets[column]}: HBM GiB of the chain (emulated)", xlabel="tokens")
        _draw_layers(lower, own)
        lower.set(title=f"{targets[column]}: time of dense over fused (modelled)")
    figure.savefig(path)


def _draw_chain(axes: Any, chain: Sequence[dict[str, Any]]) -> None:
    for way, color in zip(WAYS, ("C0", "C1", "C2"), strict=True):
        own = [row for row in chain if row["way"] == way]
        measured = [(row["tokens"], gib) for row in own if (gib := row.get("neuronmm_measured_gib"))]
        for points, style, label in (
            ([(row["tokens"], row["hbm_bytes"] / 2**30) for row in own], "o-", way),
            (measured, "x:", f"{way}, NeuronMM measured"),
        ):
            if points:
                axes.loglog(*zip(*points, strict=True), style, color=color, label=label)
    if chain:
        axes.legend(fontsize=7)


def _draw_layers(axes: Any, own: Sequence[dict[str, Any]]) -> None:
    names = [name for name in MODELS if any(row["model"] == name for row in own)]
    for offset, tokens in enumerate((PREFILL, *DECODE)):
        ratios = [_layer(own, name, "dense", tokens) / _layer(own, name, "fused", tokens) for name in names]
        axes.bar([i + 0.27 * (offset - 1) for i in range(len(names))], ratios, 0.25, label=f"{tokens} tokens")
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.legend(fontsize=7, loc="lower right")


def _layer(found: Sequence[dict[str, Any]], model: str, way: str, tokens: int) -> float:
    chosen = [row for row in found if (row["model"], row["way"], row["tokens"]) == (model, way, tokens)]
    chosen = [row for row in chosen if row["group"] != "mlp"]  # gate,up and down once more
    return sum(row["modelled_lower_bound_seconds"]["total"] for row in chosen)


def as_json(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and what they are."""
    note = "emulated: bytes are exact, times are modelled lower bounds; nothing was run on Trainium"
    return {"note": note, "keep": KEEP, "rows": list(found)}
