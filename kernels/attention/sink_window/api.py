"""The function that users call."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int
from longlive_kernels.attention.sink_window import cudnn, mosaic, reference, tokamax, xla
from longlive_kernels.attention.sink_window.call import Call, Order
from longlive_kernels.attention.sink_window.kept import Fresh, Kept

# The default is the first that supports a call. cuDNN's attention is what the makers of JAX run on
# NVIDIA GPUs. What follows the reference, which supports every call, is opt-in.
BACKENDS = {
    "cudnn": cudnn,
    "xla": xla,
    "reference": reference,
    "mosaic": mosaic,
    "tokamax": tokamax,
}


def sink_window(
    q: Float[Array, "b n a d"],
    k: Kept,
    v: Kept,
    visible: Bool[Array, "b f_or_1 slots"],
    *,
    layer: Int[Array, ""] | None = None,
    read: Float[Array, "b slots p"] | None = None,
    fresh: Fresh | None = None,
    order: Order = "any",
    implementation: str | None = None,
) -> Float[Array, "b n a d"]:
    """Computes softmax(q kᵀ / √d) v over the tokens of slots, the softmax in float32.

    Slots that no query sees may hold anything finite. It has a gradient with every backend:
    `mosaic` has that of `xla`, the libraries have their own (tokamax on Hopper alone).

    Args:
      q: Queries of f latent frames, n / f tokens each.
      k: Keys of a slot table [b slots s a d], as an array or quantised (`kept`); or of all layers
        [layers b slots s a d], of which `layer` is read.
      v: Values, stored in the same way.
      visible: Which slots each query frame attends; one row where all frames attend the same.
      layer: The layer to read where `k` and `v` hold all of them.
      read: Phases of slots, by which the first p pairs of neighbouring channels of their keys are
        rotated as they are read (relative positions in time); None where keys are stored as they
        are attended.
      fresh: Frames that are attended in the place of what their slots hold.
      order: What is known of `visible` when the program is compiled (`call.Order`). It never
        changes the result of a call that keeps the promise; libraries copy less by it.
      implementation: A name in `BACKENDS`; None picks the first that supports the call.

    Returns:
      The output, zeros for queries that see no slot.

    Raises:
      ValueError: Shapes do not fit.
      NotImplementedError: The named backend cannot run the call.
    """
    call = Call(q, k, v, visible, layer, read, fresh, order).check()
    return _backend(implementation, call).attend(call)


def _backend(name: str | None, call: Call):
    if name is None:
        return next(x for x in BACKENDS.values() if x.unsupported(call) is None)
    if name not in BACKENDS:
        raise NotImplementedError(f"no backend {name!r}: there are {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unsupported(call)
    if reason is not None:
        raise NotImplementedError(f"{name} {reason}")
    return BACKENDS[name]
