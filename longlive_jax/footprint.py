"""What generation keeps in a device's memory, from the shapes of the real modules and caches.

Nothing is allocated and no number of a model is written down here: parameters and state come from
`jax.eval_shape`, activations from the programs that `session.Session` runs, traced. Everything
is counted in bfloat16, the type in which a model is loaded on an accelerator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jax.sharding import SingleDeviceSharding
from longlive_kernels import absent_gpu

from longlive_jax import rollout, sampler
from longlive_jax.config import ModelConfig
from longlive_jax.dit import cache as slots
from longlive_jax.dit.model import DiT
from longlive_jax.gpus import ARCHITECTURES, GPU
from longlive_jax.quant import transformer
from longlive_jax.text.umt5 import UMT5, encode
from longlive_jax.vae.build import build
from longlive_jax.vae.vae import VAECarry, init_carry

# Matmuls, convolutions, and cuDNN's attention as JAX traces it.
CONTRACTIONS = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper")
IN_PLACE = ("scatter", "dynamic_update_slice")
PROGRAMS = ("text", "denoise", "decode", "switch")
PLUGIN = "jax_plugins.xla_cuda13"
SCALES = ("scales", "amax")  # of what is kept in fewer bits: float32


def described(tree: Any) -> Any:
    """The arrays of `tree` by shape and type, in bfloat16 where they are real; scales stay."""

    def leaf(path, x):
        scale = jax.tree_util.keystr(path[-1:], simple=True) in SCALES
        real = x.dtype == jnp.float32 and not scale
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if real else x.dtype)

    return jax.tree.map_with_path(leaf, tree)


def placed(tree: Any, sharding: Any) -> Any:
    """The same shapes and types, with a place."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@functools.cache
def dit(cfg: ModelConfig) -> DiT:
    """The transformer, by shape, its matrices in as many bits as the config says."""
    plain = described(nnx.eval_shape(lambda: DiT(cfg.dit, rngs=nnx.Rngs(0))))
    if cfg.precision is None:
        return plain
    return jax.eval_shape(functools.partial(transformer.quantize, how=cfg.precision), plain)


@functools.cache
def text_encoder(cfg: ModelConfig) -> UMT5:
    """The text encoder, by shape."""
    return described(nnx.eval_shape(lambda: UMT5(cfg.text, rngs=nnx.Rngs(0))))


@functools.cache
def vae(cfg: ModelConfig) -> Any:
    """The VAE, by shape: encoder and decoder, as `load` places them."""
    return described(nnx.eval_shape(lambda: build(cfg.vae, rngs=nnx.Rngs(0))))


@functools.cache
def kv_cache(cfg: ModelConfig) -> tuple[Any, Any]:
    """Keys and values of one video; their unconditional rows are there only under guidance."""

    def pair():
        tokens, rows = cfg.tokens_per_frame, cfg.sampler.branches
        cache = slots.empty(cfg.dit, cfg.stream, rows, tokens, jnp.bfloat16)
        return cache.k, cache.v

    return jax.eval_shape(pair)


def flat(make: Callable[..., Any], *arguments: Any) -> tuple[list, Any]:
    """Leaves by shape of what `make` returns, and its structure. A state that held shapes would
    not be one: its types are arrays.
    """
    kept = []

    def leaves(*arguments):
        paths, structure = jax.tree.flatten_with_path(make(*arguments))
        kept.append((structure, [path for path, _ in paths]))
        return [x for _, x in paths]

    found = jax.eval_shape(leaves, *arguments)
    structure, paths = kept[-1]
    names = [jax.tree_util.keystr(path[-1:], simple=True) for path in paths]
    return [described({name: x})[name] for name, x in zip(names, found, strict=True)], structure


@functools.cache
def begun(cfg: ModelConfig) -> tuple[list, Any]:
    """The memory of one video and the VAE's carry, flat."""
    return flat(lambda vae: _state(cfg, vae), vae(cfg))


