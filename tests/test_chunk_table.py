"""Attention under a table: every backend against the reference, what it visits, what it needs."""

import dataclasses
import functools
import itertools
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_shape import every_shape
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec, SingleDeviceSharding
from longlive_kernels import absent_gpu, arch
from longlive_kernels.attention.chunk_table import (
    Table,
    api,
    chunk_table,
    cudnn,
    shapes,
    tiles,
    xla,
)

from longlive_jax.config import TINY, WAN21_T2V_1_3B, WAN22_TI2V_5B
from longlive_jax.dit import mask

HERE = ["xla", "reference"]  # what runs without a GPU
BACKENDS = [name for name in HERE if name != "reference"]
LONG = {f"tiny_{count}": count for count in (96, 192, 384)}


@pytest.fixture
def tiled(monkeypatch):
    """Also what is small goes by tiles."""
    monkeypatch.setattr(xla, "at_once", lambda *_: False)


def small(shape: shapes.Shape) -> shapes.Shape:
    """The same table with few, narrow heads and at most 16 tokens to a frame."""
    if shape.table.shape[0] > 100:
        return dataclasses.replace(shape, heads=1, width=8, rows=1, columns=1)
    rows, columns = min(shape.rows, 4), min(shape.columns, 4)
    return dataclasses.replace(
        shape, heads=min(shape.heads, 2), width=min(shape.width, 32), rows=rows, columns=columns
    )


def qkv(shape: shapes.Shape, dtype=jnp.float32):
    kinds = (shape.queries, shape.keys, shape.keys)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, kind, dtype) for key, kind in zip(keys, kinds, strict=True)]


def abstract(shape: shapes.Shape, dtype=jnp.float32):
    kinds = (shape.queries, shape.keys, shape.keys)
    return [jax.ShapeDtypeStruct(kind, dtype) for kind in kinds]


def call(table: Table, implementation: str | None = None):
    return functools.partial(chunk_table, table=table, implementation=implementation)


def gradients(attention):
    """Of a loss that weighs every output differently; the output comes along."""

    def loss(q, k, v):
        out = attention(q, k, v)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out.astype(jnp.float32) * weight).sum(), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)


def results(attention, args):
    """The output, and the gradients of q, k and v."""
    grads, out = jax.jit(gradients(attention))(*args)
    return [out, *grads]


def close(ours, theirs, tolerance: float):
    """The largest difference, of the largest number."""
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-3)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        *shapes.AWKWARD,
        *shapes.INTERLEAVED,
        *every_shape(shapes.TEACHER_FORCING | shapes.CAUSAL),
    ],
)
def test_a_backend_means_what_the_reference_means(name, backend):
    shape = small(shapes.SHAPES[name])
    ours, theirs = (results(call(shape.table, x), qkv(shape)) for x in (backend, "reference"))
    assert ours[0].shape == shape.queries
    for mine, its in zip(ours, theirs, strict=True):
        close(mine, its, 1e-5)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny_12", "image_first", "5b_window", "no_keys"])
def test_in_bfloat16_sums_are_float32(name, backend):
    """bfloat16 has 8 bits: the output is off by its own rounding and that of the weights, 2^-8
    each; gradients by two more roundings.
    """
    shape = small(shapes.SHAPES[name])
    args = qkv(shape, jnp.bfloat16)
    ours = results(call(shape.table, backend), args)
    theirs = results(call(shape.table, "reference"), [x.astype(jnp.float32) for x in args])
    for mine, its, tolerance in zip(ours, theirs, (2**-7, *3 * [2**-6]), strict=True):
        assert mine.dtype == jnp.bfloat16
        close(mine, its, tolerance)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("name", ["tiny_12", "image_first", "fewer_queries", "tiny_12_4_ranks"])
def test_pieces_larger_than_a_tile_are_cut(name, monkeypatch):
    shape = small(shapes.SHAPES[name])
    monkeypatch.setattr(tiles, "SCORES", 20**2 * shape.heads * shape.batch)
    plan = tiles.plan(shape.queries, shape.keys, shape.table)
    assert max(plan.query.size, plan.key.size) <= 20
    assert len(plan.pairs) > len(shape.table.tiles)
    ours, theirs = (results(call(shape.table, x), qkv(shape)) for x in ("xla", "reference"))
    for mine, its in zip(ours, theirs, strict=True):
        close(mine, its, 1e-5)


