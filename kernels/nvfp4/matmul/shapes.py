"""Named shapes from the models. Tests and benchmarks read this list."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """[*batch m k] times [*batch n k] transposed."""

    m: int
    n: int
    k: int
    batch: tuple[int, ...] = ()

    @property
    def a(self) -> tuple[int, ...]:
        return (*self.batch, self.m, self.k)

    @property
    def b(self) -> tuple[int, ...]:
        return (*self.batch, self.n, self.k)

    def capped(self, size: int) -> Shape:
        """With no side longer than `size`, for tests."""
        return Shape(min(self.m, size), min(self.n, size), min(self.k, size), self.batch)


def _layers(name: str, tokens: int, dim: int, ffn: int) -> dict[str, Shape]:
    """The products of one layer over a chunk of tokens, and those of its gradients."""
    sides = {"square": (dim, dim), "up": (ffn, dim), "down": (dim, ffn)}
    made = {}
    for layer, (n, k) in sides.items():
        made[f"{name}_{layer}"] = Shape(tokens, n, k)
        made[f"{name}_{layer}_dgrad"] = Shape(tokens, k, n)
        made[f"{name}_{layer}_wgrad"] = Shape(k, n, -(-tokens // 16) * 16)
    return made


TINY = _layers("tiny", tokens=48, dim=256, ffn=768)
WAN_1_3B = _layers("1.3b", tokens=3 * 30 * 52, dim=1536, ffn=8960)
WAN_5B = _layers("5b", tokens=8 * 22 * 40, dim=3072, ffn=14336)

AWKWARD = {
    "one_row": Shape(1, 16, 16),
    "one_block": Shape(16, 16, 16),
    "odd_rows": Shape(37, 48, 80),
    "odd_columns": Shape(32, 5, 64),
    "long_sum": Shape(3, 16, 4096),
    "stacked": Shape(24, 32, 48, batch=(2, 3)),
}

SHAPES = TINY | WAN_1_3B | WAN_5B | AWKWARD
