"""What the Mosaic kernels of attention multiply with, and how they cut a block's tile."""

from longlive_kernels import arch

UNITS = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}  # by architecture

GROUPS = 2  # warpgroups of a block that have the softmax; with wgmma they multiply, too
ROWS = 64  # of queries, that one of them has with wgmma
TILE = GROUPS * ROWS  # tokens of a block's tile; with tcgen05, forwards have two
SLAB = 8  # rows that are stored at a time where a tile is not whole


def unsuited(sm: int | None) -> str | None:
    """Why a GPU does not have these kernels; None if it does. sm: None is the default device's."""
    sm = arch.default() if sm is None else sm
    if sm is None:
        return "needs an NVIDIA GPU"
    if sm not in UNITS:
        return f"is for {', '.join(f'sm_{x}' for x in UNITS)}, not sm_{sm}"
    return None
