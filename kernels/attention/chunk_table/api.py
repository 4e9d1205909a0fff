"""The function that users call."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Bool, Float
from longlive_kernels.attention.chunk_table import cudnn, mosaic, reference, xla
from longlive_kernels.attention.chunk_table.table import Rows, Table

# The default is the first that supports a call; what follows the reference, which supports every
# call, is opt-in.
BACKENDS = {"cudnn": cudnn, "xla": xla, "reference": reference, "mosaic": mosaic}


def chunk_table(
    q: Float[Array, "b n a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    table: Table | Rows | Bool[np.ndarray, "fq fk"],
    *,
    implementation: str | None = None,
) -> Float[Array, "b n a d"]:
    """Computes softmax(q kᵀ / √d) v under a static table over latent frames, softmax in float32.

    Args:
      q: Queries of fq latent frames, n / fq tokens each.
      k: Keys of fk latent frames, m / fk tokens each.
      v: Values of the same frames.
      table: Which key frame (column) each query frame (row) sees.
      implementation: A name in `BACKENDS`; None picks the first that supports the call.

    Returns:
      The output, zeros for queries that see no key, whose gradients are zeros, too.

    Raises:
      ValueError: Tokens do not divide over frames.
      NotImplementedError: The named backend cannot run the call.
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
