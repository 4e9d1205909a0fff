"""Every choice the system takes, as frozen values.

A preset is a `ModelConfig`; variants are made with `dataclasses.replace`. Counts that follow from
others (tokens per chunk, frames per chunk) are properties, so that no number is written down twice.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import pathlib
from typing import Annotated, Any

from longlive_jax import fields
from longlive_jax.fields import Checked, Count, Few, FieldError, Number, Positive, Range, Size

SHIPPED = pathlib.Path(__file__).parent / "models"
Epsilon = Annotated[float, Range(0, 1)]
Stride = Annotated[int, Range(1, 64)]
Strides = tuple[tuple[Stride, Stride], ...]  # (time, space) each
MOST_KEPT = 1 << 40  # numbers in the memory of a window


@dataclasses.dataclass(frozen=True)
class DiTConfig(Checked):
    """Shape of the Wan diffusion transformer (Wan2.2 `wan/modules/model.py:WanModel`)."""

    dim: Size
    ffn_dim: Size
    heads: Few
    layers: Few
    channels: Few  # latent channels, in and out
    text_dim: Size
    text_len: Annotated[int, Range(1, 1 << 16)]
    freq_dim: Size = 256
    patch: tuple[Few, Few, Few] = (1, 2, 2)
    eps: Epsilon = 1e-6
    rope_theta: Positive = 10000.0
    # Rows and columns (in tokens) after which space repeats. None is Wan's geometric ladder of
    # frequencies; a period takes harmonics of it instead, for worlds that wrap around.
    rope_period: tuple[Size, Size] | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclasses.dataclass(frozen=True)
class VAEConfig(Checked):
    """Shape of a Wan causal video VAE (Wan2.1 `vae.py`, Wan2.2 `vae2_2.py`)."""

    latent_channels: Few
    encoder_dim: Size
    decoder_dim: Size
    multipliers: tuple[Few, ...]
    res_blocks: Annotated[int, Range(0, 64)]
    strides: Strides  # (time, space) of each downsampling, in encoder order
    patch: Stride = 1  # pixels folded into channels before the first convolution
    shortcut: bool = False  # the 2.2 averaging / duplicating shortcuts around whole levels
    attention: bool = True  # self-attention over one frame in the middle block
    # (time, space) of the convolutions that keep the resolution.
    kernel: tuple[Stride, Stride] = (3, 3)
    mean: tuple[Number, ...] = ()  # latent statistics, one number per channel
    std: tuple[Positive, ...] = ()

    @property
    def time_stride(self) -> int:
        stride = 1
        for time, _ in self.strides:
            stride *= time
        return stride

    @property
    def space_stride(self) -> int:
        stride = self.patch
        for _, space in self.strides:
            stride *= space
        return stride


@dataclasses.dataclass(frozen=True)
class TAEConfig(Checked):
    """Shape of a tiny autoencoder (`taehv.py:TAEHV`) that speaks the normalised latents of a Wan
    VAE.
    """

    latent_channels: Few
    patch: Stride = 1  # pixels folded into channels before the first convolution
    encoder_dim: Size = 64
    decoder_dims: tuple[Size, ...] = (256, 128, 64, 64)  # before each upsampling, and at the end
    blocks: Annotated[int, Range(0, 64)] = 3
    strides: Strides = ((2, 2), (2, 2), (1, 2))  # (time, space), encoder order

    @property
    def time_stride(self) -> int:
        return math.prod(time for time, _ in self.strides)

    @property
    def space_stride(self) -> int:
        return self.patch * math.prod(space for _, space in self.strides)


# Eight statistics to a line.
# fmt: off
_WAN_STRIDES = ((1, 2), (2, 2), (2, 2))

WAN21_VAE = VAEConfig(
    latent_channels=16,
    encoder_dim=96,
    decoder_dim=96,
    multipliers=(1, 2, 4, 4),
    res_blocks=2,
    strides=_WAN_STRIDES,
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)

WAN22_VAE = VAEConfig(
    latent_channels=48,
    encoder_dim=160,
    decoder_dim=256,
    multipliers=(1, 2, 4, 4),
    res_blocks=2,
    strides=_WAN_STRIDES,
    patch=2,
    shortcut=True,
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)

TINY_VAE = VAEConfig(
    latent_channels=16,
    encoder_dim=44,
    decoder_dim=44,
    multipliers=(1, 1, 1),
    res_blocks=1,
    strides=((2, 1), (2, 1)),
    patch=8,
    attention=False,
    kernel=(1, 3),
    mean=(
        0.5576, 0.0719, -0.0824, -0.0533, 0.0503, -0.0166, 0.0143, -0.0871,
        0.0412, -0.0394, -0.0547, 0.0469, -0.0483, 0.0582, 0.0329, 0.0428,
    ),
    std=(
        1.5918, 1.6600, 1.7323, 1.4208, 1.3003, 1.5413, 1.3052, 1.2841,
        1.2038, 1.2325, 1.2000, 1.3107, 1.1863, 1.4010, 1.2844, 1.2626,
    ),
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class TextConfig(Checked):
    """Shape of a UMT5 encoder (Wan2.2 `wan/modules/t5.py:T5Encoder`)."""

    vocab: Annotated[int, Range(1, 1 << 24)]
    dim: Size
    attn_dim: Size
    ffn_dim: Size
    heads: Few
    layers: Few
    buckets: Annotated[int, Range(4, 4096)] = 32
    max_distance: Size = 128
    eps: Epsilon = 1e-6


@dataclasses.dataclass(frozen=True)
class Recache(Checked):
    """How the window is re-read under a new prompt (LongLive 1.0 section 3.1).

    form: "causal": a chunk sees itself and what came before it, as when it was made;
    "bidirectional": all frames see each other, as in the released code. sinks: "first": the sinks
    are the same frames, re-read too; "keep": they stay as the old prompt left them (`global_sink:
    true` in the released code); "window": the oldest frames of the window take their place
    (`global_sink: false`).
    """

    form: str = "causal"
    sinks: str = "first"

    FORMS = ("causal", "bidirectional")
    SINKS = ("first", "keep", "window")

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("form", self.FORMS), ("sinks", self.SINKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class StreamConfig(Checked):
    """How a video is cut into chunks, and what a chunk may attend. All lengths in latent frames."""

    chunk: Few
    # Attended frames, the current chunk and the sinks included.
    window: Annotated[int, Range(1, 1 << 16)]
    sink: Count  # first frames of the video, always attended
    shot_sink: Count = 0  # first frames of the current shot, the same (LongLive 2.0 section 4.2)
    shot_offset: Count = 8  # added to temporal RoPE positions at every cut (ibid.)
    # Positions: of the frame in the video, or its rank in time among what is attended.
    rope: str = "absolute"
    time_scale: Positive = 1.0  # of temporal positions
    clean_recache: bool = False  # a cut's first clean pass sees the global sink and itself only
    # A finished chunk is read into the memory by a pass of its own; otherwise what its last
    # denoising step wrote there stays, which saves one forward a chunk.
    clean_pass: bool = True
    recache: Recache = Recache()
    # How keys and values are kept: in the model's type, or as bf16, int8, fp8 or nvfp4.
    kv: str = "model"
    # Scores of attention are products of eight-bit numbers: of keys as they are kept, which are
    # int8 or fp8 then, with queries, and with a chunk's own keys, that are rounded likewise.
    eight_bit_scores: bool = False
    # Which backend of `longlive_kernels.attention.sink_window` attends; "best": the first that can,
    # of those that need not be asked for by name.
    attention: str = "best"

    KV = ("model", "bf16", "int8", "fp8", "nvfp4")

    def __post_init__(self):
        super().__post_init__()
        sinks = self.sink + self.shot_sink
        if self.chunk + sinks > self.window:
            raise ValueError(
                f"a window of {self.window} has no room for a chunk of {self.chunk}"
                f" beside {'a sink' if not self.shot_sink else 'sinks'} of {sinks}"
            )
        if self.rope not in ("absolute", "relative"):
            raise ValueError(f"rope {self.rope!r}: choose absolute or relative")
        if self.kv not in self.KV:
            raise ValueError(f"kv {self.kv!r}: choose {', '.join(self.KV)}")
        if self.eight_bit_scores and self.kv not in ("int8", "fp8"):
            raise ValueError(f"scores in eight bits need kv int8 or fp8, not {self.kv}")
        if self.eight_bit_scores and self.rope == "relative":
            raise ValueError(
                "scores in eight bits need absolute positions: relative ones turn keys"
            )
        if self.clean_recache and not self.clean_pass:
            raise ValueError("a clean recache at a cut is a clean pass: one needs the other")


@dataclasses.dataclass(frozen=True)
class SamplerConfig(Checked):
    """How one chunk is denoised (`sampler.make`)."""

    solver: str  # "unipc" (LongLive 2.0), "renoise" (LongLive 1.0), "dpmpp" or "euler"
    steps: int
    shift: Positive
    guidance: Number = 1.0
    timesteps: tuple[int, ...] = ()  # of "renoise": falling from 1000; evenly spaced if empty
    warp: bool = True  # whether these are places in the shifted table, or what the model is told

    @property
    def branches(self) -> int:
        """Forwards per step, each with its own cache: 2 under guidance, the unconditional one
        included.
        """
        return 1 if self.guidance == 1.0 else 2


@dataclasses.dataclass(frozen=True)
class Precision(Checked):
    """In how many bits matrices of the transformer are kept, and multiplied.

    layers: patterns of the paths of linear layers ("blocks.*", "blocks.ffn_in") with int8, fp8,
    nvfp4 or bf16, which stays as it is; the first that fits decides. weights_only: what comes in is
    multiplied as it is. tile: rows of an NVFP4 matrix that share a scale, 16 as in training or 1.
    rule: of its scales (`longlive_kernels.nvfp4.RULES`).
    """

    layers: tuple[tuple[str, str], ...]
    weights_only: bool = False
    tile: int = 1
    rule: str = "mse"

    KINDS = ("bf16", "int8", "fp8", "nvfp4")
    RULES = ("static_6", "static_4", "mse", "mae", "abs_max")

    def __post_init__(self):
        super().__post_init__()
        for pattern, kind in self.layers:
            if kind not in self.KINDS:
                raise ValueError(f"{pattern} in {kind!r}: choose {', '.join(self.KINDS)}")
        if self.tile not in (1, 16):
            raise ValueError(f"tile {self.tile}: choose 1 or 16")
        if self.rule not in self.RULES:
            raise ValueError(f"rule {self.rule!r}: choose {', '.join(self.RULES)}")

    @classmethod
    def of(cls, kind: str, **choices) -> Precision:
        """All linear layers of the blocks in one kind, as LongLive 2.0 has them; embeddings, time,
        head and norms stay (`utils/quant.py:DEFAULT_GENERATOR_FILTERED_MODULES`).
        """
        return cls((("blocks.*", kind),), **choices)

    @classmethod
    def from_json(cls, data: dict) -> Precision:
        return fields.make(cls, data)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """One complete text-to-video system."""

    name: str
    dit: DiTConfig
    vae: VAEConfig
    text: TextConfig
    stream: StreamConfig
    sampler: SamplerConfig
    height: Annotated[int, Range(1, 1 << 14)]
    width: Annotated[int, Range(1, 1 << 14)]
    fps: Annotated[int, Range(1, 1000)]
    # Faster relatives of `vae` that decode the same latents: their names and shapes.
    decoders: tuple[tuple[str, VAEConfig | TAEConfig], ...] = ()
    # Parameters that the converted checkpoint lacked, by leave of `--allow-missing`; zeros.
    allowed_missing: tuple[str, ...] = ()
    precision: Precision | None = None  # of matrices that are kept in fewer bits

    @property
    def latent_height(self) -> int:
        return self.height // self.vae.space_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.vae.space_stride

    @property
    def tokens_per_frame(self) -> int:
        _, rows, columns = self.dit.patch
        return (self.latent_height // rows) * (self.latent_width // columns)

    @property
    def frames_per_chunk(self) -> int:
        """RGB frames of every chunk but the first, which is `time_stride - 1` shorter."""
        return self.stream.chunk * self.vae.time_stride

    def decoder(self, name: str) -> VAEConfig | TAEConfig:
        """The VAE that is called `name`: "full", or one of `decoders`. Raises KeyError."""
        return {"full": self.vae, **dict(self.decoders)}[name]


_DECODERS = {"wan": VAEConfig, "tae": TAEConfig}


def to_json(cfg: ModelConfig) -> dict:
    """A config as plain dicts and lists."""
    names = {kind: name for name, kind in _DECODERS.items()}
    decoders = {
        name: {"kind": names[type(part)], **dataclasses.asdict(part)} for name, part in cfg.decoders
    }
    return dataclasses.asdict(cfg) | {"decoders": decoders}


def from_json(data: dict) -> ModelConfig:
    """The inverse of `to_json`.

    Raises:
      InputError: a field is missing, unknown, or has a value that it cannot have.
    """
    decoders = data.get("decoders", {})
    if not isinstance(decoders, dict):
        raise FieldError("decoders", "are a group of decoders by their names")
    named = tuple((name, _decoder(part, f"decoders.{name}")) for name, part in decoders.items())
    cfg = fields.make(ModelConfig, data | {"decoders": named})
    _check_parts(cfg)
    return cfg


def _decoder(data: Any, path: str) -> VAEConfig | TAEConfig:
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _DECODERS:
        raise FieldError(f"{path}.kind", f"is one of {', '.join(_DECODERS)}")
    rest = {name: value for name, value in data.items() if name != "kind"}
    return fields.make(_DECODERS[kind], rest, path)


def _require(true: bool, field: str, said: str) -> None:
    if not true:
        raise FieldError(field, said)


def _check_parts(cfg: ModelConfig) -> None:
    """Raise InputError where the fields of a part do not go together."""
    dit, text = cfg.dit, cfg.text
    even = dit.dim % (2 * dit.heads) == 0
    _require(even, "dit.dim", f"is a multiple of {2 * dit.heads}: {dit.heads} heads of even size")
    _require(dit.freq_dim % 2 == 0, "dit.freq_dim", f"is an even number, not {dit.freq_dim}")
    whole, room = text.attn_dim % text.heads == 0, text.max_distance > text.buckets // 4
    _require(whole, "text.attn_dim", f"is a multiple of {text.heads} heads")
    _require(text.buckets % 4 == 0, "text.buckets", "are a multiple of 4")
    _require(room, "text.max_distance", f"is more than a quarter of the {text.buckets} buckets")
    _check_vae("vae", cfg.vae)
    for name, part in cfg.decoders:
        _check_vae(f"decoders.{name}", part)


def _check_vae(path: str, cfg: VAEConfig | TAEConfig) -> None:
    levels = len(cfg.strides)
    _require(0 < levels < 16, f"{path}.strides", f"are 1 to 15 pairs, not {levels}")
    if isinstance(cfg, TAEConfig):
        more = len(cfg.decoder_dims) == levels + 1
        _require(more, f"{path}.decoder_dims", f"are one more than the {levels} strides")
        return
    more = len(cfg.multipliers) == levels + 1
    _require(more, f"{path}.multipliers", f"are one more than the {levels} strides")
    for name in ("mean", "std"):
        counts = len(getattr(cfg, name)) in (0, cfg.latent_channels)
        _require(counts, f"{path}.{name}", f"has {cfg.latent_channels} numbers, one a channel")
    for size in cfg.kernel:
        _require(size % 2 == 1, f"{path}.kernel", f"has odd sizes, not {size}")


def check_whole(cfg: ModelConfig) -> None:
    """Check that the parts of a model fit each other, and that its KV cache fits into a memory.

    Raises:
      InputError: they do not, or no memory holds its window.
    """
    for one, other in (("text.dim", "dit.text_dim"), ("vae.latent_channels", "dit.channels")):
        sizes = [operator.attrgetter(name)(cfg) for name in (one, other)]
        if sizes[0] != sizes[1]:
            raise FieldError(one, f"is {sizes[0]} and {other} {sizes[1]}, which must be the same")
    for name, decoder in cfg.decoders:
        theirs = decoder.time_stride, decoder.space_stride, decoder.latent_channels
        if theirs != (cfg.vae.time_stride, cfg.vae.space_stride, cfg.vae.latent_channels):
            raise FieldError(f"decoders.{name}", "decodes other latents than the model makes")
    if not cfg.tokens_per_frame:
        rows, columns = (cfg.vae.space_stride * size for size in cfg.dit.patch[1:])
        raise FieldError("height", f"and width are at least {rows} x {columns}")
    tokens = cfg.stream.window * cfg.tokens_per_frame
    kept = 2 * tokens * cfg.dit.dim * cfg.dit.layers * cfg.sampler.branches
    if kept > MOST_KEPT:
        raise FieldError("stream.window", f"holds {kept:.0e} keys and values, more than can be")


WAN21_TAE = TAEConfig(latent_channels=16)
WAN22_TAE = TAEConfig(latent_channels=48, patch=2)

UMT5_XXL = TextConfig(vocab=256384, dim=4096, attn_dim=4096, ffn_dim=10240, heads=64, layers=24)
TINY_TEXT = TextConfig(vocab=128, dim=128, attn_dim=128, ffn_dim=256, heads=4, layers=2)

# The model that ships with the package: 64×64 pictures of the toy world, which wraps around.
TINY = ModelConfig(
    name="tiny",
    dit=DiTConfig(
        dim=256,
        ffn_dim=768,
        heads=8,
        layers=4,
        channels=16,
        text_dim=128,
        text_len=40,
        freq_dim=64,
        rope_theta=1000.0,
        rope_period=(4, 4),
    ),
    vae=TINY_VAE,
    text=TINY_TEXT,
    stream=StreamConfig(chunk=3, window=12, sink=3),
    sampler=SamplerConfig(solver="unipc", steps=4, shift=3.0),
    height=64,
    width=64,
    fps=16,
)

# LongLive 1.0: chunks of 3, a window of 12 with 3 of sink (section 3.3), four re-noised steps.
WAN21_T2V_1_3B = ModelConfig(
    name="wan21_t2v_1_3b",
    dit=DiTConfig(
        dim=1536, ffn_dim=8960, heads=12, layers=30, channels=16, text_dim=4096, text_len=512
    ),
    vae=WAN21_VAE,
    text=UMT5_XXL,
    stream=StreamConfig(chunk=3, window=12, sink=3),
    sampler=SamplerConfig(solver="renoise", steps=4, shift=5.0),
    height=480,
    width=832,
    fps=16,
)

# The same at its large size (Wan2.1 `configs/wan_t2v_14B.py`), streamed like LongLive 1.0.
WAN21_T2V_14B = dataclasses.replace(
    WAN21_T2V_1_3B,
    name="wan21_t2v_14b",
    dit=dataclasses.replace(WAN21_T2V_1_3B.dit, dim=5120, ffn_dim=13824, heads=40, layers=40),
)

# LongLive 2.0: chunks of 8, a window of 32 with 8 of sink, UniPC (section 4.2, appendix I).
WAN22_TI2V_5B = ModelConfig(
    name="wan22_ti2v_5b",
    dit=DiTConfig(
        dim=3072, ffn_dim=14336, heads=24, layers=30, channels=48, text_dim=4096, text_len=512
    ),
    vae=WAN22_VAE,
    text=UMT5_XXL,
    stream=StreamConfig(chunk=8, window=32, sink=8, shot_sink=8),
    sampler=SamplerConfig(solver="unipc", steps=4, shift=5.0),
    height=704,
    width=1280,
    fps=24,
)


def folder_of(name: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder of a model: "tiny" ships with the package, other names are folders."""
    return SHIPPED / name if name == "tiny" else pathlib.Path(name)
