"""Names of the tensors in LoRA files of Wan transformers, in every spelling that they come in.

A name has a prefix, a module and a part. Prefixes tell which program wrote the file, and are left
out; modules are called as in the official code or in diffusers, with dots or with underscores:
    base_model.model.blocks.0.self_attn.q.lora_A.weight     peft on the official modules, LongLive
    transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers
    diffusion_model.blocks.0.self_attn.q.lora_down.weight   ComfyUI, LightX2V
    lora_unet__blocks_0_self_attn_q.lora_down.weight        VideoX-Fun; musubi-tuner with one _
    pipe.dit.blocks.0.self_attn.q.lora_A.default.weight     DiffSynth-Studio
    lycoris_blocks_0_self_attn_q.lokr_w1                    LyCORIS
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from longlive_jax.config import WAN21_T2V_1_3B
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import LINEAR, Row

NAMINGS = ("peft", "diffusers")
MOST_BLOCKS = 1000
_TABLES = (wan_dit.rows, wan_dit.rows_diffusers)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module that a LoRA may change.

    Args:
      names: In the official code and in diffusers, {i} for the number of the block.
      weight: The parameter that `lora_A` and `lora_B` or `diff` change.
      bias: The one that `diff_b` changes.
    """

    names: tuple[str, str]
    weight: Row | None = None
    bias: Row | None = None

    @property
    def linear(self) -> bool:
        return self.weight is not None and self.weight.axes == LINEAR

    @property
    def path(self) -> str:
        """Return the path of a linear layer in our model."""
        return self.weight.target.removesuffix(".kernel")


def _layers() -> dict[str, Layer]:
    """The modules of the transformer by their official names. Modulations are parameters without a
    module, and stand for one.
    """
    cfg = WAN21_T2V_1_3B.dit  # names do not depend on it
    found: dict[str, Layer] = {}
    for rows in zip(*(table(cfg) for table in _TABLES), strict=True):
        row = rows[0]
        if row.merge:  # the number of channels does depend on it
            row = dataclasses.replace(row, merge=(*row.merge[:-1], -1))
        leaf = row.source.rpartition(".")[2]
        ending = f".{leaf}" if leaf in ("weight", "bias") else ""
        names = tuple(r.source.removesuffix(ending) for r in rows)
        layer = found.setdefault(names[0], Layer(names))
        field = "bias" if leaf == "bias" else "weight"
        found[names[0]] = dataclasses.replace(layer, **{field: row})
    return found


LAYERS = _layers()
OF_PATH = {layer.path: layer for layer in LAYERS.values() if layer.linear}
OF_PARAMETER = {
    row.target: layer for layer in LAYERS.values() for row in (layer.weight, layer.bias) if row
}
LINEARS = {path: layer.names for path, layer in OF_PATH.items()}  # our path: the module's names

# Modules that diffusers makes of several (`WanAttention.fuse_projections`), outputs in this order.
_FUSED = {
    "blocks.{i}.attn1.to_qkv": tuple(f"blocks.{{i}}.self_attn.{part}" for part in "qkv"),
    "blocks.{i}.attn2.to_kv": tuple(f"blocks.{{i}}.cross_attn.{part}" for part in "kv"),
}
# `diff_m` has the name of the module that holds the modulation.
_MODULATED = {"blocks.{i}": "blocks.{i}.modulation", "head": "head.modulation"}


def _plain(module: str) -> str:
    """One spelling for all: some programs write _ for the dots."""
    return module.replace(".", "_")


