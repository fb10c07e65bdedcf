"""The order in which a block goes through its tiles of a phase: the same where weights are copied and where multiplied.

Each warp has a part of the inputs. The sums that it has of them go to shared memory, and those of four tiles are added
up at once, a tile to a warp: for one tile after the other the warps would wait for each other much longer.

These four are multiplied side by side, each span of x, a slot's inputs, with all of them: so it need be brought to
registers once for four slots. Where all x is wider than what is held, and comes in turns, all tiles are. But of eight
rows sums in registers, of one tile after the other, are worth more than x there: see `SPANWISE`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxsvd.kernels.gpu.layouts import partial_sums
from jaxsvd.kernels.gpu.perlayer import load
from jaxsvd.kernels.gpu.phases import Phase, Streamed, Tiles
from jaxsvd.kernels.gpu.regions import Rows
from jaxsvd.kernels.gpu.shape import ROWS, SPAN, WARPS

if TYPE_CHECKING:
    from jaxsvd.kernels.gpu.stream import Stream

SPANWISE = 1, 16  # heights of x with which tiles go side by side even if it does not come in turns


@dataclass(frozen=True)
class Sweep:
    """Some tiles of a phase, of which a block has `mine`, from its `first` on."""

    stream: "Stream"
    phase: Phase
    tiles: Tiles
    first: jax.Array
    mine: jax.Array

    def fill(self, count: jax.Array) -> jax.Array:
        """Copy the weights into the ring, of which `count` slots have been used; the count behind them."""
        return self._each(self._copy, count)

    def multiply(self, number: jax.Array, count: jax.Array) -> jax.Array:
        """The products, and what becomes of them, from the `number`-th turn on; the count behind the slots."""
        return self._each(partial(self._multiply, number), count)

    @property
    def _turns(self) -> int:
        """How often what is held is filled."""
        return self.stream.turns(self.phase)

    def _each(self, work: Callable[[Any, jax.Array, jax.Array], jax.Array], count: jax.Array) -> jax.Array:
        """`work(the first tile, how many, count)` on those that go side by side, which gives the count behind them."""
        if self._turns > 1:
            return work(0, self.mine, count)

        def four(i: jax.Array, count: jax.Array) -> jax.Array:
            return work(i * WARPS, jnp.minimum(self.mine - i * WARPS, WARPS), count)

        return self.stream.loop(0, fours(self.mine), four, count)

    @property
    def _spanwise(self) -> bool:
        """Whether a span of x goes with all tiles side by side; else they are multiplied one after the other."""
        return self._turns > 1 or self.stream.height in SPANWISE

    def _copy(self, start: Any, size: jax.Array, count: jax.Array) -> jax.Array:
        """Copy some tiles: slots in the order in which `_by_tiles` and `_by_spans` take them."""

        def slot(member: int, i: jax.Array, part: jax.Array, count: jax.Array) -> jax.Array:
            return self.stream.copy(self.tiles.members[member], self._row(start + i), part, count)

        def tile(i: jax.Array, count: jax.Array) -> jax.Array:
            for member, one in enumerate(self.tiles.members):
                count = self.stream.loop(0, one.slots, partial(slot, member, i), count)
            return count

        if not self._spanwise:
            return self.stream.loop(0, size, tile, count)
        for _, members in self.phase.sweeps(self.tiles):

            def tiles(part: jax.Array, i: jax.Array, count: jax.Array, members: list[int] = members) -> jax.Array:
                for member in members:
                    count = slot(member, i, part, count)
                return count

            def span(part: jax.Array, count: jax.Array, tiles: Any = tiles) -> jax.Array:
                return self.stream.loop(0, size, partial(tiles, part), count)

            count = self.stream.loop(0, self._slots(members), span, count)
        return count

    def _multiply(self, number: jax.Array, start: Any, size: jax.Array, count: jax.Array) -> jax.Array:
        stream, members = self.stream, range(len(self.tiles.members))

        def end(i: jax.Array, early: Any) -> Any:
            after = self.tiles.early(self._rows(start, size, i + 1)) if self._turns > 1 else early
            begin, _ = self._four(size, i)
            sums = [self._total(begin, member) for member in members]
            rows = self._rows(start, size, i)
            self.tiles.store(rows, list(map(stream.scaled, sums)) if self.phase.norm else sums, early)
            return after

        early = self.tiles.early(self._rows(start, size, 0))
        stream.together()  # all warps have read the sums of the tiles before
        count = (self._by_spans if self._spanwise else self._by_tiles)(number, start, size, count)
        if self.phase.norm:
            pl.when(start == 0)(lambda: stream.complete(number + (self._turns - 1)))  # the scales
        stream.together()
        if self._turns > 1:
            stream.loop(0, fours(size), end, early)
        else:
            end(jnp.int32(0), early)
        return count

    def _by_tiles(self, number: jax.Array, start: Any, size: jax.Array, count: jax.Array) -> jax.Array:
        """The sums of some tiles, one after the other; the count behind their slots."""
        stream = self.stream

        def tile(i: jax.Array, count: jax.Array) -> jax.Array:
            for member, one in enumerate(self.tiles.members):

                def add(part: jax.Array, given: Any, one: Streamed = one) -> tuple[jax.Array, jax.Array]:
                    sums, count = given
                    place = one.x // SPAN + part
                    pl.when(start + i == 0)(lambda: stream.arrive(place, number))
                    return stream.add(sums, count, stream.part(place, count)), count + 1

                self._own(i, member)[...], count = stream.loop(0, one.slots, add, (stream.nothing(), count))
            return count

        return stream.loop(0, size, tile, count)

    def _by_spans(self, number: jax.Array, start: Any, size: jax.Array, count: jax.Array) -> jax.Array:
        """The same, a span of x after the other."""
        stream, again = self.stream, (self._turns - 1) * self.stream.places  # spans whose places are filled once more

        def clear(i: jax.Array, _: None) -> None:
            for member in range(len(self.tiles.members)):
                self._own(i, member)[...] = stream.nothing()

        def sweep(spans: range, readers: list[int], span: jax.Array, count: jax.Array) -> jax.Array:
            place = lax.rem(span, stream.places)
            pl.when(start == 0)(lambda: stream.arrive(span, number))  # it is there for all tiles then
            x = stream.part(place, count)
            if again:
                pl.when(span < again)(lambda: stream.leave(place))

            def tile(i: jax.Array, count: jax.Array) -> jax.Array:
                for member in readers:
                    before = load(self._own(i, member), partial_sums(stream.height))
                    self._own(i, member)[...] = stream.add(before, count, x)
                    count = count + 1
                return count

            some = span - spans.start < self._slots(readers)  # in this layer
            return stream.loop(0, jnp.where(some, size, 0), tile, count)

        stream.loop(0, size, clear, None)
        for spans, readers in self.phase.sweeps(self.tiles):
            count = stream.loop(spans.start, spans.stop, partial(sweep, spans, readers), count)
        return count

    def _row(self, i: jax.Array) -> jax.Array:
        """The first row of a tile."""
        return self.stream.row(self.first, i)

    def _rows(self, start: Any, size: jax.Array, i: Any) -> Rows:
        """Those of the i-th four of some tiles, or, if there are none, any that are to be read only."""
        begin, count = self._four(size, i)
        row = jnp.minimum(self._row(start + begin), self.tiles.rows - ROWS)
        return Rows(row, self.stream.apart, count)

    def _four(self, size: jax.Array, i: Any) -> tuple[Any, jax.Array]:
        """The first of the i-th four of so many tiles, and how many they are.

        Less than four are the first ones, as sums of other tiles lie behind theirs: behind the last ones is nothing.
        """
        if self._turns == 1:  # then there are no more
            return 0, size
        begin, end = (jnp.maximum(size - WARPS * (fours(size) - n), 0) for n in (i, i + 1))
        return begin, jnp.minimum(end, size) - begin

    def _slots(self, members: list[int]) -> Any:
        """How many slots a tile takes of each of some that read the same x."""
        return self.tiles.members[members[0]].slots

    def _place(self, i: jax.Array, member: int) -> jax.Array:
        """Where the sums of the i-th tile that is being multiplied are: those of a member lie together."""
        return member * (self.stream.sums.shape[0] // len(self.tiles.members)) + i

    def _own(self, i: jax.Array, member: int) -> Any:
        """Those of each warp of a tile."""
        return self.stream.sums.at[self._place(i, member)]

    def _total(self, begin: Any, member: int) -> jax.Array:
        """Those of all warps of four tiles, a tile to a warp."""
        tiles, layout = pl.ds(self._place(begin, member), WARPS), partial_sums(self.stream.height)
        return reduce(jnp.add, [load(self.stream.sums.at[tiles, warp], layout) for warp in range(WARPS)])


def fours(tiles: jax.Array) -> jax.Array:
    """How many fours they are, one of which may be less than four."""
    return lax.div(tiles + (WARPS - 1), WARPS)
