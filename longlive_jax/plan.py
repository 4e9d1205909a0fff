"""`longlive plan`: will a video be made on that GPU? Answered before anyone waits.

A plan is for one device and one video at a time. Memory does not grow with the length of a video:
the cache holds a window, the VAE a carry, and frames leave as they are made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from longlive_jax import config, gpus, timeline
from longlive_jax.config import ModelConfig, Precision
from longlive_jax.errors import InputError
from longlive_jax.version import __version__

PRESETS = {
    "tiny": config.TINY,
    "wan21_1_3b": config.WAN21_T2V_1_3B,
    "wan21_14b": config.WAN21_T2V_14B,
    "wan22_5b": config.WAN22_TI2V_5B,
}
SHARE = 0.75  # of a GPU's memory that JAX takes at its start unless told otherwise
RESERVED = 3 << 29  # bytes that driver, CUDA libraries and kernels keep for themselves
NEEDS_SWITCH = ("switch",)  # programs that run only where a prompt changes inside a shot
STORAGES = Precision.KINDS


@dataclasses.dataclass(frozen=True)
class Ask:
    """What to plan."""

    preset: str
    seconds: float
    gpu: str = "h100"
    mesh: str = "1x1"  # videos side by side × devices that share one
    precision: str = "bf16"  # of the matrices in the transformer's blocks
    kv: str = "bf16"
    guidance: float | None = None  # None is the preset's own
    source: str = "auto"

    def check(self) -> Ask:
        """Itself, if it can be planned.

        Raises:
          InputError: what is wrong with it.
        """
        for flag, given, known in (
            ("--preset", self.preset, PRESETS),
            ("--precision", self.precision, STORAGES),
            ("--kv", self.kv, STORAGES),
            ("--source", self.source, ("auto", "compiled", "formula")),
        ):
            if given not in known:
                raise InputError(f'{flag} "{given}" is not known: say {", ".join(known)}')
        gpus.find(self.gpu)
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise InputError(f"--seconds must be a number above 0, not {self.seconds:g}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"--guidance must be 0 or more, not {self.guidance:g}")
        timeline.frame_count(self.config, self.seconds)
        split(self.config, self.shape[1])
        return self

    @property
    def config(self) -> ModelConfig:
        cfg = PRESETS[self.preset]
        guidance = cfg.sampler.guidance if self.guidance is None else float(self.guidance)
        return dataclasses.replace(
            cfg,
            sampler=dataclasses.replace(cfg.sampler, guidance=guidance),
            stream=dataclasses.replace(cfg.stream, kv=self.kv),
            precision=None if self.precision == "bf16" else Precision.of(self.precision),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """The mesh. Raises InputError for what is none."""
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", self.mesh)
        if not match:
            raise InputError(
                f'--mesh "{self.mesh}" is no mesh: say VIDEOSxDEVICES, such as 1x8 for one video'
                " on eight devices"
            )
        return int(match[1]), int(match[2])


def split(cfg: ModelConfig, devices: int) -> str:
    """What of the cache is divided among the devices that share a video.

    Raises:
      InputError: neither its heads nor its tokens can be.
    """
    if cfg.dit.heads % devices == 0:
        return "heads"
    if cfg.tokens_per_frame % devices == 0:
        return "tokens"
    raise InputError(
        f"--mesh: {devices} devices divide neither the {cfg.dit.heads} heads nor the"
        f" {cfg.tokens_per_frame} tokens of a frame of {cfg.name}"
    )


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes of parameters, with their scales."""

    dit: int
    text: int
    vae: int

    @property
    def total(self) -> int:
        return self.dit + self.text + self.vae


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: Weights
    kv_cache: int
    held_latents: int
    text_kv: int
    vae_carry: int
    activations: dict[str, int]  # of each program; they run one after the other

    @property
    def resident(self) -> int:
        """What is there all the time."""
        state = self.kv_cache + self.held_latents + self.text_kv + self.vae_carry
        return self.weights.total + state

    def peak(self, switch: bool) -> int:
        """The most at any time, in a video with or without a change of prompt inside a shot."""
        runs = [n for name, n in self.activations.items() if switch or name not in NEEDS_SWITCH]
        return self.resident + max(runs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer; `to_json` is its schema."""

    ask: Ask
    memory: Memory
    source: str  # of the activations: "compiled" or "formula"
    note: str
    kv_bytes_per_token: int
    fits: bool
    fits_switch: bool
    how: str  # one sentence: what to do
    not_yet: tuple[str, ...]  # what of the ask is planned layout; not runnable yet

    def to_json(self) -> str:
        """One object: the ask, bytes per device, and the verdict."""
        cfg, gpu = self.ask.config, gpus.find(self.ask.gpu)
        memory = dataclasses.asdict(self.memory)
        memory["peak"] = self.memory.peak(switch=False)
        memory["peak_with_switch"] = self.memory.peak(switch=True)
        body = {
            "version": __version__,
            "ask": dataclasses.asdict(self.ask) | {"guidance": cfg.sampler.guidance},
            "model": cfg.name,
            "frames": timeline.frame_count(cfg, self.ask.seconds),
            "chunks": timeline.chunk_count(cfg, self.ask.seconds),
            "gpu": dataclasses.asdict(gpu),
            "split": split(cfg, self.ask.shape[1]),
            "bytes_per_device": memory,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "source": self.source,
            "note": self.note,
            "fits": self.fits,
            "fits_with_switch": self.fits_switch,
            "how": self.how,
            "runnable": not self.not_yet,
            "not_yet": self.not_yet,
        }
        return json.dumps(body, indent=2) + "\n"


def make(ask: Ask) -> Plan:
    """The plan of a checked ask. Compiles, for minutes, where the compiler for GPUs is installed
    and `ask.source` lets it.

    Raises:
      InputError: the compiler was asked for and is not installed.
    """
    from longlive_jax import footprint  # imports JAX

    try:
        found = footprint.measure(ask.config, gpus.find(ask.gpu), ask.source)
    except ModuleNotFoundError as error:
        raise InputError(f"--source compiled: {error}") from error
    memory = resident(ask, found.activations)
    gpu = gpus.find(ask.gpu)
    return Plan(
        ask=ask,
        memory=memory,
        source=found.source,
        note=found.note,
        kv_bytes_per_token=kv_bytes(ask) // _slots(ask.config),
        fits=room(gpu, memory.peak(switch=False)) is not None,
        fits_switch=room(gpu, memory.peak(switch=True)) is not None,
        how=advise(ask, memory, found.activations),
        not_yet=not_yet(ask),
    )


def resident(ask: Ask, activations: dict[str, int]) -> Memory:
    """Bytes on the fullest device under the ask's storage and mesh; `activations` are those of one
    device.

    Over the devices that share a video, weights, text, latents and the VAE are replicated; the
    cache is divided, and with it what the transformer's programs write down.
    """
    from longlive_jax import footprint  # imports JAX

    cfg, devices = ask.config, ask.shape[1]
    kept = footprint.kept(cfg)
    divided = ("denoise", "switch")
    return Memory(
        weights=Weights(
            dit=footprint.nbytes(footprint.dit(cfg)),
            text=footprint.nbytes(footprint.text_encoder(cfg)),
            vae=footprint.nbytes(footprint.vae(cfg)),
        ),
        kv_cache=kv_bytes(ask) // devices,
        held_latents=kept["held"],
        text_kv=footprint.nbytes(footprint.text_kv(cfg)[0]),
        vae_carry=kept["carry"],
        activations={
            name: size // (devices if name in divided else 1) for name, size in activations.items()
        },
    )


def kv_bytes(ask: Ask) -> int:
    """Bytes of a whole cache: the window's keys and values of every layer."""
    from longlive_jax import footprint  # imports JAX

    return footprint.nbytes(footprint.kv_cache(ask.config))


def _slots(cfg: ModelConfig) -> int:
    """Tokens in the cache, those of the unconditional rows included."""
    return cfg.sampler.branches * cfg.stream.window * cfg.tokens_per_frame


def not_yet(ask: Ask) -> tuple[str, ...]:
    """What of the ask cannot run yet; its bytes are given all the same."""
    found = []
    videos, devices = ask.shape
    if devices > 1:
        divided = split(ask.config, devices)
        found.append(
            f"--mesh {ask.mesh}: planned layout; not runnable yet (the cache divided by {divided}"
            f" over {devices} devices; weights, text and VAE replicated)"
        )
    elif videos > 1:
        found.append(f"--mesh {ask.mesh}: {videos} processes with a device each, today")
    return tuple(found)


def room(gpu: gpus.GPU, peak: int) -> float | None:
    """The share of memory that JAX must be allowed so that `peak` fits; None if it never does."""
    share = max(SHARE, math.ceil(100 * peak / gpu.memory) / 100)
    return share if share * gpu.memory <= gpu.memory - RESERVED else None


def advise(ask: Ask, memory: Memory, activations: dict[str, int]) -> str:
    """One sentence: how it fits, or what would."""
    gpu = gpus.find(ask.gpu)
    peak, share = memory.peak(switch=False), room(gpu, memory.peak(switch=False))
    sizes = f"{gigabytes(peak)} of {gigabytes(gpu.memory)}"
    if share is None:
        return f"Does not fit: {sizes}; {_instead(ask, memory, activations)}"
    fraction = f" with XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f} set" if share > SHARE else ""
    switched = memory.peak(switch=True)
    after = room(gpu, switched)
    if after is None:
        end = f"but a switch needs {gigabytes(switched)} and does not fit: change prompts by cuts"
    elif after > share:
        end = f"and a switch with XLA_PYTHON_CLIENT_MEM_FRACTION={after:.2f} set"
    else:
        end = "switches included"
    return f"Fits{fraction}: {sizes}, {end}."


def _instead(ask: Ask, memory: Memory, activations: dict[str, int]) -> str:
    peak = memory.peak(switch=False)
    larger = [gpu for gpu in gpus.GPUS.values() if room(gpu, peak) is not None]
    larger.sort(key=lambda gpu: gpu.memory)
    words = [f"it would on {larger[0].title} (--gpu {larger[0].name})"] if larger else []
    for change in _changes(ask):
        if room(gpus.find(ask.gpu), resident(change, activations).peak(switch=False)) is not None:
            flags = f"--precision {change.precision} --kv {change.kv} --mesh {change.mesh}"
            words.append(f"here with {flags}" + (" once that runs" if not_yet(change) else ""))
            break
    return (" or ".join(words) or "nothing in the tables is large enough") + "."


def _changes(ask: Ask) -> Iterator[Ask]:
    """Smaller storage, then more devices."""
    for mesh in dict.fromkeys((ask.mesh, "1x2", "1x4", "1x8")):
        for precision, kv in (("bf16", "int8"), ("int8", "int8"), ("nvfp4", "nvfp4")):
            change = dataclasses.replace(ask, mesh=mesh, precision=precision, kv=kv)
            try:
                yield change.check()
            except InputError:
                continue


def gigabytes(count: int) -> str:
    """In units of 10^9 bytes, as memory is sold."""
    return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:.1f} GB"