def test_what_is_small_and_mostly_visible_is_done_at_once():
    """As it was measured: of these alone tiles are slower."""
    names = {name for name, shape in shapes.SHAPES.items() if at_once(shape)}
    few = {"one_frame", "one_token", "checkers", "fewer_queries", "odd_window", "no_keys"}
    assert names == few | {"tiny_12_4_ranks"}
    everything = shapes.SHAPES["1.3b_bidirectional"]  # 13 billion scores, of which all are visible
    assert everything.table.array.all() and not at_once(everything)
    shape = shapes.SHAPES["fewer_queries"]
    ours, theirs = (results(call(shape.table, x), qkv(shape)) for x in ("xla", "reference"))
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, its)


def at_once(shape: shapes.Shape) -> bool:
    return xla.at_once(shape.queries, shape.keys, shape.table)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("implementation", HERE)
def test_rows_without_a_key_are_zero(implementation):
    shape = shapes.SHAPES["no_keys"]
    empty = np.repeat(~shape.table.array.any(1), shape.tokens)
    assert empty.any() and not empty.all()
    found = results(call(shape.table, implementation), qkv(shape))
    assert all(np.isfinite(x).all() for x in found)
    for x in found[:2]:  # the output, and the gradient of q
        assert not x[:, empty].any() and x[:, ~empty].any()
    nothing = call(Table.of(np.zeros((6, 6), bool)), implementation)
    assert not any(x.any() for x in results(nothing, qkv(shape)))


def test_tables_are_those_of_the_library():
    made = {
        "tiny_192": mask.teacher_forcing(mask.clean(192, 3)),
        "5b_64s": mask.teacher_forcing(mask.clean(384, 8)),
        "5b_64s_4_ranks": mask.interleaved(mask.clean(384, 8), 4),
        "tiny_12_4_ranks": mask.interleaved(mask.clean(12, 2), 4),
        "image_first": mask.teacher_forcing(mask.clean(13, 3, first=1)),
    }
    for name, labels in made.items():
        np.testing.assert_array_equal(shapes.SHAPES[name].table.array, mask.table(labels))
    window = mask.table(mask.clean(23, 5, first=2), window=11, sink=3)
    np.testing.assert_array_equal(shapes.SHAPES["odd_window"].table.array, window)
    models = {"TINY": TINY, "WAN_1_3B": WAN21_T2V_1_3B, "WAN_5B": WAN22_TI2V_5B}
    for name, cfg in models.items():
        shape = shapes.Shape(Table.of(((True,),)), **getattr(shapes, name))
        assert (shape.heads, shape.width) == (cfg.dit.heads, cfg.dit.head_dim)
        assert shape.tokens == cfg.tokens_per_frame


def test_a_table_is_a_value():
    rows = ((True, False), (True, True))
    table = Table.of(rows)
    assert table == Table.of(np.array(rows)) == Table.of(table)
    assert len({table, Table.of(rows), Table.of(rows[:1])}) == 2
    np.testing.assert_array_equal(table.array, rows)
    assert table.tiles == (((0, 1), (0, 1)), ((1, 2), (0, 1)), ((1, 2), (1, 2)))
    assert Table.of(np.ones((4, 6), bool)).tiles == (((0, 4), (0, 6)),)
    with pytest.raises(ValueError, match="rows and columns"):
        Table.of(())


def painted(spans, shape: shapes.Shape) -> np.ndarray:
    """How often every pair of tokens is visited."""
    count = np.zeros((shape.queries[1], shape.keys[1]), int)
    for (q, q_end), (k, k_end) in spans:
        count[q:q_end, k:k_end] += 1
    return count


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_exactly_what_is_visible_is_visited_and_once(name):
    shape = small(shapes.SHAPES[name])
    table = np.repeat(np.repeat(shape.table.array, shape.tokens, 0), shape.tokens, 1)
    plan = tiles.plan(shape.queries, shape.keys, shape.table)
    np.testing.assert_array_equal(painted(plan.tiles, shape), table)
    frames = dataclasses.replace(shape, rows=1, columns=1)
    np.testing.assert_array_equal(painted(shape.table.tiles, frames), shape.table.array)


