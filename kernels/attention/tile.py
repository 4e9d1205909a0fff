"""What the Mosaic kernels of attention multiply with, and how they cut a block's tile."""

from longlive_kernels import arch

UNITS = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}  # by architecture

GROUPS = 2  # warpgroups that multiply
ROWS = 64  # of a tile, that one of them has; twice as many with tcgen05
TILE = GROUPS * ROWS  # tokens of a tile that a block works at
SLAB = 8  # rows that are stored at a time where a tile is not whole


def unsuited(sm: int | None) -> str | None:
    """Why a GPU does not have these kernels; None if it does. sm: None is the default device's."""
    sm = arch.default() if sm is None else sm
    if sm is None:
        return "needs an NVIDIA GPU"
    if sm not in UNITS:
        return f"is for {', '.join(f'sm_{x}' for x in UNITS)}, not sm_{sm}"
    return None
