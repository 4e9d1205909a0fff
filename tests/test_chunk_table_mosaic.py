"""The kernels for GPUs on the CPU: their lists, what they refuse, and in a simulator beside the
reference.
"""

import functools

import jax
import jax.numpy as jnp
import mosaic_on_cpu
import numpy as np
import pytest
from every_shape import every_shape
from jax.sharding import AxisType, PartitionSpec
from longlive_kernels import arch
from longlive_kernels.attention.chunk_table import (
    Table,
    api,
    chunk_table,
    mosaic,
    mosaic_lists,
    shapes,
    unmasked,
)
from longlive_kernels.attention.tile import GROUPS, TILE


def sized(table: Table | np.ndarray, tokens: int, **other) -> shapes.Shape:
    model = dict(heads=1, width=64, rows=1, columns=tokens) | other
    return shapes.Shape(Table.of(table), **model)


# Frames have so many tokens that runs are whole tiles (as those of 5B), one and a third (as those
# of 1.3B have a ragged end), or less than one.
TILED = {
    "whole_tiles": sized(shapes.teacher_forcing(shapes.chunks(4, 2), ranks=2), 64),
    "ragged_tiles": sized(shapes.teacher_forcing(shapes.chunks(6, 3)), 56, width=128),
    "window_of_images": sized(shapes.windowed(shapes.chunks(7, 3, first=1), 4, 1), 56),
    "two_of_all": sized(shapes.causal(shapes.chunks(4, 2))[2:], 72, heads=2, batch=2),
}


def small(shape: shapes.Shape) -> shapes.Shape:
    """The same table over few tokens of one head. The simulator takes seconds for a hundred tiles:
    long tables are left four runs of queries, from the first to the last, and all keys.
    """
    table, width = shape.table, max(shape.width, 64)
    if len(table.tiles) > 100:
        runs = [np.arange(*run) for run in table.query_runs]
        some = np.unique(np.linspace(0, len(runs) - 1, 4).round().astype(int))
        table = Table.of(table.array[np.concatenate([runs[i] for i in some])])
    return sized(table, 8, width=width, batch=min(shape.batch, 2))


SMALL = {name: small(shape) for name, shape in shapes.SHAPES.items()}
SIMULATED = TILED | SMALL
ARCHITECTURES = (90, 100)


def qkv(shape: shapes.Shape, dtype=jnp.bfloat16):
    kinds = (shape.queries, shape.keys, shape.keys)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, kind, dtype) for key, kind in zip(keys, kinds, strict=True)]


def gradients(attention):
    """The output, and gradients of q, k and v of a loss that weighs every output differently."""

    def both(*args):
        out, pull = jax.vjp(attention, *args)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return out, *pull(weight.astype(out.dtype))

    return both


@functools.cache
def program(name: str, sm: int):
    """To compile takes longer than to run."""
    return jax.jit(gradients(functools.partial(mosaic.attend, table=SIMULATED[name].table, sm=sm)))


def simulated(name: str, sm: int, *operands):
    with mosaic_on_cpu.simulated():
        return jax.block_until_ready(program(name, sm)(*operands))


