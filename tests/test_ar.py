"""Teacher forcing over devices: one device, several, plain or Balanced, in parts or whole: the same
loss and the same gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan
from jax.sharding import NamedSharding, PartitionSpec

from longlive_jax import flow, sharding, weights
from longlive_jax.config import DiTConfig, StreamConfig
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import export
from longlive_jax.dit import mask
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.train import ar, collectives
from longlive_jax.train.ar import ARConfig, Draws, Videos
from longlive_jax.train.order import Order
from longlive_jax.train.state import OptimizerConfig
from longlive_jax.train.step import Program

SMALL = DiTConfig(
    dim=32, ffn_dim=48, heads=8, layers=2, channels=4, text_dim=8, text_len=5, freq_dim=16
)
STREAM = StreamConfig(chunk=2, window=8, sink=2)
CONFIG = ARConfig(STREAM, context_sigma=0.2, context_share=0.7)
ADAM = OptimizerConfig(learning_rate=1e-2, steps=20, warmup=1, b1=0.0, b2=0.999, ema=0.9)
FRAMES = 16


@functools.cache
def dit():
    return streams.randomly(lambda rngs: DiT(SMALL, rngs=rngs))


def videos(parts=1, *, padded=2) -> Videos:
    """Four videos, the end of the first one padding."""
    rng, b = np.random.default_rng(0), 4
    valid = np.ones((b, FRAMES), np.float32)
    valid[0, FRAMES - padded :] = 0
    fields = dict(
        latents=rng.normal(size=(b, FRAMES, 4, 4, 4)).astype(np.float32),
        context=rng.normal(size=(b, 3, 5, 8)).astype(np.float32),
        prompt=rng.integers(0, 3, (b, FRAMES // STREAM.chunk)).astype(np.int32),
        valid=valid,
    )
    split = {k: jnp.asarray(x).reshape(parts, b // parts, *x.shape[1:]) for k, x in fields.items()}
    return Videos(**split)


def program(axes, cfg=CONFIG, **choices) -> Program:
    return Program(dit(), cfg, ADAM, sharding.make_mesh(*axes), **choices)


@functools.cache
def two_steps(axes, cfg=CONFIG, parts=1):
    """Losses and gradient norms of two steps, and the weights after them, on the host."""
    made = program(axes, cfg, recycles=True)
    run, state, told = made.compile(), made.create(weights.flatten(dit())), []
    for seed in range(2):
        state, out = run(state, made.videos(videos(parts)), jax.random.key(seed))
        told += [float(out.loss), float(out.gradient_norm)]
    errors = np.asarray(out.x0_error).reshape(4, FRAMES, -1)
    return told, {name: np.asarray(x) for name, x in state.weights.items()}, errors


MESHES = [
    ((1, 1, 2), True, 1),
    ((1, 1, 8), True, 2),
    ((1, 1, 4), False, 1),
    ((2, 2, 2), True, 1),
    ((1, 1, 1), True, 4),
]


@pytest.mark.parametrize(("axes", "balanced", "parts"), MESHES)
def test_any_mesh_is_one_device(axes, balanced, parts):
    """The second step's loss is that of weights which the first one's gradients have moved."""
    cfg = ARConfig(**(vars(CONFIG) | {"balanced": balanced}))
    told, moved, errors = two_steps(axes, cfg, parts)
    expected, alone, alone_errors = two_steps((1, 1, 1))
    np.testing.assert_allclose(told, expected, rtol=1e-5)
    np.testing.assert_allclose(errors, alone_errors, rtol=0, atol=2e-5)
    for name, x in alone.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(moved[name], x, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_what_attends_is_what_is_named():
    """Which cannot run here."""
    with pytest.raises(NotImplementedError, match="mosaic needs an NVIDIA GPU"):
        two_steps((1, 1, 2), dataclasses.replace(CONFIG, attention="mosaic"))


@functools.partial(streams.jit, static_argnames=("cfg", "mesh"))
def gradients(flat, given, draws, *, cfg, mesh):
    def loss(flat):
        model = weights.unflatten(dit(), flat)
        return _loss(model, given, draws, cfg, mesh)[0]

    return jax.value_and_grad(loss)(flat)


def _loss(model, given, draws, cfg, mesh):
    made = ar.task(given.latents, given.valid, draws, cfg)
    v = ar.velocity(model, made, model.text_kv(given.context), given.prompt, cfg, mesh)
    return ar.loss_sum(v, made, cfg) / jnp.maximum(made.counts.sum(), 1.0), v


@pytest.mark.parametrize(
    ("axes", "balanced"), [((1, 1, 4), True), ((2, 1, 4), False), ((1, 2, 4), True)]
)
def test_every_gradient_is_that_of_one_device(axes, balanced):
    whole = jax.tree.map(lambda x: jnp.asarray(x[0]), videos())
    one = sharding.make_mesh(1, 1, 1)
    keys = ar.video_keys(jax.random.key(3), 1, 4)[0]
    draws = ar.draw(keys, whole.latents.shape, CONFIG, one)
    flat = weights.flatten(dit())
    loss, expected = gradients(flat, whole, draws, cfg=CONFIG, mesh=one)
    mesh = sharding.make_mesh(*axes)
    place = functools.partial(_spread, mesh=mesh)
    cfg = ARConfig(**(vars(CONFIG) | {"balanced": balanced}))
    places = sharding.of_weights(flat, mesh)
    put = {name: jax.device_put(np.asarray(x), places[name]) for name, x in flat.items()}
    given, drawn = jax.tree.map(place, (whole, draws))
    found, ours = gradients(put, given, drawn, cfg=cfg, mesh=mesh)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for name, x in expected.items():
        scale = np.abs(x).max()
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-5 * scale, err_msg=name)


def _spread(x, mesh):
    return jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec(sharding.BATCH)))


@pytest.mark.parametrize("axes", [(1, 1, 8), (2, 2, 2)])
def test_noise_is_drawn_where_it_is_used(axes):
    """Each device makes its own part of what one device would draw, and sends none of it."""
    shape, one, mesh = (4, FRAMES, 4, 4, 4), sharding.make_mesh(1, 1, 1), sharding.make_mesh(*axes)
    keys = ar.video_keys(jax.random.key(0), 1, 4)[0]
    draw = jax.jit(ar.draw, static_argnums=(1, 2, 3)).lower(keys, shape, CONFIG, mesh).compile()
    drawn = draw(keys)
    np.testing.assert_array_equal(drawn.noise, ar.draw(keys, shape, CONFIG, one).noise)
    assert drawn.noise.sharding.shard_shape(shape)[:2] == (
        4 // (axes[0] * axes[1]),
        FRAMES // axes[2],
    )
    sent = collectives.nbytes(draw.as_text())
    assert sum(sent.values()) < 4096  # keys and timesteps, not noise


@pytest.mark.parametrize("ranks", [4])
def test_bytes_of_the_exchange(ranks, monkeypatch):
    """Balanced: q, k and v go there together and the result comes back, in every layer; the same
    once more in what is computed again for the gradient, and once as the gradient itself. No token
    is moved otherwise. Plain SP must also bring latents and velocities into its order and out of
    it. Weights are left whole here, so that nothing of them is in the count but gradients.
    """
    whole = lambda name, shape, mesh: NamedSharding(mesh, PartitionSpec())  # noqa: E731
    monkeypatch.setattr(sharding, "of_weight", whole)
    b, n = 4, 2 * FRAMES * 4
    tokens = b * n // ranks * SMALL.dim * 4  # bytes of one operand on a device
    balanced, plain = (_step_bytes(ranks, balanced=x) for x in (True, False))
    assert balanced["all-to-all"] == 3 * (3 + 1) * tokens * SMALL.layers
    assert set(balanced) == {"all-to-all", "all-reduce"}
    latents = b * FRAMES // ranks * 4 * 4 * 4 * 4
    moved = plain["all-to-all"] + plain["collective-permute"] - balanced["all-to-all"]
    assert moved >= 3 * latents


def _step_bytes(ranks, *, balanced):
    cfg = ARConfig(**(vars(CONFIG) | {"balanced": balanced}))
    made = program((1, 1, ranks), cfg)
    state = made.create(weights.flatten(dit()))
    leaves, tree = jax.tree.flatten((state, made.videos(videos()), jax.random.key(0)))
    # Over leaves: what is lowered has shapes where the types of a dataclass want arrays.
    run = streams.jit(lambda leaves: jax.tree.leaves(made.step(*tree.unflatten(leaves))))
    return collectives.nbytes(run.lower(leaves).compile().as_text())


CASES = ["05_flow_loss_a_tf", "05_flow_loss_b_mask_aug", "05_flow_loss_c_i2v"]


@pytest.mark.parametrize("name", [*CASES, "05_flow_loss_d_error_recycling"])
def test_loss_and_gradients_of_the_reference_on_two_ranks(golden, name):
    """Two heads, six frames in chunks of two: one rank cannot have whole chunks, so a part of the
    sequence order is taken by hand: plain order over two ranks.
    """
    case, model = golden("longlive2", name), wan.longlive2("gen")
    mesh = sharding.make_mesh(1, 1, 2)
    last = lambda x: jnp.asarray(np.moveaxis(x, 2, -1))  # noqa: E731
    each = lambda x: jnp.asarray(np.tile(np.moveaxis(x, 1, -1), (2, 3, 1, 1, 1)))  # noqa: E731
    error = each(case["in/error_entry"]) if "in/error_entry" in case else None
    noise_error = each(case["in/noise_error_entry"]) if error is not None else None
    given = "in/initial_latent" in case
    clean = case["in/clean_latent"].copy()
    if given:
        clean[:, :1] = case["in/initial_latent"]
    draws = Draws(
        last(case["in/draw_00_randn_like"]),
        jnp.asarray(flow.Flow(5.0).timestep(jnp.asarray(_by_chunk(case["in/draw_01_randint"])))),
        jnp.asarray(case.get("out/aug_t_given_to_model", np.zeros((2, 6), np.float32))),
        error,
        noise_error,
        error,
    )
    cfg = ARConfig(StreamConfig(2, 6, 0), image=given, balanced=False)
    context = case["in/prompt_embeds"]
    context = np.pad(context, ((0, 0), (0, model.cfg.text_len - context.shape[1]), (0, 0)))
    context = jnp.asarray(context.reshape(2, -1, *context.shape[1:]))
    prompts = np.arange(3) * (context.shape[1] // 3)
    valid = jnp.asarray(case.get("in/loss_mask", np.ones((2, 6), np.float32)))
    whole = Videos(last(clean), context, jnp.asarray([prompts] * 2, jnp.int32), valid)

    @streams.jit
    def run(flat):
        def loss(flat):
            return _loss(weights.unflatten(model, flat), whole, draws, cfg, mesh)

        return jax.value_and_grad(loss, has_aux=True)(flat)

    (loss, v), gradient = run(weights.flatten(model))
    np.testing.assert_allclose(v, last(case["out/flow_pred"]), atol=1e-4)
    np.testing.assert_allclose(loss, case["out/loss"][0], rtol=1e-5)
    ours = export(weights.unflatten(model, gradient), wan_dit.rows(model.cfg))
    theirs = {k.removeprefix("out/grad/"): g for k, g in case.items() if "/grad/" in k}
    assert len(theirs) == 8
    for parameter, g in theirs.items():
        atol = 1e-4 * np.abs(g).max() + 1e-6
        np.testing.assert_allclose(ours[parameter], g, rtol=0, atol=atol, err_msg=parameter)


def _by_chunk(index):
    """The draw before it is copied over its block."""
    return np.repeat(index[:, ::2], 2, 1)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_order_is_its_labels(parts):
    order, video = Order(parts), mask.clean(8, 2)
    frames = jnp.arange(8)[None]
    joined = order.join(frames, frames + 100)
    labels = order.labels(video)
    expected = [f + 100 * n for f, n in zip(labels.frame, labels.noisy, strict=True)]
    assert joined[0].tolist() == expected
    for half, back in zip((frames, frames + 100), order.split(joined), strict=True):
        np.testing.assert_array_equal(half, back)


@pytest.mark.parametrize(
    ("frames", "heads", "ranks", "said"),
    [
        (20, 8, 4, "20 latent frames do not divide into 4 ranks of whole chunks of 2"),
        (16, 6, 4, "6 heads do not divide over 4 ranks"),
    ],
)
def test_what_cannot_be_spread_is_refused(frames, heads, ranks, said):
    with pytest.raises(InputError, match=said):
        ar.check(CONFIG, frames, heads, ranks)


def test_a_mesh_of_too_many_devices_is_refused():
    with pytest.raises(InputError, match="needs 16 devices, there are 8"):
        sharding.make_mesh(2, 2, 4)