def _state(cfg: ModelConfig, vae: Any) -> tuple[rollout.Rollout, VAECarry]:
    return rollout.begin(cfg, [0], jnp.bfloat16), init_carry(vae, 1, cfg.height, cfg.width)


@functools.cache
def kept(cfg: ModelConfig) -> dict[str, int]:
    """Bytes of what a session holds beside its cache."""

    def parts(vae):
        memory, carry = _state(cfg, vae)
        return {"held": memory.held.latents, "carry": jax.tree.leaves(carry)}

    return {name: nbytes(part) for name, part in jax.eval_shape(parts, vae(cfg)).items()}


@functools.cache
def text_kv(cfg: ModelConfig) -> tuple[list, Any]:
    """Keys and values of one prompt in every layer, for each row of the cache, flat."""
    shape = (cfg.sampler.branches, 1, cfg.dit.text_len, cfg.dit.text_dim)
    text = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return flat(lambda dit, text: dit.text_kv(text), dit(cfg), text)


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of `tree`, keys of random numbers left out."""
    numbers = (x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.extended))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in numbers)


def programs(cfg: ModelConfig, sharding: Any = None) -> dict[str, tuple[Any, tuple]]:
    """Every program that runs while a video is made: the function, and its arguments by shape.
    "switch" is the recache of a change of prompt.
    """
    (state, state_of), (text, text_of) = begun(cfg), text_kv(cfg)
    whole, prompt = state_of.unflatten, text_of.unflatten
    noise = jax.eval_shape(lambda s: rollout.noise(whole(s)[0], cfg.stream.chunk), state)
    rows = (cfg.sampler.branches, cfg.dit.text_len)
    ids, mask = (jax.ShapeDtypeStruct(rows, kind) for kind in (jnp.int32, jnp.bool_))
    which = jax.ShapeDtypeStruct((1,), jnp.bool_)
    static = {
        "stream": cfg.stream,
        "solver": sampler.make(cfg.sampler),
        "guidance": cfg.sampler.guidance,
    }

    def denoise(state, dit, text, noise):
        memory, carry = whole(state)
        return jax.tree.leaves(
            (rollout.generate(dit, memory, prompt(text), noise, **static), carry)
        )

    def decode(state, vae, latents):
        memory, carry = whole(state)
        return jax.tree.leaves((memory, rollout.decode(vae, carry, latents, first=False)))

    def switch(state, dit, text, rows):
        memory, carry = whole(state)
        how = dict(stream=cfg.stream, how=cfg.stream.recache)
        return jax.tree.leaves((rollout.recache(dit, memory, prompt(text), rows, **how), carry))

    found = {
        "text": (jax.jit(encode), (text_encoder(cfg), ids, mask)),
        "denoise": (jax.jit(denoise, donate_argnums=0), (state, dit(cfg), text, noise)),
        "decode": (jax.jit(decode, donate_argnums=0), (state, vae(cfg), noise)),
        "switch": (jax.jit(switch, donate_argnums=0), (state, dit(cfg), text, which)),
    }
    return {name: (run, placed(given, sharding)) for name, (run, given) in found.items()}


def by_formula(
    cfg: ModelConfig, gpu: GPU | None, names: tuple[str, ...] = PROGRAMS
) -> dict[str, int]:
    """Estimates the activations of programs on a GPU without a compiler for it.

    The estimate is the largest, over the contractions of a program (matmuls, convolutions, cuDNN's
    attention) in its order, of

        result of the one before + operands + result + what loops around it carry,

    where the one before is left out if an operand is that result, changed element by element and
    of no further use, and an operand that is pieces side by side keeps a piece beside it. XLA fuses
    what lies between two contractions, so these are what it must write down. In the transformer
    that is: what goes around a block, and its widest layer or its attention; in a VAE: what goes
    around a residual block, the frames that are remembered, their time taps side by side, what the
    convolution makes of them.

    Args:
      cfg: Of the model.
      gpu: For which the programs choose their kernels; None: the default device.
      names: Of the programs.

    Returns:
      Bytes by program.
    """
    with contextlib.nullcontext() if gpu is None else absent_gpu.target(_kind(gpu)):
        found = programs(cfg)
        traced = {name: found[name][0].trace(*found[name][1]) for name in names}
    return {name: _largest(program.jaxpr.jaxpr) for name, program in traced.items()}


def _kind(gpu: GPU) -> absent_gpu.Kind:
    architecture = ARCHITECTURES[gpu.architecture]
    return absent_gpu.Kind(f"{architecture.major}.{architecture.minor}")


def _largest(jaxpr: Any) -> int:
    before, largest = Contraction(0, 0), 0
    for found in _contractions(jaxpr, set(jaxpr.invars)):
        kept = 0 if found.continued >= before.result else before.result
        largest = max(largest, kept + found.operands + found.result)
        before = found
    return largest


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Bytes of what a contraction reads and writes.

    Attributes:
      operands: That it reads, with what loops around it carry.
      result: That it writes.
      continued: Of the operand that is the result of the contraction before, changed element by
        element, where nothing later needs that result. What is no smaller takes its place.
    """

    operands: int
    result: int
    continued: int = 0


