"""What blocks wait for is sent: were it not, a GPU would hang, and Pallas' interpreter does not wait."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsvd.config import ModelConfig
from jaxsvd.kernels.gpu import GPU, layer_shapes
from jaxsvd.kernels.gpu.shape import ROWS, SIZES, SPAN, WARPS, WIDEST, aligned, used
from jaxsvd.models import build
from jaxsvd.weights import AbstractWeights

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 192,
    "intermediate_size": 4160,  # of several rows more than is held
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
# The ranks of matrices in a layer, by their names; others are dense.
RANKS = {
    "dense": lambda layer, name: None,
    "low-rank": lambda layer, name: 64,
    "other-ranks": lambda layer, name: 48 + 16 * layer,
    "other-matrices": lambda layer, name: None if (len(name) + layer) % 3 == 0 else 32,
    "one-dense-layer": lambda layer, name: None if layer == 1 else 32,
}


class Buffer:
    """Vectors in global memory: which elements of a row are there."""

    def __init__(self):
        self.there = set()

    def send(self, start, size):
        self.there |= set(range(int(start), int(start) + size))

    def expect(self, start, size):
        assert set(range(int(start), int(start) + int(size))) <= self.there


class Squares:
    """Of a row's tiles."""

    def __init__(self):
        self.there = set()

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return SimpleNamespace(send=lambda: self.there.add(int(index[1])), ref=None)


class Anything:
    """Another buffer, or any of it."""

    @property
    def at(self):
        return self

    def __getitem__(self, _):
        return self

    def expect(self):
        pass


class Region:
    """Some elements of a buffer."""

    def __init__(self, buffer, start, size):
        self.buffer, self.start, self.size = buffer, start, size

    def send(self):
        if isinstance(self.buffer, Buffer):
            self.buffer.send(self.start, self.size)

    def expect(self):
        if isinstance(self.buffer, Buffer):
            self.buffer.expect(self.start, self.size)


def shapes_of(ranks, **changes):
    """The shapes of the layers of a model whose matrices have these ranks."""

    def rank(path, inputs, outputs):
        _, _, layer, _, name = path.split(".")
        return RANKS[ranks](int(layer), name)

    config = ModelConfig.from_hf(CONFIG | changes)
    return aligned(layer_shapes(*build(config, AbstractWeights(jnp.bfloat16, rank), GPU())._form))