_PLAIN = {_plain(name): (layer,) for layer in LAYERS.values() for name in layer.names}
_PLAIN |= {_plain(name): tuple(LAYERS[of] for of in whole) for name, whole in _FUSED.items()}
_PLAIN_MODULATED = {_plain(name): (LAYERS[of],) for name, of in _MODULATED.items()}

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_PREFIXES = re.compile(
    r"^(?:(?:base_model|model|transformer|diffusion_model|module|pipe|dit|unet"
    r"|lora_unet|lora_transformer|lycoris)[._]+)+"
)
_MATRIX = re.compile(
    r"(?P<module>.+?)[._]"
    r"(?:(?P<a>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up))"
    r"(?:\.(?!(?:weight|bias)$)\w+)?(?:\.(?P<leaf>weight|bias))?"
)
_LYCORIS = r"lokr_w[12](?:_[ab])?|hada_w[12]_[ab]"
_OTHER_KINDS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "Tucker": r"lora_mid|lokr_t[12]|hada_t[12]",
    "OFT": r"oft_blocks|oft_diag|oft_[rR]|boft_[A-Za-z]+",
    "(IA)3": r"ia3_l|on_input",
    "GLoRA": r"[abc][12]\.weight",
}
_KIND = "|".join(f"({pattern})" for pattern in _OTHER_KINDS.values())
_OTHER = re.compile(
    rf"(?P<module>.+?)\.(?:(?P<part>alpha|diff_b|diff_m|diff|w_norm|b_norm|{_LYCORIS})(?:\.default)?"
    rf"|(?P<kind>{_KIND})(?:\.\w+)*)"
)
_SAME_PART = {"w_norm": "diff", "b_norm": "diff_b"}  # of LyCORIS
_BLOCK = re.compile(r"blocks_(\d{1,6})(?=_|$)", re.ASCII)
_OF_IMAGES = re.compile(  # of a transformer that is shown an image
    r"blocks_\{i\}_(?:cross_attn|attn2)_"
    r"(?:k_img|v_img|norm_k_img|add_[kqv]_proj|to_added_kv|norm_added_[kqv])"
    r"|(?:img_emb|condition_embedder_image_embedder)(?:_.*)?"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    Args:
      module: Its name without a prefix, as `_plain` has it, {i} for the number of the block.
      block: None outside the blocks.
      part: "a", "b", "bias" (of B), "alpha", "diff", "diff_b", a part of LyCORIS, or the kind of an
        adapter that is not read.
    """

    module: str
    block: int | None
    part: str

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Return the layers that it changes, several where they are fused; none where a
        text-to-video model has no such module.
        """
        return _PLAIN.get(self.module, ())

    def __str__(self) -> str:
        """The module as people know it."""
        layers = self.layers
        name = layers[0].names[0] if len(layers) == 1 else self.module
        return name.replace("{i}", str(self.block))


def place(name: str) -> Place | None:
    """The place of the tensor called `name`, None where it is no part of a LoRA that we know."""
    bare = _PREFIXES.sub("", _WRAPPERS.sub("", name))
    if match := _OTHER.fullmatch(bare):
        part = match["part"] or _kind(match["kind"])
        part = _SAME_PART.get(part, part)
    elif match := _MATRIX.fullmatch(bare):
        part = "a" if match["a"] else "b"
        if match["leaf"] == "bias":
            if part == "a":
                return None
            part = "bias"
    else:
        return None
    module = _plain(match["module"])
    block = _BLOCK.match(module)
    module = _BLOCK.sub("blocks_{i}", module, count=1) if block else module
    if part == "diff_m":
        if module in _PLAIN_MODULATED:
            module = _plain(_PLAIN_MODULATED[module][0].names[0])
        part = "diff"
    layers = _PLAIN.get(module)
    if layers is None and not _OF_IMAGES.fullmatch(module):
        return None
    if layers and len(layers) == 1:
        module = _plain(layers[0].names[0])  # the same in both spellings
    return Place(module, int(block[1]) if block else None, part)


def _kind(part: str) -> str:
    return next(kind for kind, said in _OTHER_KINDS.items() if re.fullmatch(said, part))


def other_kind(at: Place) -> bool:
    """Return whether a tensor belongs to an adapter of a kind that is not read."""
    return at.part in _OTHER_KINDS


def name_of(layer: Layer, block: int | None, part: str, naming: str = "peft") -> str:
    """The name of a part of a layer's LoRA as peft (LongLive too) or diffusers spells it.

    Args:
      layer: The layer.
      block: None outside the blocks.
      part: "a", "b", "diff" or "diff_b".
      naming: One of `NAMINGS`.
    """
    module = module_of(layer, block, naming)
    if part == "diff" and layer in [layers[0] for layers in _PLAIN_MODULATED.values()]:
        module, part = module.rpartition(".")[0], "diff_m"
    return f"{_PREFIX[naming]}{module}.{_PARTS.get(part, part)}"


def module_of(layer: Layer, block: int | None, naming: str = "peft") -> str:
    """The name of its module."""
    return layer.names[NAMINGS.index(naming)].format(i=block)


_PREFIX: Mapping[str, str] = {"peft": "base_model.model.", "diffusers": "transformer."}
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight"}
