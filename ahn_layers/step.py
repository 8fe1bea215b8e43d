"""A decode step in two kernels, where they serve it."""

from jaxtyping import Float, Int
from torch import Tensor

from .arrivals import Arrivals
from .compressor import Compressor
from .eviction import FOLDED, LEFT_OUT, RANK, RIDES, Eviction
from .ops.decode.forms import fits_step
from .ops.decode.kept import KeptSlots
from .ops.decode.rule import StepRule
from .ops.decode.step import decode_step
from .positions import Positions
from .state import MemoryState
from .tokens import Later, Tokens, per_head

_NAMES = {f"gates.{RIDES}priority": "priority", f"gates.{RANK}": "rank", f"gates.{LEFT_OUT}": "left_out"}
"""What the kernel calls tensors that ``keep_best`` keeps."""


def kernel_step(
    new: Arrivals, state: MemoryState, compressor: Compressor | None, eviction: Eviction, positions: Positions
) -> Float[Tensor, "b h 1 e"] | None:
    """One new token in every row of a state whose slots are all allocated; the state is changed in place.

    What the equations of ``MemoryStore`` say for such a call.

    Returns:
        The attention output; None, and nothing has changed, if the kernels do not serve this call.
    """
    if len(new) > 1 or new.valid is not None or len(state.slots) < state.window.capacity or not state.held.overwritten:
        return None
    q, x, attention, arriving = new.q, new.x, new.attention, new.tokens
    memory, window, slots = state.memory, state.window, state.slots
    folds_all = eviction.folds_all
    if not attention.is_plain or (compressor is None and folds_all):
        return None
    if compressor is not None and not (compressor.rule_holds and isinstance(memory, Tensor)):
        return None
    ours = {name for name in slots.gates if not name.startswith(RIDES)}
    gates = {name: u for name, u in slots.gates.items() if name in ours}
    if not fits_step(q, [slots.k, slots.v, *gates.values()], memory, state.kept):
        return None
    rule = StepRule() if compressor is None else compressor.rule(x)  # type: ignore[arg-type]
    if rule is None:
        return None
    length, rank = None if state.length is None else state.length + 1, state.seen.unsqueeze(1)
    kept = None
    if not folds_all:
        kept = _kept_slots(arriving, x, state, eviction, rank, positions)
        if kept is None:
            return None
    assert not isinstance(memory, dict)
    asking = key = None
    if positions.hidden and compressor is not None:
        asking = positions.for_memory(q, rank)
        if kept is None:  # else it is known in the kernel only
            key = positions.for_memory(slots.take(window.slot(rank)).k, rank - window.window_size)
    token = (arriving.k, arriving.v, {name: arriving.gates[name] for name in gates})
    out, reading = decode_step(
        q, token, (slots.k, slots.v, gates), state.seen, memory, rule, num_sinks=window.num_sinks,
        scale=attention.scale, asking=asking, key=key, kept=kept,
        q_sinks=positions.facing_sinks(q, lambda: rank, length),
    )  # fmt: skip
    state.length = length
    if rule.matrix is None and compressor is not None:
        left = (state.seen > window.capacity).unsqueeze(1)
        reads = left if kept is None else state.kept[FOLDED].unsqueeze(2)
        out = out + compressor.output(reading, x).masked_fill(~per_head(reads, out), 0).to(out.dtype)  # type: ignore[arg-type]
    return out


def _kept_slots(
    new: Tokens, x: Float[Tensor, "b 1 n"] | None, state: MemoryState, eviction: Eviction, rank: Int[Tensor, "b 1"],
    positions: Positions,
) -> KeptSlots | None:  # fmt: skip
    """What an eviction keeps, for the kernel; None if it does not decide by a contest."""
    window, held = state.window, state.kept
    slot = window.slot(rank)
    contest = eviction.contest(Later(lambda: state.slots.take(slot)))
    if contest is None or held["k"].shape[2] == 0:
        return None
    named = {_NAMES.get(name, name.removeprefix("gates.")): u for name, u in held.items()}
    scores = new_score = None
    if contest.score is not None:
        named["score"], scores = named.pop(contest.score), state.slots.gates[contest.score]
        new_score = new.gates[contest.score]
    if any(name.startswith(RIDES) for name in named):
        return None  # something else rides beside the tokens
    rotary = positions.rotary
    inv_freq, start, interleaved = None, 0, False
    if rotary is not None:
        inv_freq, start, interleaved = rotary.inv_freq, rotary.start, rotary.interleaved
    return KeptSlots(named, contest, scores, new_score, x, inv_freq, start, interleaved, positions.hidden)
