"""Keeps the last tokens that a cache layer took in, so that they can be taken back (assisted decoding)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from ..memory import MemoryStore
from ..state import MemoryState, outside_inference

MAX_ROLLBACK = 256
"""Most recent tokens that can be taken back while the past is recorded."""


@dataclass(frozen=True, eq=False)
class Taken:
    """What one call took in: ``(B, G, T, D)``, ``(B, G, T, E)``, ``(B, T, N)``, ``(B, T)`` or None."""

    k: Tensor
    v: Tensor
    x: Tensor
    valid: Tensor | None

    def columns(self, start: int, stop: int) -> "Taken":
        """Some of the columns."""
        valid = None if self.valid is None else self.valid[:, start:stop]
        return Taken(self.k[:, :, start:stop], self.v[:, :, start:stop], self.x[:, start:stop], valid)

    def __len__(self) -> int:
        """How many columns there are."""
        return self.k.shape[2]


class Recording:
    """The state before the recorded calls, and what they took in since.

    Calls that lie further back than ``MAX_ROLLBACK`` tokens are taken into the state for good.
    """

    def __init__(self, store: MemoryStore, state: MemoryState | None, calls: tuple[Taken, ...] = ()) -> None:
        self.store, self.state, self.calls = store, state, calls

    def __len__(self) -> int:
        """Recorded columns."""
        return sum(len(call) for call in self.calls)

    def with_call(self, taken: Taken) -> "Recording":
        """The recording after one more call; this one stays as it is."""
        state, calls = self.state, (*self.calls, taken)
        while sum(len(call) for call in calls[1:]) >= MAX_ROLLBACK:
            state, calls = self._take_in(state, calls[0]), calls[1:]
        return Recording(self.store, state, calls)

    def first(self, count: int) -> "Recording":
        """The recording of the first ``count`` columns alone."""
        calls = []
        for call in self.calls:
            if count > 0:
                calls.append(call.columns(0, count))
            count -= len(call)
        return Recording(self.store, self.state, tuple(calls))

    def with_valid(self, real: Bool[Tensor, "b r"]) -> "Recording":
        """The recording with another account of which of its columns are real tokens."""
        ends = torch.tensor([len(call) for call in self.calls]).cumsum(dim=0).tolist()
        calls = [
            replace(call, valid=real[:, end - len(call) : end]) for call, end in zip(self.calls, ends, strict=True)
        ]
        return Recording(self.store, self.state, tuple(calls))

    def replayed(self) -> MemoryState | None:
        """The state after all calls, computed anew."""
        state = self.state
        for call in self.calls:
            state = self._take_in(state, call)
        return state

    def _take_in(self, state: MemoryState | None, taken: Taken) -> MemoryState:
        """Take tokens in, from an earlier state; what they attend to does not matter."""
        k, v, x = (outside_inference(u) for u in (taken.k, taken.v, taken.x))
        state = None if state is None else state.outside_inference()
        heads = k.shape[1] if self.store.compressor is None else self.store.compressor.num_heads
        q = k.new_zeros(k.shape[0], heads, *k.shape[2:])
        after = self.store(q, k, v, x, state, valid=taken.valid)[1]
        return after
