"""A decode step in two kernels, where they serve it."""

from jaxtyping import Float
from torch import Tensor

from .compressor import Compressor
from .ops.attention.attend import SoftmaxAttention
from .ops.decode.step import decode_step, fits_step
from .positions import Positions
from .state import MemoryState
from .tokens import Tokens


def kernel_step(
    q: Float[Tensor, "b h 1 d"],
    new: Tokens,
    x: Float[Tensor, "b 1 n"] | None,
    state: MemoryState,
    compressor: Compressor | None,
    positions: Positions,
    attention: SoftmaxAttention,
) -> Float[Tensor, "b h 1 e"] | None:
    """One new token in every row of a state whose slots are all allocated; the state is changed in place.

    The same as ``MemoryStore.push`` for such a call.

    Args:
        q: queries.
        new: the token.
        x: hidden states of the token.
        state: the state.
        compressor: the long-term memory.
        positions: what sinks and memory are shown of positions.
        attention: how the base model attends.

    Returns:
        The attention output; None, and nothing has changed, if the kernels do not serve this call.
    """
    memory, window = state.memory, state.window
    if not attention.is_plain or compressor is None or not compressor.rule_holds:
        return None
    if not fits_step(q, state.slots.tensors, memory):
        return None
    assert x is not None and isinstance(memory, Tensor)
    rule = compressor.rule(x)
    assert rule is not None
    length, rank = None if state.length is None else state.length + 1, state.seen.unsqueeze(1)
    asking = key = None
    if positions.hidden:
        asking, key = positions.for_memory(q, rank, state.slots.take(window.slot(rank)).k)
    slots = state.slots
    out, reading = decode_step(
        q, (new.k, new.v, new.gates), (slots.k, slots.v, slots.gates), state.seen, memory, rule,
        num_sinks=window.num_sinks, scale=attention.scale, asking=asking, key=key,
        q_sinks=positions.facing_sinks(q, lambda: rank, length),
    )  # fmt: skip
    state.length = length
    if rule.matrix is None:
        left = (state.seen > window.capacity).view(-1, 1, 1, 1)
        out = out + compressor.output(reading, x).masked_fill(~left, 0).to(out.dtype)
    return out