@pytest.mark.parametrize("batch", SIZES[1:])
@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("wide", ["intermediate_size", "hidden_size"])
@pytest.mark.parametrize("ranks", RANKS)
def test_all_sums_have_room_where_x_is_held_in_turns(ranks, wide, blocks, batch):
    from jaxsvd.kernels.gpu.products import Buffers, Products

    turns = 0
    for number, shape in enumerate(shapes_of(ranks, **{wide: WIDEST[8] + 4160})):
        weights = [[None] * count for count in shape.matrices]
        layer = Products(shape, number, 3, weights, (None, None), Buffers(*[None] * 3), None, batch)
        _, width = shape.held(batch)
        for phase in layer.phases:
            all_at_once = SPAN * len(phase.spans) > width
            turns += all_at_once
            for tiles in phase.tiles:
                most = -(-tiles.count // blocks) if all_at_once else 1
                assert max(most, WARPS) <= shape.swept(batch, blocks) // len(tiles.members)
    assert turns >= 3


@pytest.mark.parametrize("size", range(14))
def test_fours_of_tiles_are_all_of_them_and_read_no_others(size):
    """But where there are less than four, which have room nevertheless."""
    from jaxsvd.kernels.gpu.sweep import Sweep, fours

    sweep = Sweep(SimpleNamespace(turns=lambda phase: 2), None, None, None, None)
    number, found = int(fours(jnp.int32(size))), []
    for i in range(number):
        begin, count = map(int, sweep._four(jnp.int32(size), jnp.int32(i)))
        assert begin >= 0 and 1 <= count <= WARPS and begin + WARPS <= max(size, WARPS)
        found += range(begin, begin + count)
    assert found == list(range(size))
    assert int(sweep._four(jnp.int32(size), jnp.int32(number))[1]) == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("cores", [78, 114, 132])
def test_a_pair_of_blocks_has_the_two_parts_of_a_head(cores, kv_heads):
    """Of each layer the first hears of the second once, as it waits for it, and of the same head."""
    from jaxsvd.kernels.gpu.attention import Attention

    shape = shapes_of("dense", num_attention_heads=kv_heads, num_key_value_heads=kv_heads)[0]
    cache = SimpleNamespace(refs=[np.zeros((0, 512, 128))])
    handed = [batch for batch in range(1, 17) if shape.handed(batch, used(cores, batch))]
    for batch in handed:
        blocks, nothing = used(cores, batch), [None] * 5
        for block in range(blocks):
            given = np.full(batch, 300), [], [], [cache]
            attention = Attention(shape, 0, block, blocks, batch, *given, *nothing, [])
            mine = int(attention.mine(attention.kv_heads * attention.splits))
            assert mine == (block < 2 * attention.kv_heads)
            if mine:
                assert tuple(map(int, attention.part(block)))[:2] == (block // 2, block % 2)
    assert bool(handed) == (kv_heads in {132: (4, 8, 32), 114: (4, 8), 78: ()}[cores])


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_read_was_sent(ranks, batch, monkeypatch):
    from jaxsvd.kernels.gpu import products
    from jaxsvd.kernels.gpu.products import Buffers, Products
    from jaxsvd.kernels.gpu.regions import Rows
    from jaxsvd.kernels.gpu.stream import squares as parts

    results = jnp.zeros((WARPS, batch, ROWS) if batch > 1 else (WARPS, ROWS))
    iota = SimpleNamespace(
        broadcasted_iota=lambda dtype, shape, axis, layout: lax.broadcasted_iota(dtype, shape, axis),
        layout_cast=lambda array, _: jnp.broadcast_to(array, results.shape),
    )
    monkeypatch.setattr(products, "plgpu", iota)
    monkeypatch.setattr(products, "columns", Region)

    def peek(regions, layout):
        for region in regions:
            for i in range(int(region.count)):
                region.view(i).expect()
        return [results if isinstance(region.ref, Region) else results.reshape(-1, ROWS)[:WARPS] for region in regions]

    def send(region, values, layout):
        for i in range(int(region.count)):
            region.view(i).send()

    stream = SimpleNamespace(peek=peek, send=send, settle=lambda regions, found, layout: found)
    shapes = shapes_of(ranks)
    anything = Anything()
    vectors, squares = Buffer(), Squares()
    for number, shape in enumerate(shapes):
        if len(set(shapes)) > 1:
            shape = shape.of([jnp.int32(rank) for rank in shape.ranks])  # as the kernel has them
        weights = [[None] * count for count in shape.matrices]
        buffers = Buffers(anything, vectors, squares)
        arguments = weights, (anything, anything), buffers, stream, batch
        room = Products(shape, 0, len(shapes), *arguments).size
        layer = Products(shape, number, len(shapes), *arguments, room)
        if number == 0:
            vectors.send(layer.normed[0], shape.qkv.inputs)
            squares.there = set(range(shape.qkv.inputs // ROWS))
        for i, phase in enumerate(layer.phases):
            if i == len(layer.before):
                for start, size in zip(layer.heads, shape.qkv.outputs, strict=True):
                    vectors.expect(start, size)
                vectors.send(layer.mixed, shape.o.inputs)
            for x in phase.x:
                vectors.expect(x.start, x.width)
            if phase.norm:
                assert set(range(phase.norm.start, phase.norm.start + phase.norm.width // ROWS)) <= squares.there
            for tiles in phase.tiles:
                for row in range(0, int(tiles.rows), WARPS * ROWS):
                    rows = Rows(row, ROWS, min(WARPS, (int(tiles.rows) - row) // ROWS))
                    tiles.store(rows, [results] * len(tiles.members), tiles.early(rows))
        # All that this layer has sent for itself is taken away; the next one finds what it begins with.
        begins = layer.normed[0] % room + (number + 1) % 2 * room
        vectors.there &= set(range(begins, begins + shape.qkv.inputs))
        begins = (number + 1) % 2 * 2 * parts(shape.qkv.inputs)
        squares.there &= set(range(begins, begins + parts(shape.qkv.inputs)))
