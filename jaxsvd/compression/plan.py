"""Spending the budget: for every matrix, whether it stays dense or which rank it gets."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxsvd.errors import UsageError
from jaxsvd.weights import break_even

# (inputs, outputs, rank, or None for dense) -> what the matrix then costs, in any unit.
Cost = Callable[[int, int, int | None], float]
FLOOR = 0.15  # of break-even; below it a predicted loss means nothing


def parameters(inputs: int, outputs: int, rank: int | None) -> float:
    """The cost of a matrix in parameters."""
    return inputs * outputs if rank is None else rank * (inputs + outputs)


class Shape(NamedTuple):
    """A matrix, as far as its cost goes."""

    inputs: int
    outputs: int


class Option(NamedTuple):
    """One way to keep a matrix (or an MLP): its rank (or width), None for all of it; what it costs and loses."""

    size: int | None
    cost: float
    loss: float


class Plan(NamedTuple):
    """Ranks of the matrices that are factored, widths of the MLPs that are narrowed, both by path; the rest is dense.

    `cost` and `dense_cost` are in the unit of the plan's `Cost`; `loss` is the predicted loss, nats per token, None
    where nothing was predicted.
    """

    ranks: dict[str, int]
    widths: dict[str, int]
    cost: float
    dense_cost: float
    loss: float | None

    def left(self, path: str, shape: Shape) -> int:
        """The parameters that are left of a matrix."""
        mlp, _, name = path.rpartition(".")
        if path in self.ranks:
            return self.ranks[path] * (shape.inputs + shape.outputs)
        if mlp in self.widths:
            return self.widths[mlp] * (shape.outputs if name == "down_proj" else shape.inputs)
        return shape.inputs * shape.outputs


def rank_options(shape: Shape, losses: np.ndarray, multiple: int, cost: Cost = parameters) -> list[Option]:
    """Dense, and every rank that is a multiple, above the floor and below break-even, by what rank r loses."""
    limit = break_even(*shape)
    first = max(multiple, -(-int(FLOOR * limit) // multiple) * multiple)
    ranks = [rank for rank in range(first, len(losses), multiple) if rank < limit]
    return [Option(None, cost(*shape, None), 0.0)] + [
        Option(rank, cost(*shape, rank), float(losses[rank])) for rank in ranks
    ]


def width_options(inputs: int, losses: np.ndarray, multiple: int, cost: Cost = parameters) -> list[Option]:
    """Every narrower MLP of `inputs` features; `losses[k]` is what keeping k neurons loses."""
    widths = range(multiple, len(losses) - 1, multiple)
    return [Option(k, 2 * cost(inputs, k, None) + cost(k, inputs, None), float(losses[k])) for k in widths]


def global_plan(
    matrices: Mapping[str, Sequence[Option]],
    widths: Mapping[str, tuple[Sequence[str], Sequence[Option]]],
    budget: float,
) -> Plan:
    """The least predicted loss within a budget.

    Lagrange relaxation: at a price λ every matrix takes the option with the least loss + λ·cost, an MLP the better of
    its matrices' options and its widths; λ is the least that the budget allows (this walks the lower convex hulls of
    all options at once). What is left then goes to the upgrades that gain most per cost.

    Args:
        matrices: the options of every matrix by its path; the first is dense.
        widths: the matrices (paths) that an MLP's width replaces, and its options, by the MLP's path.
        budget: the most that all may cost together.

    Raises UsageError where not even the cheapest options fit.
    """
    options_of = {**matrices, **{mlp: options for mlp, (_, options) in widths.items()}}
    tables = {
        path: (np.array([option.cost for option in options]), np.array([option.loss for option in options]))
        for path, options in options_of.items()
    }

    def choose(price: float) -> dict[str, Option]:
        def score(option: Option) -> float:
            return option.loss + price * option.cost

        best = {path: options_of[path][int(np.argmin(loss + price * cost))] for path, (cost, loss) in tables.items()}
        for mlp, (paths, _) in widths.items():
            losers = paths if score(best[mlp]) < sum(score(best[path]) for path in paths) else [mlp]
            for path in losers:
                del best[path]
        return best

    price = _least_price(lambda price: _cost(choose(price)) <= budget)
    if price is None:
        raise UsageError(f"the least that the plan can keep is more than the {budget:.4g} asked for: raise keep")
    chosen = choose(price)
    _spend_the_rest(chosen, options_of, budget)
    sizes = {path: option.size for path, option in chosen.items() if option.size is not None}
    return Plan(
        ranks={path: size for path, size in sizes.items() if path in matrices},
        widths={path: size for path, size in sizes.items() if path in widths},
        cost=_cost(chosen),
        dense_cost=sum(options[0].cost for options in matrices.values()),
        loss=sum(option.loss for option in chosen.values()),
    )


def _cost(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def _least_price(fits: Callable[[float], bool]) -> float | None:
    """The least price at which the budget is kept, to ten digits; None where no price is high enough."""
    if fits(0.0):
        return 0.0
    high = 1e-30
    while not fits(high):
        high *= 4
        if high > 1e30:
            return None
    low = high / 4
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _spend_the_rest(chosen: dict[str, Option], options_of: Mapping[str, Sequence[Option]], budget: float) -> None:
    """Upgrade what gains most per cost, until nothing more fits."""
    left = budget - _cost(chosen)
    while True:
        upgrades = [
            ((now.loss - option.loss) / (option.cost - now.cost), path, option)
            for path, now in chosen.items()
            for option in options_of[path]
            if 0 < option.cost - now.cost <= left and option.loss < now.loss
        ]
        if not upgrades:
            return
        _, path, option = max(upgrades)
        left -= option.cost - chosen[path].cost
        chosen[path] = option


def uniform_plan(shapes: Mapping[str, Shape], keep: float, multiple: int, cost: Cost = parameters) -> Plan:
    """The same keep for every matrix, as nearly as multiples allow.

    What rounding adds or takes is carried on to the next matrix of the same shape, so that all together keep what was
    asked for.
    """
    carried: dict[Shape, float] = {}
    ranks, total = {}, 0.0
    for path, shape in shapes.items():
        wanted = keep * cost(*shape, None) + carried.get(shape, 0.0)
        sizes = [*range(multiple, int(np.ceil(break_even(*shape))), multiple), None]
        size = min(sizes, key=lambda size: abs(cost(*shape, size) - wanted))
        carried[shape] = wanted - cost(*shape, size)
        total += cost(*shape, size)
        if size is not None:
            ranks[path] = size
    return Plan(ranks, {}, total, sum(cost(*shape, None) for shape in shapes.values()), None)
