"""The kernel of triton.py. Needs Triton, so that only calls import it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(  # noqa: PLR0913
    a,
    b,
    a_scales,
    b_scales,
    unit,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """out [M N] = unit · a bᵀ of packed a [M K/2], b [N K/2] with scales [M K/16], [N K/16].

    One program makes ROWS x COLUMNS of it. Programs go down bands of BAND of these, so that those
    that run together share operands in the second-level cache.
    """
    down: tl.constexpr = tl.cdiv(M, ROWS)
    across: tl.constexpr = tl.cdiv(N, COLUMNS)
    program = tl.program_id(0)
    band = program // (BAND * across)
    height = min(down - band * BAND, BAND)
    row = band * BAND + program % (BAND * across) % height
    column = program % (BAND * across) // height
    rows = row * ROWS + tl.arange(0, ROWS)
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the edges, operands are those of the edge, and nothing is stored.
    a_rows = tl.minimum(rows, M - 1)
    b_rows = tl.minimum(columns, N - 1)
    byte = tl.arange(0, DEPTH // 2)
    block = tl.arange(0, DEPTH // 16)
    a_at = a + a_rows[:, None] * (K // 2) + byte[None, :]
    b_at = b + b_rows[:, None] * (K // 2) + byte[None, :]
    a_scales_at = a_scales + a_rows[:, None] * (K // 16) + block[None, :]
    b_scales_at = b_scales + b_rows[:, None] * (K // 16) + block[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(K // DEPTH):
        half = step * (DEPTH // 2)
        sixteenth = step * (DEPTH // 16)
        total = tl.dot_scaled(
            tl.load(a_at + half),
            tl.load(a_scales_at + sixteenth),
            "e2m1",
            tl.load(b_at + half).T,
            tl.load(b_scales_at + sixteenth),
            "e2m1",
            total,
        )
    at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(at, (total * tl.load(unit)).to(out.dtype.element_ty), mask=inside)
