"""Cache layers that hold a memory state.

The attention function does all the work: ``update`` hands keys and values through unchanged.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..memory import MemoryStore
from ..state import MemoryState

MAX_ROLLBACK = 256
"""Most recent tokens that ``MemoryLayer.crop`` can take back while the past is recorded (assisted decoding)."""


class MemoryLayer(CacheLayerMixin):
    """The cache of one retrofitted layer: a [`MemoryState`][ahn_layers.MemoryState] that grows up to the window."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self.state: MemoryState | None = None
        self.armed = False
        self.record_past = False
        self._checkpoint: MemoryState | None = None
        self._since: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._store: MemoryStore | None = None

    def run(self, store: MemoryStore, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Tensor:
        """Attend with new tokens and take them in."""
        count = k.shape[2]
        capacity = store.window.capacity
        if self.record_past and count > MAX_ROLLBACK and self.get_seq_length() + count > capacity:
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
        before = self.state
        if before is not None:
            before.inplace = not self.record_past
        out, self.state = store(q, k, v, x, before, valid=valid, **options)
        if self.record_past:
            self._record(store, before, (k, v, x, valid))
        elif self._since:
            self._forget()
        return out

    def _record(self, store: MemoryStore, before: MemoryState | None, tokens: Any) -> None:
        if not self._since:
            self._checkpoint, self._store = before, store
        self._since.append(tokens)
        while sum(k.shape[2] for k, *_ in self._since[1:]) >= MAX_ROLLBACK:
            self._checkpoint = self._replay(self._checkpoint, self._since.pop(0))

    def _replay(self, state: MemoryState | None, tokens: Any) -> MemoryState:
        """Take tokens in again, from an earlier state; what they attend to does not matter."""
        assert self._store is not None
        k, v, x, valid = tokens
        heads = k.shape[1] if self._store.compressor is None else self._store.compressor.num_heads
        q = k.new_zeros(k.shape[0], heads, *k.shape[2:])
        after: MemoryState = self._store(q, k, v, x, state, valid=valid)[1]
        return after

    def _forget(self) -> None:
        self._checkpoint, self._since, self._store = None, [], None

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
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)
        state = self.state
        if removed == 0 or state is None:
            return self._forget()
        recorded = sum(k.shape[2] for k, *_ in self._since)
        if removed <= recorded:
            state = self._checkpoint
            keep = recorded - removed
            for k, v, x, valid in self._since:
                part = slice(0, keep)
                if keep > 0:
                    valid = None if valid is None else valid[:, part]
                    state = self._replay(state, (k[:, :, part], v[:, :, part], x[:, part], valid))
                keep -= k.shape[2]
            self.state = state
            return self._forget()
        length = state.uniform
        if length is None or length > state.window.capacity:
            raise RuntimeError(
                f"crop({tokens_to_remove}): {recorded} tokens are recorded and older ones are folded into the memory, "
                "which cannot be undone. Call cache.activate_past_recording() before the tokens to be taken back "
                f"(at most {MAX_ROLLBACK}), or clone the cache and go back to the clone."
            )
        keep = max(0, length - removed)
        state = state.clone()
        state.slots, state.seen, state.length = state.slots.columns(0, keep), torch.full_like(state.seen, keep), keep
        self.state = state
        return self._forget()

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
        self.state = None
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search."""
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)
            self._forget()

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


class StaticMemoryLayer(MemoryLayer):
    """A memory layer with every slot allocated and fixed addresses, for compiled decoding.

    The text may grow past ``max_cache_len``: only the window and the state are held.

    Args:
        max_cache_len: what the rest of the model's cache is told.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.padding = torch.zeros(0, dtype=torch.long)  # columns of each row that were none of its tokens
        self._known: tuple[int, bool] | None = (0, False)

    def run(self, store: MemoryStore, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Tensor:
        """Attend with new tokens and take them in, in place."""
        if self.state is None:
            self._allocate(store, k, v, x)
        assert self.state is not None
        if k.shape[2] == 1 and not torch.is_grad_enabled():
            out, _ = store(q, k, v, x, self.state, **options)
            self._known = None
        else:
            before = self.state
            if self._known is not None and not torch.compiler.is_compiling():
                before = replace(before, length=self._known[0], padded=self._known[1])
            out, after = store(q, k, v, x, before, **options)
            with torch.no_grad():
                self.state.copy_(after)
            self._known = None if after.length is None else (after.length, after.padded)
        self.state.length, self.state.padded = None, True  # lengths live on the device, while decoding only there
        if options.get("valid") is not None:
            self.padding.add_((~options["valid"]).sum(dim=1))
        return out

    def _allocate(self, store: MemoryStore, k: Tensor, v: Tensor, x: Tensor) -> None:
        with torch.no_grad():
            tokens = store.arrive(k[:, :, :1], v[:, :, :1], x[:, :1])
            self.state = store.init_state(tokens, full=True)
            self.state.inplace = True
            self._empty = self.state.clone().memory, self.state.clone().kept
        self.padding = torch.zeros_like(self.state.seen)
        if not torch.compiler.is_compiling():
            for u in (*self.state.tensors().values(), self.padding):
                torch._dynamo.mark_static_address(u, guard=False)  # another cache, the same code

    def get_seq_length(self) -> Any:
        """Tokens seen, as a tensor, so that compiled code does not depend on the number."""
        return 0 if self.state is None else self.state.seen[0] + self.padding[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What a static full-attention layer says."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """What a static full-attention layer says."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Static caches are not cropped.

        Raises:
            RuntimeError: always, unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise RuntimeError(f"crop({tokens_to_remove}): a static memory cannot be cropped, use a dynamic cache.")

    def reset(self) -> None:
        """Forget everything, keeping the tensors."""
        if self.state is not None:
            empty = self.state.clone()
            empty.slots, empty.seen = empty.slots.map(torch.zeros_like), torch.zeros_like(empty.seen)
            (empty.memory, empty.kept), empty.length, empty.padded = self._empty, 0, False
            self.state.copy_(empty)
            self.state.length, self.state.padded = None, True
        self._known = (0, False)
        self.padding.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search, in place."""
        if self.state is not None:
            self.state.copy_(self.state.reorder(beam_idx))
            self.padding.copy_(self.padding.index_select(0, beam_idx.to(self.padding.device)))


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
