"""Cache layers that hold a memory state.

The attention function does all the work: ``update`` hands keys and values through unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..memory import MemoryStore
from ..state import MemoryState
from .padding import Padding
from .recording import MAX_ROLLBACK, Recording, Taken
from .state_layer import StateLayer
from .taking_back import are_recorded, cropped, real_columns, without_columns


class MemoryLayer(StateLayer):
    """The cache of one retrofitted layer: a [`MemoryState`][ahn_layers.MemoryState] that grows up to the window."""

    grows = True
    """Whether new tensors take the place of the old ones until the window is full."""

    @property
    def is_empty(self) -> bool:
        """Whether no token has arrived."""
        return self.state is None

    def run(self, store: MemoryStore, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Tensor:
        """Attend with new tokens and take them in.

        Raises:
            RuntimeError: if an earlier call broke off and left the cache unusable.
        """
        self.refuse_broken()
        count = k.shape[2]
        capacity = store.window.capacity
        how = options.get("attention")
        whole = how is not None and how.ahead is not None  # queries see tokens that come later
        if not whole and self.record_past and count > MAX_ROLLBACK and self.get_seq_length() + count > capacity:
            # all but the tail is folded for good, so that recording a long prompt stays within bounds
            valid, head = options.pop("valid"), count - MAX_ROLLBACK
            parts = (slice(0, head), slice(head, count))
            outs = [
                self._run(
                    store, q[:, :, p], k[:, :, p], v[:, :, p], x[:, p],
                    valid=None if valid is None else valid[:, p], **options,
                )
                for p in parts
            ]  # fmt: skip
            return torch.cat(outs, dim=2)
        return self._run(store, q, k, v, x, **options)

    def _run(
        self, store: MemoryStore, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, valid: Tensor | None, **options: Any
    ) -> Tensor:
        before = self.changeable()
        if before is not None:
            before.inplace = not self.record_past
        writes = before is not None and before.held.overwritten and len(before.slots) == store.window.capacity
        with self.overwriting(writes):
            out, self.state = store(q, k, v, x, before, valid=valid, **options)
        self.state.inplace = False  # another caller that continues it must not change it
        if self.record_past:
            recording = self.recording or Recording(store, before)
            self.recording = recording.with_call(Taken(k, v, x, valid))
        else:
            self.recording = None
        return out

    @contextmanager
    def overwriting(self, writes: bool) -> Iterator[None]:
        """Notes that the tensors of the state are no longer what they were, once the store has written to them.

        A store refuses what it cannot do before it writes; in between, memory may run out or the call be interrupted.
        """
        keys = self.state.slots.k if writes and self.state is not None else None  # written before anything else
        stamp = _stamp(keys)
        try:
            yield
        except Exception as error:
            refused = isinstance(error, (TypeError, ValueError))
            self.overwritten |= writes and (_stamp(keys) != stamp if stamp is not None else not refused)
            raise
        except BaseException:
            self.overwritten |= writes
            raise
        self.overwritten |= writes

    def changeable(self) -> MemoryState | None:
        """The state, copied if it was made under ``torch.inference_mode`` and will be changed outside of it."""
        if self.state is not None:
            self.state = self.state.outside_inference()
        return self.state

    def activate_past_recording(self) -> None:
        """From now on keep what ``crop`` needs to take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: always while nothing has left the window, later only if the past was recorded.

        Args:
            tokens_to_remove: minus the number of tokens; a positive number is the length to keep, as in transformers
                before 5.20.

        Raises:
            RuntimeError: if tokens were folded that are not recorded.
        """
        length = 0 if self.state is None else int(self.get_seq_length())
        keep = max(0, length + tokens_to_remove) if tokens_to_remove <= 0 else min(length, tokens_to_remove)
        if keep < length and self.state is not None:
            state = cropped(self.state, self.padding, self.recording, length, keep)
            padding = self.padding if state is not None else None
            self.edited(state, None if padding is None else padding.cropped(keep))
        else:
            self.recording = None

    def can_take_back(self, columns: Bool[Tensor, "b c"]) -> Bool[Tensor, " b"]:
        """For each row, whether these columns can be taken back: nothing has left its window, or all are recorded."""
        assert self.state is not None
        if are_recorded(self.recording, columns):
            return torch.ones_like(self.state.seen, dtype=torch.bool)
        return self.state.seen <= self.state.window.capacity

    def take_back(self, columns: Bool[Tensor, "b c"]) -> None:
        """Forget these columns, which ``can_take_back`` allows, as if they had been padding."""
        assert self.state is not None
        real = real_columns(self.state, self.padding, columns.shape[1])
        before = (self.padding or Padding.none(len(real))).before
        state, self.recording = without_columns(self.state, self.padding, self.recording, columns)
        self._put(state, columns)
        self.padding = replace(Padding.none(len(real)).extended(real & ~columns, 0), before=before)

    def _put(self, state: MemoryState, columns: Bool[Tensor, "b c"]) -> None:
        """Take over a state in which these columns are padding."""
        self.state = state

    def align(self, length: int, padding: Padding | None) -> None:
        """After rows were put in: all rows end in this column, with this padding."""
        assert self.state is not None
        self.state = replace(self.state, length=length, padded=padding is not None, inplace=False)
        self.padding = padding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values, unchanged: the attention function stores them."""
        if not self.armed:
            raise ValueError(
                "this cache was filled by the bounded memory and reached a layer that runs full attention: the tokens "
                "that left the window are not there. Begin a new cache inside full_attention(model) or after restore."
            )
        return key_states, value_states


class LayerCache:
    """One layer in place of a whole cache, whatever the index it is asked for."""

    def __init__(self, layer: MemoryLayer) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See ``MemoryLayer.update``."""
        return self.layer.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """See ``MemoryLayer.get_seq_length``."""
        return self.layer.get_seq_length()


def _stamp(keys: Tensor | None) -> int | None:
    """A number that changes when a tensor is written to; None if there is none: our kernels do not tell."""
    return None if keys is None or keys.is_inference() or keys.is_cuda else keys._version
