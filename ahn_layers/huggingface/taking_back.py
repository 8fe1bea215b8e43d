"""Takes tokens back out of a cache layer: while none has left the window, or if the latest were recorded."""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from ..state import MemoryState
from ..without import without
from .padding import Padding
from .recording import MAX_ROLLBACK, Recording


def cropped(
    state: MemoryState, padding: Padding | None, recording: Recording | None, length: int, keep: int
) -> MemoryState | None:
    """The state of the first ``keep`` of ``length`` columns, None if all columns were recorded and none is left.

    Raises:
        RuntimeError: if tokens were folded that are not recorded.
    """
    if recording is not None and length - keep <= len(recording):
        return recording.first(len(recording) - (length - keep)).replayed()
    if not bool((state.seen <= state.window.capacity).all()):
        raise RuntimeError(
            f"crop({keep - length}): {0 if recording is None else len(recording)} tokens are recorded and older "
            "ones are folded into the memory, which cannot be undone. Call cache.activate_past_recording() before "
            f"the tokens to be taken back (at most {MAX_ROLLBACK}), or clone the cache and go back to the clone."
        )
    real = real_columns(state, padding, length)
    columns = torch.arange(length, device=real.device) >= keep
    shorter = without(state, _by_rank(real, columns & real))
    slots = shorter.slots if state.padded else shorter.slots.columns(0, keep)
    return replace(shorter, slots=slots, length=keep, padded=state.padded)


def without_columns(
    state: MemoryState, padding: Padding | None, recording: Recording | None, columns: Bool[Tensor, "b c"]
) -> tuple[MemoryState, Recording | None]:
    """The state and the recording as if some columns had been padding."""
    real = real_columns(state, padding, columns.shape[1])
    if recording is not None and are_recorded(recording, columns):
        recording = recording.with_valid((real & ~columns)[:, -len(recording) :])
        replayed = recording.replayed()
        assert replayed is not None
        return replayed, recording
    return without(state, _by_rank(real, columns)), None


def real_columns(state: MemoryState, padding: Padding | None, length: int) -> Bool[Tensor, "b {length}"]:
    """True at the columns that were taken in as real tokens."""
    return (padding or Padding.none(state.batch_size)).real(length, state.seen.device)


def are_recorded(recording: Recording | None, columns: Bool[Tensor, "b c"]) -> bool:
    """Whether all of these columns are recorded."""
    recorded = 0 if recording is None else len(recording)
    return recorded > 0 and not bool(columns[:, : columns.shape[1] - recorded].any())


def _by_rank(real: Bool[Tensor, "b c"], columns: Bool[Tensor, "b c"]) -> Bool[Tensor, "b c"]:
    """Marks on columns of a text as marks on the ranks of its real tokens."""
    rank = (real.cumsum(dim=1) - 1).clamp(min=0)
    marks = torch.zeros_like(rank)
    return marks.scatter_add_(1, rank, (columns & real).long()) > 0