def show(plan: Plan, to_stderr: bool) -> None:
    """Prints the plan as a table."""
    from rich.console import Console
    from rich.table import Table

    ask, memory, cfg = plan.ask, plan.memory, plan.ask.config
    gpu = gpus.find(ask.gpu)
    frames = timeline.frame_count(cfg, ask.seconds)
    title = f"{cfg.name}, {ask.seconds:g} s = {frames} frames, {gpu.title}, mesh {ask.mesh}"
    table = Table("on each device", "memory", "what it is", title=title)
    for name, size, what in rows(plan):
        table.add_row(name, gigabytes(size), what)
    table.add_section()
    table.add_row("peak", gigabytes(memory.peak(switch=False)), "the largest program at work")
    table.add_row("peak, switch", gigabytes(memory.peak(switch=True)), "where a prompt changes")
    console = Console(stderr=to_stderr)
    console.print(table, markup=False)
    source = {
        "compiled": f"Activations: what the programs compiled for {gpu.title} say.",
        "formula": f"Activations: by formula; {plan.note}.",
    }[plan.source]
    for line in (source, *(f"Note: {text}." for text in plan.not_yet), plan.how):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def rows(plan: Plan) -> list[tuple[str, int, str]]:
    """Name, bytes and meaning of everything in memory."""
    ask, memory, cfg = plan.ask, plan.memory, plan.ask.config
    caches = "conditional and unconditional" if cfg.sampler.branches > 1 else "no negative cache"
    window = f"window of {cfg.stream.window}, {plan.kv_bytes_per_token:,} B a token, {caches}"
    table: list[tuple[str, Any, str]] = [
        ("weights: transformer", memory.weights.dit, f"blocks in {ask.precision}"),
        ("weights: text encoder", memory.weights.text, "bf16"),
        ("weights: VAE", memory.weights.vae, "bf16"),
        ("KV cache", memory.kv_cache, f"{ask.kv}: {window}"),
        ("held latents", memory.held_latents, "of the window, for switches"),
        ("text K/V", memory.text_kv, f"{cfg.dit.text_len} tokens in every layer"),
        ("VAE carry", memory.vae_carry, "what the decoder remembers"),
    ]
    what = {
        "text": "a prompt is encoded",
        "denoise": "a chunk is denoised",
        "decode": "a chunk is decoded",
        "switch": "the window is read again",
    }
    for name, size in memory.activations.items():
        table.append((f"activations: {name}", size, f"while {what[name]}"))
    return table
