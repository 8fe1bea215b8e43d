"""A decode step in a few kernels, where they serve it."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from .compressor import Compressor
from .ops.decode import attend_and_fold, exchange, fits_step, slot_attention
from .state import MemoryState
from .tokens import Tokens

if TYPE_CHECKING:
    from .memory import MemoryStore


def kernel_step(
    store: "MemoryStore",
    q: Float[Tensor, "b h 1 d"],
    new: Tokens,
    x: Float[Tensor, "b 1 n"] | None,
    state: MemoryState,
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Tensor, "b h 1 e"] | None:
    """One new token in every row of a state whose slots are all allocated; the state is changed in place.

    The same as ``MemoryStore._step``.

    Args:
        store: the store.
        q: queries.
        new: the token.
        x: hidden states of the token.
        state: the state.
        scale: logit factor.
        softcap: see ``MemoryStore.forward``.

    Returns:
        The attention output; None, and nothing has changed, if the kernels do not serve this call.
    """
    memory, compressor, window = state.memory, store.compressor, store.window
    if softcap is not None or not fits_step(q, state.slots.tensors, memory):
        return None
    if memory is not None and (compressor is None or type(compressor).rule is Compressor.rule):
        return None
    length = None if state.length is None else state.length + 1
    q_sinks = store._sink_queries(q, state.seen.unsqueeze(1), length)
    key, value, *gates = exchange(state.slots.tensors, new.tensors, state.seen, window.num_sinks)
    state.length = length
    options = {"scale": scale, "q_sinks": q_sinks, "num_sinks": window.num_sinks}
    k, v, seen = state.slots.k, state.slots.v, state.seen
    if memory is None:
        return slot_attention(q, k, v, seen, full=False, **options)  # type: ignore[arg-type]
    assert compressor is not None and x is not None and isinstance(memory, Tensor)
    asking, key = store._memory_side(q, seen.unsqueeze(1) - 1, key)
    rule = compressor.rule(dict(zip(new.gates, (u.squeeze(2) for u in gates), strict=True)), x)
    assert rule is not None
    out, reading = attend_and_fold(q, k, v, seen, memory, asking, key, value, rule, **options)  # type: ignore[arg-type]
    if rule.matrix is None:
        left = (seen > window.capacity).view(-1, 1, 1, 1)
        out = out + compressor.output(reading, x).masked_fill(~left, 0).to(out.dtype)
    return out
