"""A cache layer of transformers that holds a memory state: sizes, positions, rows."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..state import MemoryState
from .padding import Padding
from .recording import Recording


class StateLayer(CacheLayerMixin):
    """What transformers asks of the layers of a cache, answered from a [`MemoryState`][ahn_layers.MemoryState].

    Attributes:
        state: the tokens, None before the first.
        padding: which columns were padding, None if none was.
        overwritten: whether the running call has written into the tensors that were there before it.
        edits: how often tokens or rows have been taken out or in, so that nothing undoes that.
        made_with: the identity of the memory weights that made it, empty if it is not known.
        broken: whether a call broke off in the middle of the cache, so that it cannot be used any further.
        recording: the latest calls, None unless the past is recorded.
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

    def refuse_broken(self) -> None:
        """Raise a RuntimeError if the layer cannot be used any further."""
        if self.broken:
            raise RuntimeError(
                "this cache is unusable: a call was interrupted after some of its layers had overwritten tokens that "
                "left the window. Begin a new cache, call cache.reset(), or go back to a clone."
            )

    def edited(self, state: MemoryState | None, padding: Padding | None) -> None:
        """Go on with another state and padding: tokens or rows were taken out or in, which nothing undoes."""
        self.edits += 1
        self.state, self.padding, self.recording = state, padding, None

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
            self.edited(self.state.reorder(beam_idx), self._padding_of(beam_idx))

    def _padding_of(self, rows: Tensor) -> Padding | None:
        return None if self.padding is None else self.padding.reorder(rows.tolist())

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
