"""The products of a layer, and what the blocks tell each other by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxsvd.kernels.gpu import present
from jaxsvd.kernels.gpu.layouts import partial_sums
from jaxsvd.kernels.gpu.phases import Norm, Phase, Streamed, Tiles, X
from jaxsvd.kernels.gpu.regions import Rows
from jaxsvd.kernels.gpu.shape import ROWS, Group, LayerShape, roomy
from jaxsvd.kernels.gpu.stream import columns, squares


def gate(g: jax.Array, u: jax.Array) -> jax.Array:
    """silu(g)·u."""
    return g / (1.0 + jnp.exp(-g)) * u


@dataclass(frozen=True)
class Buffers:
    """What the blocks tell each other by, in global memory, with a row each, or `height` of several.

    `vectors` and `squares` are there twice, for layers of even and of odd numbers: while one sends and reads, what was
    read in the other is cleared. All else is read by the block that has stored it.
    """

    residual: Any  # the residual stream, float32
    vectors: Any  # what products read and give, bfloat16
    squares: Any  # of the residual stream before its two norms, float32 (see `phases.Norm`), and behind them a counter


@dataclass
class Products:
    """The products of a layer, in order: those `before` attention, and those `behind` it.

    Of the vectors, `size` elements a layer, twice `room` in all, q, k and v are at `heads`, and what attention gives
    at `mixed`. Buffers, weights, norms and the stream may be None where only sizes are asked for. If `alone` names a
    group, this has only the products of that one.
    """

    shape: LayerShape  # of this layer
    layer: Any
    layers: int
    weights: Sequence[Sequence[Any]]
    norms: Sequence[Any]  # their weights, (layers, hidden) each
    buffers: Buffers
    stream: Any
    height: int
    room: int = 0
    alone: str | None = None
    size: int = 0

    def __post_init__(self) -> None:
        shape, (qkv, o, gate_up, down) = self.shape, self.weights
        self.normed = [self._take(shape.qkv.inputs) for _ in range(2)]
        self.mixed, inner = self._take(shape.o.inputs), self._take(shape.down.inputs)
        self.before, self.heads = self._project(shape.qkv, qkv)
        groups = {
            "o": self._add(shape.o, o, self.mixed, 1, self.layer),
            "gate_up": self._gate(shape.gate_up, gate_up, inner),
            "down": self._add(shape.down, down, inner, 0, self.layer + 1),
        }
        self.behind = [phase for name, phases in groups.items() if self.alone in (name, None) for phase in phases]
        self.before = [] if self.alone else self.before

    @property
    def phases(self) -> list[Phase]:
        """All of them."""
        return [*self.before, *self.behind]

    @property
    def layout(self) -> Any:
        """Of the results of four tiles."""
        return partial_sums(self.height)

    def clear(self, block: jax.Array, blocks: int) -> None:
        """Take away what the layer before has sent: for the next one, as soon as all have read it."""
        present.clear(self.buffers.vectors, ((self.layer + 1) & 1) * self.room, self.room, block, blocks)
        for norm in range(2):
            start, tiles = self._squares(self.layer + 1, norm), self.shape.qkv.inputs // ROWS
            present.clear(self.buffers.squares, start, tiles, block, blocks)

    def _take(self, width: int) -> Any:
        start, self.size = self.size, self.size + width
        return self._own + start

    @property
    def _own(self) -> Any:
        """Where this layer's vectors begin."""
        return (self.layer & 1) * self.room

    def _squares(self, layer: Any, norm: int) -> Any:
        """Where the squares before a norm begin."""
        return (2 * (layer & 1) + norm) * squares(self.shape.qkv.inputs)

    def _tiles(self, rows: int, members: Sequence[Streamed], start: Any) -> Tiles:
        """Products whose results go to `vectors` from element `start` on."""

        return Tiles(rows, members, lambda rows, sums, _: self._send(rows, start, sums[0]))

    def _send(self, rows: Rows, start: Any, results: jax.Array) -> None:
        """Results to `vectors` from element `start` on."""
        place = rows.of(lambda row: columns(self.buffers.vectors, start + row, ROWS))
        self.stream.send(place, results.astype(jnp.bfloat16), self.layout)

    def _normed(self, norm: int) -> tuple[X, Norm]:
        """What the first product behind a norm reads."""
        width, start = self.shape.qkv.inputs, self._squares(self.layer, norm)
        x = X(self.buffers.vectors, self.normed[norm], width, width)
        return x, Norm(self.buffers.squares, start, width, self.shape.eps)

    def _first(self, group: Group, weight: Any, x: X, norm: Norm | None = None) -> tuple[list[Phase], list[Any]]:
        """The product that serves a whole group, and where each member's result begins."""
        strip = self._take(sum(group.most))
        tiles = self._tiles(sum(group.widths), [Streamed(weight, group.inputs)], strip)
        return [Phase([x], [tiles], norm)], [strip + start for start in group.starts]

    def _second(self, group: Group, weights: Sequence[Any], places: Sequence[Any]) -> tuple[list[X], list[Streamed]]:
        """The V of each low-rank member, and what they read, which lies at `places`."""
        members, at = [], 0
        for weight, i in zip(weights, group.low_rank, strict=True):
            members.append(Streamed(weight, group.ranks[i], 0, at))
            at += roomy(group.deepest[i])
        return [X(self.buffers.vectors, places[i], group.ranks[i], group.deepest[i]) for i in group.low_rank], members

    def _passing(self, group: Group, places: Sequence[Any], rows: Rows) -> list[Any]:
        """What the first product gave of members that are dense, or of those that are so in other layers anything.

        What nobody sends must not be waited for: of these it is the beginning.
        """
        return [
            rows.first_of(
                lambda row, i=i: columns(self.buffers.vectors, places[i] + group.unless_dense(i, 0, row), ROWS),
                group.unless_dense(i, 1, rows.count),
            )
            for i in group.dense
        ]

    def _results(self, group: Group, places: Sequence[Any], rows: Rows, sums: Sequence[jax.Array]) -> list[jax.Array]:
        """The result of each member: its sums, or what was passed on where it is dense."""
        passing = self._passing(group, places, rows)
        found = self.stream.settle(passing, self.stream.peek(passing, self.layout), self.layout)
        passed = dict(zip(group.dense, (part.astype(jnp.float32) for part in found), strict=True))
        given = passed | dict(zip(group.low_rank, sums, strict=True))
        for i in set(passed) & set(group.low_rank):
            numbers = plgpu.broadcasted_iota(jnp.int32, given[i].shape, 0, layout=self.layout)
            given[i] = jnp.where(numbers >= group.ranks[i], passed[i], given[i])  # all, or none
        return [given[i] for i in range(len(group.ranks))]

    def _project(self, group: Group, weights: Sequence[Any]) -> tuple[list[Phase], list[Any]]:
        """The phases of a group behind a norm, and where each member's result begins."""
        phases, places = self._first(group, weights[0], *self._normed(0))
        strips, members = self._second(group, weights[1:], places)
        tiles = []
        for i, member in zip(group.low_rank, members, strict=True):
            result = self._take(group.outputs[i])
            tiles.append(self._tiles(group.unless_dense(i, group.outputs[i], 0), [member], result))
            places[i] = group.unless_dense(i, result, places[i])
        return [*phases, *([Phase(strips, tiles)] if tiles else [])], places

    def _add(self, group: Group, weights: Sequence[Any], source: Any, norm: int, layer: Any) -> list[Phase]:
        """The phases of a lone matrix, whose result is added to the residual stream.

        Which norm follows, and in which layer. What depends on it is for nothing behind the last layer.
        """
        several, buffers = self.height > 1, self.buffers
        normed = self.normed[norm] + ((layer & 1) - (self.layer & 1)) * self.room
        first_square = self._squares(layer, norm)

        def held(rows: Rows) -> tuple[jax.Array, jax.Array]:
            last = jnp.minimum(layer, self.layers - 1)
            gains = rows.of(lambda row: self.norms[norm].at[last, pl.ds(row, ROWS)])
            (gain,) = self.stream.peek([gains], self.layout.reduce((1,)) if several else self.layout)
            (before,) = self.stream.peek([residual(rows)], self.layout)
            return before, gain

        def residual(rows: Rows) -> Any:
            return rows.of(lambda row: columns(buffers.residual, row, ROWS))

        def square(row: jax.Array) -> Any:
            tile = first_square + lax.div(row, ROWS)
            return buffers.squares.at[pl.ds(0, self.height) if several else 0, tile]

        def add(rows: Rows, more: jax.Array, held: tuple[jax.Array, jax.Array]) -> None:
            total, gain = held[0] + more, held[1].astype(jnp.float32)
            if several:
                gain = plgpu.layout_cast(lax.broadcast_in_dim(gain, total.shape, (0, 2)), self.layout)
            self.stream.send(residual(rows), total, self.layout)
            self._send(rows, normed, total * gain)
            last = total.ndim - 1
            self.stream.send(rows.of(square, ROWS), jnp.sum(total * total, axis=last), self.layout.reduce((last,)))

        x = X(buffers.vectors, source, group.inputs, group.inputs)
        if not group.low_rank:
            lone = Streamed(weights[0], group.inputs)
            tiles = Tiles(group.outputs[0], [lone], lambda rows, sums, held: add(rows, sums[0], held), held)
            return [Phase([x], [tiles], fixed=True)]
        phases, places = self._first(group, weights[0], x)
        strips, members = self._second(group, weights[1:], places)

        def store(rows: Rows, sums: list[jax.Array], held: tuple[jax.Array, jax.Array]) -> None:
            add(rows, self._results(group, places, rows, sums)[0], held)

        return [*phases, Phase(strips, [Tiles(group.outputs[0], members, store, held)], fixed=True)]

    def _gate(self, group: Group, weights: Sequence[Any], target: Any) -> list[Phase]:
        """The phases of gate and up, whose tiles go in pairs."""
        x, norm = self._normed(1)

        def put(rows: Rows, pair: Sequence[jax.Array]) -> None:
            self._send(rows, target, gate(*pair))

        if not group.low_rank:
            members = [Streamed(weights[0], group.inputs, start) for start in group.starts]
            return [Phase([x], [Tiles(group.outputs[0], members, lambda rows, sums, _: put(rows, sums))], norm)]
        phases, places = self._first(group, weights[0], x, norm)
        strips, members = self._second(group, weights[1:], places)

        def store(rows: Rows, sums: list[jax.Array], _: Any) -> None:
            put(rows, self._results(group, places, rows, sums))

        return [*phases, Phase(strips, [Tiles(group.outputs[0], members, store)])]
