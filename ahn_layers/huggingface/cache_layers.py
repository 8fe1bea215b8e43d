"""Cache layers that hold a memory state.

The attention function does all the work: ``update`` hands keys and values through unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..compressor import State
from ..memory import MemoryStore
from ..state import MemoryState
from .padding import Padding
from .recording import MAX_ROLLBACK, Recording, Taken

_LARGE = 1 << 22
"""Bytes of a state that are not kept a second time while a call runs."""


class _Prefix(NamedTuple):
    """A state as the beginning of a longer one, from which nothing has left."""

    length: int
    memory: State | None
    kept: dict[str, Tensor]

    def of(self, longer: MemoryState) -> MemoryState:
        """The state."""
        seen = torch.full_like(longer.seen, self.length)
        slots = longer.slots.columns(0, self.length)
        return replace(longer, slots=slots, seen=seen, length=self.length, memory=self.memory, kept=self.kept)


class MemoryLayer(CacheLayerMixin):
    """The cache of one retrofitted layer: a [`MemoryState`][ahn_layers.MemoryState] that grows up to the window.

    Attributes:
        state: the tokens, None before the first.
        padding: which columns were padding, None if none was.
        overwritten: whether the running call has written into the tensors that were there before it.
        edits: how often tokens or rows have been taken out, so that nothing undoes that.
        made_with: the identity of the memory weights that made it, empty if it is not known.
        broken: whether a call broke off in the middle of the cache, so that it cannot be used any further.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self.state: MemoryState | None = None
        self.armed = False
        self.record_past = False
        self.padding: Padding | None = None
        self.overwritten = False
        self.edits = 0
        self.made_with = ""
        self.broken = False
        self.recording: Recording | None = None

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
        before = self._changeable()
        if before is not None:
            before.inplace = not self.record_past
        writes = before is not None and before.held.overwritten and len(before.slots) == store.window.capacity
        with self._overwriting(writes):
            out, self.state = store(q, k, v, x, before, valid=valid, **options)
        self.state.inplace = False  # another caller that continues it must not change it
        if self.record_past:
            recording = self.recording or Recording(store, before)
            self.recording = recording.with_call(Taken(k, v, x, valid))
        else:
            self.recording = None
        return out

    @contextmanager
    def _overwriting(self, writes: bool) -> Iterator[None]:
        """Notes that the tensors of the state are no longer what they were, once the store has written to them.

        A store raises errors before it writes; an interruption may come in between.
        """
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.overwritten |= writes
            raise
        self.overwritten |= writes

    def refuse_broken(self) -> None:
        """Raise a RuntimeError if the layer cannot be used any further."""
        if self.broken:
            raise RuntimeError(
                "this cache is unusable: a call was interrupted after some of its layers had overwritten tokens that "
                "left the window. Begin a new cache, call cache.reset(), or go back to a clone."
            )

    def _changeable(self) -> MemoryState | None:
        """The state, copied if it was made under ``torch.inference_mode`` and is to be changed outside of it."""
        if self.state is not None and self.state.seen.is_inference() and not torch.is_inference_mode_enabled():
            self.state = self.state.clone()
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
        recording, self.recording = self.recording, None
        if keep == length or self.state is None:
            return
        self.edits += 1
        real = self._real(length)
        if recording is not None and length - keep <= len(recording):
            self.state = recording.first(len(recording) - (length - keep)).replayed()
        elif bool((self.state.seen <= self.state.window.capacity).all()):
            columns = torch.arange(length, device=real.device) >= keep
            state = self.state.without(_by_rank(real, columns & real))
            padded = self.state.padded
            slots = state.slots if padded else state.slots.columns(0, keep)
            self.state = replace(state, slots=slots, length=keep, padded=padded)
        else:
            self.recording = recording
            raise RuntimeError(
                f"crop({tokens_to_remove}): {0 if recording is None else len(recording)} tokens are recorded and older "
                "ones are folded into the memory, which cannot be undone. Call cache.activate_past_recording() before "
                f"the tokens to be taken back (at most {MAX_ROLLBACK}), or clone the cache and go back to the clone."
            )
        self.padding = None if self.padding is None else self.padding.cropped(keep)

    def _real(self, length: int) -> Bool[Tensor, "b {length}"]:
        """True at the columns that were taken in as real tokens."""
        assert self.state is not None
        padding = self.padding or Padding.none(self.state.batch_size)
        return padding.real(length, self.state.seen.device)

    def can_take_back(self, columns: Bool[Tensor, "b c"]) -> Bool[Tensor, " b"]:
        """For each row, whether these columns can be taken back: nothing has left its window, or all are recorded.

        Args:
            columns: True at columns of the text that are to be taken back, for all columns so far.
        """
        assert self.state is not None
        if self._holds(columns):
            return torch.ones_like(self.state.seen, dtype=torch.bool)
        return self.state.seen <= self.state.window.capacity

    def _holds(self, columns: Bool[Tensor, "b c"]) -> bool:
        """Whether all of these columns are recorded."""
        recorded = 0 if self.recording is None else len(self.recording)
        return recorded > 0 and not bool(columns[:, : columns.shape[1] - recorded].any())

    def take_back(self, columns: Bool[Tensor, "b c"]) -> None:
        """Forget tokens, as if they had been padding.

        Args:
            columns: True at the columns that are to be forgotten, which ``can_take_back`` allows.
        """
        assert self.state is not None
        real = self._real(columns.shape[1])
        if self.recording is not None and self._holds(columns):
            self.recording = self.recording.with_valid((real & ~columns)[:, -len(self.recording) :])
            self.state = self.recording.replayed()
        else:
            self._put(self.state.without(_by_rank(real, columns)), columns)
            self.recording = None
        self.padding = Padding.none(len(real)).extended(real & ~columns, 0)

    def _put(self, state: MemoryState, columns: Bool[Tensor, "b c"]) -> None:
        """Take over a state in which these columns are padding."""
        self.state = state

    def snapshot(self) -> dict[str, Any]:
        """What ``restore`` needs to undo the calls to come, unless they write into tensors that are there now.

        A large window that grows is not held on to, which would take its memory twice: the tokens of a longer one begin
        with the same. Only a call that fills it up cannot be undone then.
        """
        self.overwritten = False
        saved, state = dict(vars(self)), self.state
        if type(self) is not MemoryLayer or state is None or self.recording is not None or state.nbytes <= _LARGE:
            return saved
        if state.uniform is not None and state.uniform < state.window.capacity:
            saved["state"] = _Prefix(state.uniform, state.memory, state.kept)
        return saved

    def restore(self, before: dict[str, Any]) -> bool:
        """Go back to a snapshot.

        Returns:
            Whether that was possible.
        """
        if self.edits != before["edits"]:
            return self.state is None
        if self.overwritten:
            return False
        if isinstance(before["state"], _Prefix):
            assert self.state is not None
            if self.state.uniform is None or self.state.uniform > self.state.window.capacity:
                return False
            before = before | {"state": before["state"].of(self.state)}
        self.__dict__.clear()
        self.__dict__.update(before)
        return True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values, unchanged: the attention function stores them."""
        if not self.armed:
            raise ValueError(
                "this cache was filled by the bounded memory and reached a layer that runs full attention: the tokens "
                "that left the window are not there. Begin a new cache inside full_attention(model) or after restore."
            )
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first tokens say what is needed."""

    @property
    def is_initialized(self) -> bool:
        """Whether tokens have arrived."""
        return self.state is not None

    @property
    def keys(self) -> Tensor | None:
        """Resident keys by slot, None before the first token."""
        return None if self.state is None else self.state.slots.k

    @property
    def values(self) -> Tensor | None:
        """Resident values by slot, None before the first token."""
        return None if self.state is None else self.state.slots.v

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        if self.state is None:
            raise AttributeError("batch_size is known once tokens have arrived")
        return self.state.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes held: window, gates, memory."""
        return 0 if self.state is None else self.state.nbytes

    def get_seq_length(self) -> Any:
        """Tokens seen, padding included; not the resident ones: positions go on from here."""
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What a full-attention layer says, so that other layers of the model get right masks."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.edits += 1
        self.state, self.padding, self.broken, self.made_with, self.overwritten = None, None, False, "", False
        self.recording = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search."""
        if self.state is not None:
            self.edits += 1
            self.state = self.state.reorder(beam_idx)
            self._reorder_padding(beam_idx)
            self.recording = None

    def _reorder_padding(self, rows: Tensor) -> None:
        if self.padding is not None:
            self.padding = self.padding.reorder(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.seen.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.seen.device)
            self.reorder_cache(rows[indices])


class LayerCache:
    """One layer in place of a whole cache, whatever the index it is asked for.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: MemoryLayer) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See ``MemoryLayer.update``."""
        return self.layer.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """See ``MemoryLayer.get_seq_length``."""
        return self.layer.get_seq_length()


def _by_rank(real: Bool[Tensor, "b c"], columns: Bool[Tensor, "b c"]) -> Bool[Tensor, "b c"]:
    """Marks on columns of a text as marks on the ranks of its real tokens."""
    rank = (real.cumsum(dim=1) - 1).clamp(min=0)
    marks = torch.zeros_like(rank)
    return marks.scatter_add_(1, rank, (columns & real).long()) > 0
