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
from jaxsvd.kernels.gpu.perlayer import load
from jaxsvd.kernels.gpu.phases import Norm, Phase, Streamed, Tiles, X
from jaxsvd.kernels.gpu.shape import ROWS, Group, LayerShape, roomy
from jaxsvd.kernels.gpu.stream import columns, squares, sums


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
    at `mixed`. Buffers, weights, norms and the stream may be None where only sizes are asked for.
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
    size: int = 0

    def __post_init__(self) -> None:
        shape, (qkv, o, gate_up, down) = self.shape, self.weights
        self.normed = [self._take(shape.qkv.inputs) for _ in range(2)]
        self.mixed, inner = self._take(shape.o.inputs), self._take(shape.down.inputs)
        self.before, self.heads = self._project(shape.qkv, qkv)
        self.behind = [
            *self._add(shape.o, o, self.mixed, 1, self.layer),
            *self._gate(shape.gate_up, gate_up, inner),
            *self._add(shape.down, down, inner, 0, self.layer + 1),
        ]

    @property
    def phases(self) -> list[Phase]:
        """All of them."""
        return [*self.before, *self.behind]

    @property
    def layout(self) -> Any:
        """Of the results of a tile."""
        return sums(self.height)

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

        def store(row: jax.Array, sums: list[jax.Array], _: Any) -> None:
            columns(self.buffers.vectors, start + row, ROWS)[...] = sums[0].astype(jnp.bfloat16)

        return Tiles(rows, members, store)

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

    def _passing(self, group: Group, places: Sequence[Any], row: jax.Array) -> list[Any]:
        """What the first product gave of members that are dense, or of those that are so in other layers anything.

        What nobody sends must not be waited for: of these it is the beginning.
        """
        rows = ((i, group.unless_dense(i, 0, row)) for i in group.dense)
        return [columns(self.buffers.vectors, places[i] + at, ROWS) for i, at in rows]

    def _peek(self, group: Group, places: Sequence[Any], row: jax.Array) -> list[jax.Array]:
        """The same, loaded, but not there yet perhaps."""
        return self.stream.peek(self._passing(group, places, row), self.layout)

    def _results(
        self,
        group: Group,
        places: Sequence[Any],
        row: jax.Array,
        sums: Sequence[jax.Array],
        peeked: Sequence[jax.Array],
    ) -> list[jax.Array]:
        """The result of each member: its sums, or what was passed on where it is dense."""
        found = self.stream.settle(self._passing(group, places, row), peeked, self.layout)
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

        def held(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            place = jnp.minimum(layer, self.layers - 1), pl.ds(row, ROWS)
            gain = load(self.norms[norm].at[place], self.layout.reduce((0,)) if several else self.layout)
            return load(columns(buffers.residual, row, ROWS), self.layout), gain

        def add(row: jax.Array, more: jax.Array, held: tuple[jax.Array, jax.Array]) -> None:
            total, gain = held[0] + more, held[1].astype(jnp.float32)
            if several:
                gain = plgpu.layout_cast(lax.broadcast_in_dim(gain, total.shape, (1,)), self.layout)
            columns(buffers.residual, row, ROWS)[...] = total
            columns(buffers.vectors, normed + row, ROWS)[...] = (total * gain).astype(jnp.bfloat16)
            square, tile = jnp.sum(total * total, axis=-1), first_square + lax.div(row, ROWS)
            if several:
                buffers.squares.at[pl.ds(0, self.height), tile][...] = square
            else:
                buffers.squares[0, tile] = square

        x = X(buffers.vectors, source, group.inputs, group.inputs)
        if not group.low_rank:
            lone = Streamed(weights[0], group.inputs)
            tiles = Tiles(group.outputs[0], [lone], lambda row, sums, held: add(row, sums[0], held), held)
            return [Phase([x], [tiles], fixed=True)]
        phases, places = self._first(group, weights[0], x)
        strips, members = self._second(group, weights[1:], places)

        def early(row: jax.Array) -> tuple[Any, list[jax.Array]]:
            return held(row), self._peek(group, places, row)

        def store(row: jax.Array, sums: list[jax.Array], given: tuple[Any, list[jax.Array]]) -> None:
            add(row, self._results(group, places, row, sums, given[1])[0], given[0])

        return [*phases, Phase(strips, [Tiles(group.outputs[0], members, store, early)], fixed=True)]

    def _gate(self, group: Group, weights: Sequence[Any], target: Any) -> list[Phase]:
        """The phases of gate and up, whose tiles go in pairs."""
        x, norm = self._normed(1)

        def put(row: jax.Array, pair: Sequence[jax.Array]) -> None:
            columns(self.buffers.vectors, target + row, ROWS)[...] = gate(*pair).astype(jnp.bfloat16)

        if not group.low_rank:
            members = [Streamed(weights[0], group.inputs, start) for start in group.starts]
            return [Phase([x], [Tiles(group.outputs[0], members, lambda row, sums, _: put(row, sums))], norm)]
        phases, places = self._first(group, weights[0], x, norm)
        strips, members = self._second(group, weights[1:], places)

        def early(row: jax.Array) -> list[jax.Array]:
            return self._peek(group, places, row)

        def store(row: jax.Array, sums: list[jax.Array], passed: list[jax.Array]) -> None:
            put(row, self._results(group, places, row, sums, passed))

        return [*phases, Phase(strips, [Tiles(group.outputs[0], members, store, early)])]
