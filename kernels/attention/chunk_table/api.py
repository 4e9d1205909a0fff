"""The function that users call."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Bool, Float
from longlive_kernels.attention.chunk_table import mosaic, reference, xla
from longlive_kernels.attention.chunk_table.table import Rows, Table

# The best first, and last what has not run on a device.
BACKENDS = {"xla": xla, "reference": reference, "mosaic": mosaic}


def chunk_table(
    q: Float[Array, "b n a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    table: Table | Rows | Bool[np.ndarray, "fq fk"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b n a d"]:
    """softmax(q kᵀ / √d) v under a static table over latent frames, the softmax in float32.

    table: rows query, columns key. Every frame has as many tokens: n / fq of queries, m / fk of
    keys. Queries that see no key come out as zeros, and so do their gradients. implementation: a
    name in `BACKENDS`; None picks the best that supports the call.

    Raises ValueError where tokens do not divide over frames, NotImplementedError where the named
    backend cannot run the call.
    """
    table = Table.of(table)
    for name, x, frames in zip(("queries", "keys"), (q, k), table.shape, strict=True):
        if x.shape[1] % frames:
            raise ValueError(f"{x.shape[1]} {name} do not divide over {frames} latent frames")
    return _backend(implementation, q, k, v, table).attend(q, k, v, table)


def _backend(name: str | None, q: Array, k: Array, v: Array, table: Table):
    if name is None:
        return next(x for x in BACKENDS.values() if x.unsupported(q, k, v, table) is None)
    if name not in BACKENDS:
        raise NotImplementedError(f"no backend {name!r}: there are {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unsupported(q, k, v, table)
    if reason is not None:
        raise NotImplementedError(f"{name} {reason}")
    return BACKENDS[name]
