"""What the Mosaic kernels of attention multiply with, and how they cut a block's tile."""

UNITS = {90: "wgmma", 100: "tcgen05", 103: "tcgen05"}  # by architecture

GROUPS = 2  # warpgroups that multiply
ROWS = 64  # of a tile, that one of them has; twice as many with tcgen05
TILE = GROUPS * ROWS  # tokens of a tile that a block works at
SLAB = 8  # rows that are stored at a time where a tile is not whole