def _size(variable: Any) -> int:
    return nbytes([variable.aval])


def _contractions(jaxpr: Any, arguments: set, changed: set | None = None) -> Iterator[Contraction]:
    """The contractions of a program, those of inner programs in their place.

    In a loop, what it carries from turn to turn counts as operands, unless it is an argument of the
    whole, which is updated in place.

    Args:
      jaxpr: The program.
      arguments: The variables that are arguments of the whole.
      changed: Filled with the variables that are the last contraction's result, changed element by
        element.
    """
    pieces = {}  # the largest part of what was put together, by variable
    changed = set() if changed is None else changed
    used = _last_uses(jaxpr)
    for number, equation in enumerate(jaxpr.eqns):
        kind, given, made = equation.primitive.name, equation.invars, equation.outvars
        inner = list(_inner(tuple(equation.params.values())))
        if kind == "concatenate":
            pieces[made[0]] = max(map(_size, given))
        elif kind == "reshape" and isinstance(given[0], Var):
            pieces[made[0]] = pieces.get(given[0], 0)
        if kind in CONTRACTIONS:
            kept = (pieces.get(operand, 0) for operand in given if isinstance(operand, Var))
            operands = sum(map(_size, given)) + sum(kept)
            needed_later = any(used.get(x, 0) > number for x in changed)
            continued = [0 if needed_later else _size(x) for x in given if _is_in(x, changed)]
            yield Contraction(operands, sum(map(_size, made)), max(continued, default=0))
            changed.clear()
            changed.update(made)
        elif kind in IN_PLACE and _is_in(given[0], arguments):
            arguments.add(made[0])
        elif inner:
            for program in inner:
                yield from _within(equation, program, arguments, changed)
        else:
            numbers = {math.prod(x.aval.shape) for x in given if _is_in(x, changed)}
            changed.update(x for x in made if math.prod(x.aval.shape) in numbers)