def scans(jaxpr) -> list[int]:
    """The lengths of all scans in a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        for inner in jaxprs_in_params(equation.params):
            found += scans(inner)
    return found


@pytest.mark.parametrize(("name", "frames"), LONG.items())
def test_teacher_forcing_visits_the_tiles_of_the_table_and_no_other(name, frames):
    shape, chunks = shapes.SHAPES[name], frames // 3
    # Each half sees chunks (chunks + 1) / 2: clean its past and itself, noisy its past and itself.
    expected = chunks * (chunks + 1)
    assert len(shape.table.tiles) == expected
    attention, args = call(shape.table, "xla"), abstract(shape)
    assert tiles.plan(shape.queries, shape.keys, shape.table).tiles == [
        tuple((start * shape.tokens, stop * shape.tokens) for start, stop in tile)
        for tile in shape.table.tiles
    ]
    assert scans(jax.make_jaxpr(attention)(*args).jaxpr) == [expected]
    assert scans(jax.make_jaxpr(gradients(attention))(*args).jaxpr) == [expected] * 2


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("name", ["tiny_12", "image_first", "tiny_window", "fewer_queries"])
def test_hidden_keys_are_not_read(name):
    """One after the other, queries of a run are asked for, and all keys they do not see are NaN."""
    shape = small(shapes.SHAPES[name])
    q, k, v = qkv(shape)
    attention = jax.jit(call(shape.table, "xla"))
    whole = attention(q, k, v)
    for start, stop in shape.table.query_runs:
        mine = np.s_[:, start * shape.tokens : stop * shape.tokens]
        hidden = np.repeat(~shape.table.array[start], shape.tokens)
        poison = jnp.where(jnp.asarray(hidden)[None, :, None, None], jnp.nan, jnp.float32(0))
        np.testing.assert_array_equal(attention(q, k + poison, v + poison)[mine], whole[mine])


def test_it_goes_through_every_transformation():
    shape = shapes.SHAPES["image_first"]
    attention, args = call(shape.table, "xla"), qkv(shape)
    split = lambda x: x.reshape(*x.shape[:2], 2, 4, 32)  # noqa: E731
    join = lambda x: x.reshape(*x.shape[:2], 8, 32)  # noqa: E731
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    heads = PartitionSpec(None, None, "heads")

    def mapped(q, k, v):
        return join(jax.vmap(attention, (2, 2, 2), 2)(split(q), split(k), split(v)))

    ways = {
        "plain": attention,
        "jit": jax.jit(attention),
        "checkpoint": jax.checkpoint(attention),
        "vmap": mapped,
        "shard_map": jax.shard_map(attention, mesh=mesh, in_specs=heads, out_specs=heads),
        "shard_map of one batch": jax.shard_map(
            attention, mesh=mesh, in_specs=(PartitionSpec(),) * 3, out_specs=PartitionSpec()
        ),
    }
    found = {way: results(other, args) for way, other in ways.items()}
    np.testing.assert_allclose(attention(*args), found["plain"][0], atol=1e-6)  # op by op
    for way, others in found.items():
        for mine, its in zip(others, found["plain"], strict=True):
            np.testing.assert_allclose(mine, its, atol=2e-5, err_msg=way)


def test_queries_alone_may_be_sharded():
    """Every device has its own queries, all have the same keys; gradients of keys are summed."""
    shape = dataclasses.replace(shapes.SHAPES["tiny_12"], batch=2)
    q, k, v = qkv(shape)
    k, v = k[:1], v[:1]
    attention = call(shape.table, "xla")
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    batch, whole = PartitionSpec("batch"), PartitionSpec()
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(batch, whole, whole), out_specs=batch)

    def plain(q, k, v):
        return attention(q, *(jnp.concatenate([x, x]) for x in (k, v)))

    ours, theirs = (results(x, (q, k, v)) for x in (sharded, plain))
    for mine, its in zip(ours, theirs, strict=True):
        close(mine, its, 1e-5)


def test_runs_repeat_to_the_bit():
    shape = shapes.SHAPES["tiny_48"]
    run, args = jax.jit(gradients(call(shape.table))), qkv(shape)
    for mine, again in zip(*(jax.tree.leaves(run(*args)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(mine, again)


def test_a_backend_is_named_or_chosen():
    shape = shapes.SHAPES["one_frame"]
    args, rows = qkv(shape), ((True,),)
    chosen = chunk_table(*args, rows)
    np.testing.assert_array_equal(chosen, chunk_table(*args, rows, implementation="xla"))
    with pytest.raises(
        NotImplementedError, match=re.escape("no backend 'tpu': there are cudnn, xla")
    ):
        chunk_table(*args, rows, implementation="tpu")
    mixed = (args[0].astype(jnp.bfloat16), *args[1:])
    with pytest.raises(NotImplementedError, match="xla takes q, k and v of one type"):
        chunk_table(*mixed, rows, implementation="xla")
    assert chunk_table(*mixed, rows).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="16 queries do not divide over 3 latent frames"):
        chunk_table(*args, ((True,),) * 3)


def compiled(function, shape: shapes.Shape, dtype=jnp.float32):
    return jax.jit(function).lower(*abstract(shape, dtype)).compile()


@pytest.mark.parametrize("wrap", [lambda f: f, gradients], ids=["forward", "gradient"])
def test_memory_grows_with_length_and_not_with_its_square(wrap):
    names = ["tiny_48", "tiny_96", "tiny_192", "tiny_384"]
    program = lambda name: compiled(wrap(call(shapes.SHAPES[name].table)), shapes.SHAPES[name])  # noqa: E731
    memory = [program(name).memory_analysis().temp_size_in_bytes for name in names]
    for shorter, longer in itertools.pairwise(memory):
        assert longer <= 2.1 * shorter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["5b_64s", "5b_64s_4_ranks", "1.3b_64s", "image_first_5b"])
def test_a_minute_of_training_compiles_in_seconds(name):
    """In bfloat16. What is not an operand: packed operands and results in bfloat16, sums in
    float32, and the scores of a few pairs of tiles.
    """
    shape, begun = shapes.SHAPES[name], time.perf_counter()
    memory = compiled(gradients(call(shape.table)), shape, jnp.bfloat16).memory_analysis()
    assert time.perf_counter() - begun < 60
    operand = 2 * np.prod(shape.queries)
    assert memory.temp_size_in_bytes < 20 * operand + 8 * 4 * tiles.SCORES


@pytest.mark.aot
@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_a_rank_of_a_minute_of_training_compiles_for_a_gpu(gpu):
    """In seconds too: the compiler does not go through all pairs of tiles."""
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
    )
    spec = (pathlib.Path(__file__).parent / "gpu_specs" / f"{gpu}.txtpb").read_text()
    sharding = SingleDeviceSharding(*absent_gpu.devices(gpu, spec))
    shape = shapes.SHAPES["5b_64s_4_ranks"]
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x in abstract(shape, jnp.bfloat16)
    ]
    begun = time.perf_counter()
    program = jax.jit(gradients(call(shape.table))).lower(*args).compile()
    assert time.perf_counter() - begun < 60
    operand = 2 * np.prod(shape.queries)
    assert program.memory_analysis().temp_size_in_bytes < 12 * operand + 8 * 4 * tiles.SCORES


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda f: f, gradients], ids=["forward", "gradient"])
def test_it_is_twice_as_fast_as_a_dense_mask(wrap):
    shape = shapes.SHAPES["tiny_96"]
    args = qkv(shape)
    optimised = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    run = optimised(wrap(call(shape.table)))
    dense = optimised(wrap(call(shape.table, "reference")))

    def seconds(function) -> float:
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        return time.perf_counter() - begun

    for function in (run, dense):  # compiles
        seconds(function)
    ours, theirs = np.array([(seconds(run), seconds(dense)) for _ in range(3)]).min(0)
    assert 2 * ours < theirs


FULL = ["one_frame", "1.3b_bidirectional"]


@pytest.mark.parametrize("name", FULL)
def test_cudnn_means_what_the_reference_means(name):
    """By what the same function of JAX has for every device."""
    shape = small(shapes.SHAPES[name])
    attend = functools.partial(cudnn.attend, table=shape.table, implementation="xla")
    with jax.numpy_dtype_promotion("standard"):  # inside `jax.nn`
        ours = results(attend, qkv(shape))
    for mine, its in zip(ours, results(call(shape.table, "reference"), qkv(shape)), strict=True):
        close(mine, its, 1e-5)


def test_cudnn_is_the_default_on_nvidia_where_every_query_sees_every_key(monkeypatch):
    full, causal = (Table.of(f(np.ones((2, 2), bool))) for f in (np.asarray, np.tril))
    x, wide = (jnp.zeros((1, 4, 1, width), jnp.bfloat16) for width in (64, 264))
    float32 = x.astype(jnp.float32)

    def default(x, table) -> str:
        found = (n for n, b in api.BACKENDS.items() if b.unsupported(x, x, x, table) is None)
        return next(found)

    assert default(x, full) == "xla"  # there is no GPU here
    for sm in (80, 89, 90, 100, 103, 120):
        monkeypatch.setattr(arch, "default", lambda sm=sm: sm)
        assert default(x, full) == "cudnn"
        assert {default(*given) for given in ((x, causal), (wide, full), (float32, full))} == {
            "xla"
        }
    with pytest.raises(NotImplementedError, match="cudnn takes tables in which every query sees"):
        chunk_table(x, x, x, causal, implementation="cudnn")
    mixed = x, x, float32, full
    assert "takes q, k and v of one type" in cudnn.unsupported(*mixed)
    monkeypatch.setattr(arch, "default", lambda: 75)
    assert default(x, full) == "xla"
