"""How the Mosaic kernels of attention cut a block's tile."""

GROUPS = 2  # warpgroups that multiply
ROWS = 64  # of a tile, that one of them has
TILE = GROUPS * ROWS  # tokens of a tile that a block works at
SLAB = 8  # rows that are stored at a time where a tile is not whole