def _last_uses(jaxpr: Any) -> dict[Var, int]:
    """The number of the last equation that reads each variable; one past the last for results."""
    found: dict[Var, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        found |= {x: number for x in equation.invars if isinstance(x, Var)}
    return found | {x: len(jaxpr.eqns) for x in jaxpr.outvars if isinstance(x, Var)}


def _within(equation: Any, inner: Any, arguments: set, changed: set) -> Iterator[Contraction]:
    """The contractions of one inner program of an equation; see `_contractions`."""
    known, carried = _entered(equation, inner, arguments)
    given = equation.invars[len(equation.invars) - len(inner.invars) :]
    pairs = zip(given, inner.invars, strict=False)
    own_changed = {own for outer, own in pairs if _is_in(outer, changed)}
    found = False
    for contraction in _contractions(inner, known, own_changed):
        found = True
        operands = contraction.operands + carried
        yield dataclasses.replace(contraction, operands=operands)
    if found:
        changed.clear()
    results = list(zip(inner.outvars, equation.outvars, strict=False))
    arguments |= {outer for own, outer in results if _is_in(own, known)}
    changed |= {outer for own, outer in results if _is_in(own, own_changed)}


def _is_in(variable: Any, arguments: set) -> bool:
    return isinstance(variable, Var) and variable in arguments


def _entered(equation: Any, inner: Any, arguments: set) -> tuple[set, int]:
    """The variables of an inner program that are arguments of the whole, and the bytes of the
    others that a loop carries.
    """
    given = equation.invars[len(equation.invars) - len(inner.invars) :]
    pairs = zip(given, inner.invars, strict=False)
    known = {own for outer, own in pairs if _is_in(outer, arguments)}
    if equation.primitive.name != "scan":
        return known, 0
    carry = _carried(equation, inner)
    return known, sum(_size(own) for own in carry if own not in known)


def _carried(scan: Any, body: Any) -> list:
    """What the body of a scan takes from the turn before: it stands between constants and slices,
    and first of what the body makes.

    Told by their axes: slices have one less than what they are slices of. (Parameters of the
    equation that count them have changed from one release of JAX to the next.)
    """

    def whole(inner: Any, outer: Any) -> bool:
        return inner.aval.ndim == outer.aval.ndim

    carry = sum(map(whole, body.outvars, scan.outvars))
    constants = sum(map(whole, body.invars, scan.invars)) - carry
    return body.invars[constants : constants + carry]


def _inner(parameter: Any) -> Iterator[Any]:
    """The programs in a parameter of an equation: bodies of loops, branches, calls."""
    if isinstance(parameter, tuple | list):
        for part in parameter:
            yield from _inner(part)
    elif hasattr(parameter, "jaxpr"):
        yield parameter.jaxpr
    elif hasattr(parameter, "eqns"):
        yield parameter


def toolchain() -> bool:
    """Whether the compiler for GPUs is installed (the `[aot]` or the `[cuda]` extra)."""
    try:
        return importlib.util.find_spec(PLUGIN) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def compiled(cfg: ModelConfig, gpu: GPU, names: tuple[str, ...] = PROGRAMS) -> dict[str, int]:
    """Bytes of activations of the programs `names`, each compiled for that GPU, which need not be
    there: what their peak is above their arguments. Takes a minute or so per program.
    """
    (device,) = absent_gpu.devices(gpu.name, gpu.describe())
    above = {}
    # Programs choose their kernels as they are traced, by the default device.
    with absent_gpu.target(device):
        found = programs(cfg, SingleDeviceSharding(device))
        for name in names:
            run, given = found[name]
            memory = run.lower(*given).compile().memory_analysis()
            above[name] = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    return above


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on one device, in bfloat16, of one video at a time."""

    activations: dict[str, int]  # by program
    source: str  # of the activations: "compiled" or "formula"
    note: str  # why it is not the other one


def measure(cfg: ModelConfig, gpu: GPU, source: str = "auto") -> Footprint:
    """Activations from the compiler where it is installed, or from the formula.

    source: "compiled" or "formula"; "auto" prefers the former.
    """
    if source == "formula":
        return Footprint(by_formula(cfg, gpu), "formula", "the formula was asked for")
    if not toolchain():
        missing = "the compiler for GPUs is not installed (pip install 'longlive-jax[aot]')"
        if source == "compiled":
            raise ModuleNotFoundError(missing)
        return Footprint(by_formula(cfg, gpu), "formula", missing)
    return Footprint(compiled(cfg, gpu), "compiled", "")
