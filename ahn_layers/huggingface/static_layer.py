"""A cache layer with every slot allocated: fixed addresses, so that decoding can be compiled and recorded."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..autocast import as_autocast
from ..compressor import State, map_state
from ..memory import MemoryStore
from ..state import MemoryState
from .cache_layers import MemoryLayer
from .padding import Padding


class StaticMemoryLayer(MemoryLayer):
    """A memory layer with every slot allocated and fixed addresses, for compiled decoding.

    The text may grow past ``max_cache_len``: only the window and the state are held.

    Args:
        max_cache_len: what the rest of the model's cache is told.

    Attributes:
        growing: the layer in whose place this one stands for a while, None if it stands there for good.
    """

    is_compileable = True
    is_croppable = False
    grows = False

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.pads = torch.zeros(0, dtype=torch.long)  # columns of each row that were none of its tokens
        self._known: tuple[int, bool] | None = (0, False)
        self._empty_memory: State | None = None
        self._empty_kept: dict[str, Tensor] = {}
        self._joined = False
        self.growing: MemoryLayer | None = None

    @classmethod
    def of(cls, state: MemoryState, padding: Padding | None, made_with: str) -> "StaticMemoryLayer":
        """A layer that holds the rows of a state, which belongs to it from now on."""
        layer = cls(state.window.capacity)
        layer.pads = torch.zeros_like(state.seen)
        layer.state = replace(state, slots=state.slots.widened(state.window.capacity), inplace=True)
        layer._joined, layer.made_with = True, made_with
        assert state.length is not None
        layer.align(state.length, padding)
        layer._fix_addresses()
        return layer

    def align(self, length: int, padding: Padding | None) -> None:
        """After rows were put in: all rows end in this column, with this padding."""
        assert self.state is not None
        self.pads.copy_(length - self.state.seen)
        self.state.length, self.state.padded, self._known = None, True, None
        self.padding = padding

    @property
    def is_empty(self) -> bool:
        """Whether no token has arrived since it was made or reset."""
        return self.state is None or self._known == (0, False)

    def run(self, store: MemoryStore, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Tensor:
        """Attend with new tokens and take them in, in place."""
        if torch.compiler.is_compiling():
            return self._run_in_place(store, q, k, v, x, **options)
        self.refuse_broken()
        with self.overwriting(self.state is not None):
            return self._run_in_place(store, q, k, v, x, **options)

    def _run_in_place(self, store: MemoryStore, q: Tensor, k: Tensor, v: Tensor, x: Tensor, **options: Any) -> Tensor:
        if self.state is None:
            self._allocate(store, k, v, x)
        elif not torch.compiler.is_compiling():
            self.changeable()
        assert self.state is not None
        if k.shape[2] == 1 and not torch.is_grad_enabled():
            out, after = store(q, k, v, x, self.state, **options)
            if after is not self.state:  # the store was given a copy, by hooks that move arguments
                self.state.copy_(after)
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
            self.pads.add_((~options["valid"]).sum(dim=1))
        return out

    def changeable(self) -> MemoryState | None:
        """The state, copied if it was made under ``torch.inference_mode`` and will be changed outside of it."""
        if self.state is not None and self.state.seen.is_inference() and not torch.is_inference_mode_enabled():
            self.state, self.pads, self._empty_memory = self.state.clone(), self.pads.clone(), _copy(self._empty_memory)
            self._empty_kept = {name: u.clone() for name, u in self._empty_kept.items()}
            self.state.inplace = True
            self._fix_addresses()
        return self.state

    def _put(self, state: MemoryState, columns: Tensor) -> None:
        assert self.state is not None
        self.changeable()
        self.state.copy_(state)
        self.state.length, self.state.padded = None, True
        self.pads.add_(columns.sum(dim=1))
        self._known = None

    def _allocate(self, store: MemoryStore, k: Tensor, v: Tensor, x: Tensor) -> None:
        with torch.no_grad():
            k, v = as_autocast(k[:, :, :1]), as_autocast(v[:, :, :1])
            with torch.autocast(k.device.type, enabled=False):
                tokens = store.arrive(k, v, x[:, :1])
            self.state = store.init_state(tokens, full=True)
            self.state.inplace = True
            empty = self.state.clone()
            self._empty_memory, self._empty_kept = empty.memory, empty.kept
        self.pads = torch.zeros_like(self.state.seen)
        if not torch.compiler.is_compiling():
            self._fix_addresses()

    def _fix_addresses(self) -> None:
        assert self.state is not None
        for u in (*self.state.tensors().values(), self.pads):
            torch._dynamo.mark_static_address(u, guard=False)  # another cache, the same code

    def get_seq_length(self) -> Any:
        """Tokens seen, as a tensor, so that compiled code does not depend on the number."""
        return 0 if self.state is None else self.state.seen[0] + self.pads[0]

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

    def refuse_reset(self) -> None:
        """Raise a RuntimeError if the rows were joined: then what an empty row holds is not known."""
        if self._joined:
            raise RuntimeError(
                "reset: this cache was joined from rows of others at fixed addresses, and was never empty. Replace its "
                "rows with put(rows, cache), or make a new one."
            )

    def reset(self) -> None:
        """Forget everything, keeping the tensors.

        Raises:
            RuntimeError: if the rows were joined: then what an empty row holds is not known.
        """
        self.refuse_reset()
        self.edits += 1
        if self.state is not None:
            empty = self.state.clone()
            empty.slots, empty.seen = empty.slots.map(torch.zeros_like), torch.zeros_like(empty.seen)
            empty.memory, empty.kept, empty.length, empty.padded = self._empty_memory, self._empty_kept, 0, False
            self.state.copy_(empty)
            self.state.length, self.state.padded = None, True
        self._known, self.padding, self.overwritten = (0, False), None, False
        self.broken, self.made_with = False, ""
        self.pads.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search, in place."""
        if self.state is not None:
            self.edits += 1
            self.state.copy_(self.state.reorder(beam_idx))
            self.pads.copy_(self.pads.index_select(0, beam_idx.to(self.pads.device)))
            self.padding = self._padding_of(beam_idx)


def _copy(memory: State | None) -> State | None:
    return None if memory is None else map_state(torch.clone, memory)
