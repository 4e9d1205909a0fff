"""LightVAE: the Wan2.2 VAE with fewer channels (`lightvae_5b_wrapper.py:PrunableWanVAE`).

Names and shapes are those of `wan_vae`, mostly in diffusers' words. But its files are a training's:
the model lies inside other dicts, beside heads that only training used.
"""

from __future__ import annotations

from collections.abc import Iterable

_WRAPPERS = ("state_dict.", "gen_model.", "generator.")  # from the outside in; any may be absent
_HEADS = "dynamic_feature_projection_heads."


def unwrap(found: Iterable[str]) -> dict[str, str]:
    """The names that belong to the model, without what is wrapped around them → as they are."""
    names = {name: name for name in found}
    for wrapper in _WRAPPERS:
        inner = {new: old for new, old in names.items() if new.startswith(wrapper)}
        names = {new.removeprefix(wrapper): old for new, old in (inner or names).items()}
    return {new: old for new, old in names.items() if not new.startswith(_HEADS)}


def names(found: Iterable[str]) -> list[str]:
    """The names that belong to the model, as they are."""
    return list(unwrap(found).values())
