"""cuDNN's attention for tables in which every query sees every key: prompts, and bidirectional
models.
"""

from __future__ import annotations

from jaxtyping import Array, Float
from longlive_kernels.attention import cudnn as library
from longlive_kernels.attention.chunk_table.table import Table


def unsupported(q: Array, k: Array, v: Array, table: Table, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    elsewhere = library.unsupported(q, sm=sm)
    if elsewhere is not None:
        return elsewhere
    if not table.array.all():
        return "takes tables in which every query sees every key"
    kinds = {x.dtype.name for x in (q, k, v)}
    if len(kinds) > 1:
        return f"takes q, k and v of one type, not {tuple(sorted(kinds))}"
    return None


def attend(
    q: Float[Array, "b n a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    table: Table,
    *,
    implementation: str = "cudnn",
) -> Float[Array, "b n a d"]:
    """See `api.chunk_table`. implementation: of JAX's function; "xla" runs everywhere."""
    del table  # full
    return library.attend(q, k, v, implementation=implementation)
