"""Named shapes from the models. Tests and benchmarks read this list."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. rows, columns: of x, before it is transposed."""

    rows: int
    columns: int
    batch: tuple[int, ...] = ()
    tile: int = 1
    transpose: bool = False
    rotate: bool = False

    @property
    def x(self) -> tuple[int, ...]:
        return (*self.batch, self.rows, self.columns)

    @property
    def quantized(self) -> tuple[int, ...]:
        """What comes out."""
        sides = (self.columns, self.rows) if self.transpose else (self.rows, self.columns)
        return (*self.batch, *sides)

    def capped(self, size: int) -> Shape:
        """With no side longer than `size`, for tests."""
        return dataclasses.replace(self, rows=min(self.rows, size), columns=min(self.columns, size))


def _operands(name: str, tokens: int, dim: int, ffn: int) -> dict[str, Shape]:
    """What a layer quantises. Kernels are [in out]; tokens are filled up to blocks of 16."""
    filled = -(-tokens // 16) * 16
    made = {}
    for side, width in (("dim", dim), ("ffn", ffn)):
        made[f"{name}_tokens_{side}"] = Shape(tokens, width)
        made[f"{name}_tokens_{side}_wgrad"] = Shape(filled, width, transpose=True, rotate=True)
    made[f"{name}_up"] = Shape(dim, ffn, tile=16, transpose=True)
    made[f"{name}_up_dgrad"] = Shape(dim, ffn, tile=16)
    made[f"{name}_down"] = Shape(ffn, dim, tile=16, transpose=True)
    made[f"{name}_cache"] = Shape(tokens * (dim // 128), 128)
    return made


TINY = _operands("tiny", tokens=48, dim=256, ffn=768)
WAN_1_3B = _operands("1.3b", tokens=3 * 30 * 52, dim=1536, ffn=8960)
WAN_5B = _operands("5b", tokens=8 * 22 * 40, dim=3072, ffn=14336)

AWKWARD = {
    "one_row": Shape(1, 16),
    "one_column": Shape(16, 1, transpose=True),
    "one_tile": Shape(16, 16, tile=16),
    "odd_rows": Shape(37, 80),
    "odd_columns": Shape(48, 37, transpose=True, rotate=True),
    "rotated_tiles": Shape(32, 48, tile=16, rotate=True),
    "stacked": Shape(32, 48, batch=(2, 3), tile=16, transpose=True),
}

SHAPES = TINY | WAN_1_3B | WAN_5B | AWKWARD