@functools.cache
def ours(name: str, sm: int):
    return simulated(name, sm, *qkv(SIMULATED[name]))


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("name", [*TILED, *every_shape(SMALL)])
def test_it_means_what_the_reference_means(name, sm):
    """bfloat16 has 8 bits: the output is off by its own rounding and that of the weights, 2^-8
    each; gradients by two more roundings.
    """
    shape = SIMULATED[name]
    reference = functools.partial(chunk_table, table=shape.table, implementation="reference")
    theirs = jax.jit(gradients(reference))(*(x.astype(jnp.float32) for x in qkv(shape)))
    for mine, its, tolerance in zip(ours(name, sm), theirs, (2**-7, *3 * [2**-6]), strict=True):
        assert mine.dtype == jnp.bfloat16
        mine, its = np.asarray(mine, np.float32), np.asarray(its)
        assert np.isfinite(mine).all()
        assert np.abs(mine - its).max() <= tolerance * np.abs(its).max()


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_runs_repeat_to_the_bit(sm):
    name = "two_of_all"
    for mine, again in zip(ours(name, sm), ours.__wrapped__(name, sm), strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(again, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_rows_without_a_key_are_zero(sm):
    shape = SIMULATED["no_keys"]
    empty = np.repeat(~shape.table.array.any(1), shape.tokens)
    assert empty.any() and not empty.all()
    for x in ours("no_keys", sm)[:2]:  # the output, and the gradient of q
        assert not x[:, empty].any() and x[:, ~empty].any()


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_a_prompt_is_attended(sm):
    """Everything sees everything, and there are fewer keys: neither divides into tiles."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, n, 2, 64), jnp.bfloat16)
        for key, n in zip(keys, (264, 72, 72), strict=True)
    )
    everything = Table.of(np.ones((1, 1), bool))
    with mosaic_on_cpu.simulated():
        mine = jax.jit(functools.partial(mosaic.attend, table=everything, sm=sm))(q, k, v)
    theirs = np.asarray(unmasked(*(x.astype(jnp.float32) for x in (q, k, v))))
    assert np.abs(np.asarray(mine, np.float32) - theirs).max() <= 2**-7 * np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_hidden_tiles_are_not_read(sm):
    """The first noisy frames see themselves alone. All other keys are NaN."""
    shape = SIMULATED["whole_tiles"]
    table = shape.table.array
    noisy = np.flatnonzero(table.sum(1) == 2)[2:4]
    seen = np.repeat(table[noisy[0]], shape.tokens)
    rows = np.repeat(np.isin(np.arange(len(table)), noisy), shape.tokens)
    assert (seen == rows).all() and seen.sum() == TILE
    q, k, v = qkv(shape)
    poison = jnp.asarray(np.where(seen, 0, np.nan)[None, :, None, None], jnp.bfloat16)
    found = simulated("whole_tiles", sm, q, k + poison, v + poison)
    # The output, and the gradient of q.
    for mine, whole in zip(found[:2], ours("whole_tiles", sm)[:2], strict=True):
        mine, whole = (np.asarray(x, np.float32) for x in (mine, whole))
        np.testing.assert_array_equal(mine[:, rows], whole[:, rows])
        assert np.isnan(mine[:, ~rows]).any()


def test_blackwell_shares_stages_out():
    """And has the lists of keys that Hopper has."""
    assert mosaic.GRADIENT.stages % GROUPS == 0
    assert mosaic.GRADIENT.tile == mosaic.KEYS.tile


LISTED = TILED | {
    "no_keys": sized(shapes.SHAPES["no_keys"].table, 24),
    "ranks_share_a_chunk": sized(shapes.teacher_forcing(shapes.chunks(8, 4), ranks=4), 16),
    "checkers": sized(np.indices((3, 5)).sum(0) % 2 == 1, 136),
    "all_hidden": sized(np.zeros((2, 3), bool), 72),
}
BOTH = {
    "queries": (mosaic_lists.over_keys, (TILE, mosaic.QUERIES.tile)),
    "keys": (mosaic_lists.over_queries, (mosaic.KEYS.tile, TILE)),
    "queries of Blackwell's gradient": (mosaic_lists.over_keys, (TILE, mosaic.GRADIENT.tile)),
}
ALL = BOTH | {"queries of Blackwell": (mosaic_lists.over_keys, (2 * TILE, mosaic.BLACKWELL.tile))}
LONG = {
    f"{frames} {'in one order' if ranks == 1 else f'on {ranks} ranks'}": (frames, ranks)
    for frames in (96, 192, 384)
    for ranks in (1, 4)
}


def lists_of(shape: shapes.Shape, kind: str) -> tuple[mosaic_lists.Lists, np.ndarray]:
    """And the table, its rows those of the tiles that have lists."""
    make, sizes = ALL[kind]
    table = shape.table.array.T if kind == "keys" else shape.table.array
    return make(shape.table, (shape.tokens,) * 2, *sizes), table


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", LISTED)
def test_every_visible_pair_of_tokens_is_visited_once(name, kind):
    shape = LISTED[name]
    lists, table = lists_of(shape, kind)
    count = np.zeros([frames * shape.tokens for frames in table.shape], int)
    for tile, (start, size, _, _, whole, total) in enumerate(lists.outer):
        visited = lists.visited(tile)
        assert len(visited) == total
        sizes = lists.inner[visited, 2]
        assert (sizes[:whole] == lists.inner[:, 2].max()).all()
        for first, _, filled in lists.inner[visited]:
            count[start : start + size, first : first + filled] += 1
    np.testing.assert_array_equal(
        count, np.repeat(np.repeat(table, shape.tokens, 0), shape.tokens, 1)
    )


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", LONG)
def test_teacher_forcing_visits_the_tiles_of_the_table_and_no_other(name, kind):
    frames, ranks = LONG[name]
    rows = shapes.teacher_forcing(shapes.chunks(frames, 8), ranks=ranks)
    shape = sized(rows, shapes.SHAPES["5b_16s"].tokens)
    lists, table = lists_of(shape, kind)
    assert lists.ragged == (False, False)
    _, sizes = BOTH[kind]
    # Tiles lie within chunks, which they divide.
    per_chunk = [8 * shape.tokens // size for size in sizes]
    expected = len(shape.table.tiles) * per_chunk[0] * per_chunk[1]
    assert expected == shape.table.array.sum() * shape.tokens**2 // (sizes[0] * sizes[1])
    assert lists.outer[:, 5].sum() == expected
    # Every tile of one side has a list, no list has a tile twice, all of them are visible.
    size = sizes[1] if kind == "keys" else sizes[0]
    np.testing.assert_array_equal(
        np.sort(lists.outer[:, 0]), np.arange(0, 2 * frames * shape.tokens, size)
    )
    for tile in np.unique(lists.outer[:, 3], return_index=True)[1].tolist():
        visited = lists.visited(tile)
        assert len(np.unique(visited)) == len(visited)
        sharing = lists.outer[lists.outer[:, 3] == lists.outer[tile, 3], 0] // shape.tokens
        assert table[np.ix_(sharing, lists.inner[visited, 0] // shape.tokens)].all()
    # Long lists first: the last blocks that run are short ones.
    assert (np.diff(lists.outer[:, 5]) <= 0).all()
    assert len(lists.entries) < 300_000


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("frames", [96, 192])
def test_chunks_of_4680_tokens_end_in_a_tile_of_their_own(frames, kind):
    rows = shapes.teacher_forcing(shapes.chunks(frames, 3))
    shape = sized(rows, shapes.SHAPES["1.3b_16s"].tokens)
    lists, _ = lists_of(shape, kind)
    assert lists.ragged == (True, True)
    tiles = [-(-3 * shape.tokens // size) for size in BOTH[kind][1]]
    assert tiles == [37 if size == TILE else 74 for size in BOTH[kind][1]]
    assert lists.outer[:, 5].sum() == len(shape.table.tiles) * tiles[0] * tiles[1]


@pytest.mark.parametrize("name", LONG)
def test_blackwell_visits_what_its_blocks_see_and_no_more(name):
    """Of 256 queries, which do not divide a chunk: every tile of keys that one of them sees."""
    frames, ranks = LONG[name]
    rows = shapes.teacher_forcing(shapes.chunks(frames, 8), ranks=ranks)
    shape = sized(rows, shapes.SHAPES["5b_16s"].tokens)
    lists, table = lists_of(shape, "queries of Blackwell")
    begins, filled = lists.inner[:, 0], lists.inner[:, 2]
    first, last = begins // shape.tokens, (begins + filled - 1) // shape.tokens
    seen_by = {}
    for tile, (start, size, *_, total) in enumerate(lists.outer.tolist()):
        begin, end = start // shape.tokens, (start + size - 1) // shape.tokens
        if (begin, end) not in seen_by:
            upto = np.append(0, table[begin : end + 1].any(0).cumsum())
            seen_by[begin, end] = np.flatnonzero(upto[last + 1] > upto[first])
        visited = np.sort(lists.visited(tile))
        assert len(visited) == total
        np.testing.assert_array_equal(visited, seen_by[begin, end])
    starts, sizes = lists.outer[:, 0], lists.outer[:, 1]
    order = np.argsort(starts)
    np.testing.assert_array_equal(starts[order][1:], (starts + sizes)[order][:-1])
    assert sizes.sum() == 2 * frames * shape.tokens


def test_places_are_those_of_the_tiles():
    """Where a run is no multiple of them, places are left empty."""
    for name in ("ragged_tiles", "whole_tiles"):
        shape = SIMULATED[name]
        places = mosaic_lists.places(shape.table, shape.tokens)
        n = shape.queries[1]
        np.testing.assert_array_equal(np.sort(places[places < n]), np.arange(n))
        for kind in ALL:
            lists, _ = lists_of(shape, kind)
            tiles = lists.inner if kind == "keys" else lists.outer[:, [0, 2, 1]]
            assert kind == "keys" or lists.places == len(places)
            for start, place, count in tiles:
                expected = np.arange(start, start + count)
                np.testing.assert_array_equal(places[place : place + count], expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "sm", "reason"),
    [
        ((1, 16, 1, 128), jnp.bfloat16, 90, None),
        ((1, 16, 1, 64), jnp.bfloat16, 90, None),
        ((1, 16, 1, 128), jnp.bfloat16, None, "needs an NVIDIA GPU"),
        ((1, 16, 1, 128), jnp.bfloat16, 100, None),
        ((1, 16, 1, 128), jnp.bfloat16, 120, "is for sm_90, sm_100, sm_103, not sm_120"),
        ((1, 16, 1, 128), jnp.float32, 90, "in bfloat16, not float32"),
        ((1, 16, 1, 32), jnp.bfloat16, 90, "needs heads 64 or 128 wide, not 32"),
        ((1, 30, 1, 128), jnp.bfloat16, 90, "of a multiple of 8 tokens, not 15"),
    ],
)
def test_it_says_what_it_lacks(shape, dtype, sm, reason):
    x = jnp.zeros(shape, dtype)
    found = mosaic.unsupported(x, x, x, Table.of(np.ones((2, 2), bool)), sm=sm)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("sm", [None, 90, 100])
def test_it_is_opt_in(monkeypatch, sm):
    """By default cuDNN attends on NVIDIA GPUs where all keys are seen, and XLA all else."""
    monkeypatch.setattr(arch, "default", lambda: sm)
    x, table = jnp.zeros((1, 16, 1, 128), jnp.bfloat16), Table.of(np.ones((2, 2), bool))
    default = api.BACKENDS["xla" if sm is None else "cudnn"]
    assert api._backend(None, x, x, x, table) is default
    assert api._backend(None, x, x, x, Table.of(np.tri(2, dtype=bool))) is api.BACKENDS["xla"]
    if sm is None:
        with pytest.raises(NotImplementedError, match="mosaic needs an NVIDIA GPU"):
            chunk_table(x, x, x, table, implementation="mosaic")
    else:
        assert api._backend("mosaic", x, x, x, table) is mosaic


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_it_goes_through_every_transformation(monkeypatch, sm):
    """As far as types: what is made of it runs on a GPU alone."""
    monkeypatch.setattr(arch, "default", lambda: sm)
    shape = SIMULATED["two_of_all"]
    attention = functools.partial(chunk_table, table=shape.table, implementation="mosaic")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    heads, batch, whole = PartitionSpec(None, None, "x"), PartitionSpec("x"), PartitionSpec()
    args = jax.eval_shape(lambda: qkv(shape))
    shared = [args[0], *(x.update(shape=(1, *x.shape[1:])) for x in args[1:])]
    shard = functools.partial(jax.shard_map, mesh=mesh)
    ways = {
        "plain": (attention, args),
        "checkpoint": (jax.checkpoint(attention), args),
        "vmap": (lambda *x: jax.vmap(attention)(*(y[None] for y in x))[0], args),
        "shard_map": (shard(attention, in_specs=heads, out_specs=heads), args),
        "shared keys": (
            shard(attention, in_specs=(batch, whole, whole), out_specs=batch),
            shared,
        ),
    }
    for function, operands in ways.values():
        made = jax.eval_shape(gradients(function), *operands)
        expected = [operands[0], *operands]
        assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in expected]
