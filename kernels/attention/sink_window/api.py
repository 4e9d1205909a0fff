"""The function that users call."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int
from longlive_kernels.attention.sink_window import cudnn, mosaic, reference, tokamax, xla
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.attention.sink_window.kept import Fresh, Kept

# The best first; but before what has not run on a device comes what has.
BACKENDS = {
    "xla": xla,
    "reference": reference,
    "mosaic": mosaic,
    "tokamax": tokamax,
    "cudnn": cudnn,
}


def sink_window(
    q: Float[Array, "b n a d"],
    k: Kept,
    v: Kept,
    visible: Bool[Array, "b f slots"],
    *,
    layer: Int[Array, ""] | None = None,
    read: Float[Array, "b slots p"] | None = None,
    fresh: Fresh | None = None,
    implementation: str | None = None,
) -> Float[Array, "b n a d"]:
    """softmax(q kᵀ / √d) v over the tokens of slots, the softmax in float32.

    q: of f latent frames, of n / f tokens each. k, v: of a slot table [b slots s a d], as an array
    or in fewer bits (`kept`); or of all layers [layers b slots s a d], of which `layer` is read.
    visible: which slot each frame attends. read: phases of slots, by which the first p pairs of
    neighbouring channels of their keys are turned as they are read (relative positions in time);
    None where keys lie as they are attended. fresh: frames that are attended in the place of what
    their slots hold. implementation: a name in `BACKENDS`; None picks the best that supports the
    call.

    Slots that nobody sees may hold anything finite. Queries that see no slot come out as zeros.
    It has a gradient by all of them: `mosaic` that of `xla`, the libraries their own (tokamax on
    Hopper alone).

    Raises ValueError where shapes do not fit, NotImplementedError where the named backend cannot
    run the call.
    """
    call = Call(q, k, v, visible, layer, read, fresh).check()
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
