"""The memory store: a lossless window and a compressor behind one forward.

Dimensions: b batch, h query heads, g key/value heads, t new tokens, d key size, e value size, n hidden size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .checks import check_inputs, check_state
from .compressor import Compressor, State, state_dtype
from .eviction import Eviction, FoldAll, Kept
from .ops.attend import Between, SoftmaxAttention
from .ops.sharing import share_columns
from .ops.window_attention import add_to_tail
from .positions import MemoryPositions, Positions, Rotary
from .state import MemoryState
from .step import kernel_step
from .tokens import Leaving, Tokens, per_head, take
from .window import Window

_SEGMENT = {"cpu": 1024}
"""Tokens folded in one go, by device type: bounds what the scan expands and converts at a time, within caches."""
_LONG_SEGMENT = 8192
"""The same for every other device, where launches cost more than memory traffic."""


_RIDES = "eviction."
"""What the names of the eviction's own gates begin with, beside those of the compressor."""
_FOLDED = "folded"
"""Among what is kept: whether anything has been folded in each key/value head."""


class MemoryStore(nn.Module):
    """Attention with a bounded memory: sinks and window without loss, everything older in a fixed-size state.

    For the query of the token of rank ``p``, with ``S`` sinks and a window of ``W`` (arXiv 2510.07318, section 3):

        j   = p - W                                   the token that just left the window, if j >= S
        S_p = fold(S_{p-1}, k_j, v_j, gates(x_j))
        out = softmax attention over { sinks, last W tokens }  +  output(read(S_p, q_p), x_p)

    So every earlier token is seen exactly once: as a sink, through the window, or through the state. Any cutting of a
    sequence into calls gives the same outputs and the same state.

    Args:
        window: the short-term memory.
        compressor: the long-term memory; None forgets what leaves the window.
        rotary: how the model rotates its queries. Needed to keep the sinks within the trained distance
            (``Window.sink_positions``; without it they stay at their true distance), and for ``memory_positions``.
        eviction: what happens to a token that leaves the window. Default: ``FoldAll``, it is folded.
        memory_positions: what the memory is told of positions. ``"absolute"``: keys are folded, and queries read, as
            the attention rotated them, as in the paper. ``"none"``: with their rotation turned back, so that the
            memory knows contents only and no distance. A memory has to be used as it was trained.

    Raises:
        ValueError: if ``memory_positions`` is unknown, or ``"none"`` without ``rotary``.

    Examples:
        >>> from ahn_layers import GatedDeltaNet, MemoryStore, Window
        >>> store = MemoryStore(Window(4, num_sinks=1), GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8))
        >>> q, k, v = torch.randn(3, 1, 2, 9, 8)
        >>> x = torch.randn(1, 9, 32)
        >>> out, state = store(q, k, v, x)
        >>> out.shape, len(state.slots), state.memory.shape
        (torch.Size([1, 2, 9, 8]), 5, torch.Size([1, 2, 8, 8]))
    """

    def __init__(
        self,
        window: Window,
        compressor: Compressor | None = None,
        rotary: Rotary | None = None,
        *,
        eviction: Eviction | None = None,
        memory_positions: MemoryPositions = "absolute",
    ) -> None:
        super().__init__()
        if memory_positions not in get_args(MemoryPositions):
            raise ValueError(f"memory_positions={memory_positions!r}: expected one of {get_args(MemoryPositions)}.")
        if memory_positions == "none" and rotary is None:
            raise ValueError("memory_positions='none': expected rotary=Rotary(...), the rotation that is to be undone.")
        self.window = window
        self.compressor = compressor
        self.rotary = rotary
        self.eviction = FoldAll() if eviction is None else eviction
        self.memory_positions = memory_positions
        # not a child: it has nothing of its own
        self.__dict__["_plain"] = (
            None
            if compressor is None and eviction is None
            else MemoryStore(window, None, rotary, memory_positions=memory_positions)
        )

    def without_memory(self) -> "MemoryStore":
        """The same store without compressor and eviction: sinks and window alone, what leaves is forgotten.

        A view: it has the window of this store, whatever that is at the time. States of the two do not mix.

        Examples:
            >>> from ahn_layers import GatedDeltaNet
            >>> store = MemoryStore(Window(4), GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8))
            >>> store.without_memory().compressor is None
            True
        """
        plain: MemoryStore | None = self.__dict__["_plain"]
        if plain is None:
            return self
        plain.window = self.window
        return plain

    def extra_repr(self) -> str:
        """Window and positions, for ``print(model)``."""
        return f"{self.window!r}, memory_positions={self.memory_positions!r}"

    @property
    def positions(self) -> Positions:
        """What sinks and memory are shown of positions."""
        return Positions(self.window, self.rotary, self.memory_positions)

    def init_state(self, tokens: Tokens, *, full: bool = False) -> MemoryState:
        """An empty state for rows like these tokens.

        Args:
            tokens: any tokens, for batch size, sizes, dtype and device.
            full: allocate every slot now (static caches) instead of growing with the text.
        """
        k = tokens.k
        slots = tokens.map(lambda u: u.new_zeros(*u.shape[:2], self.window.capacity if full else 0, *u.shape[3:]))
        like = k.new_zeros((), dtype=state_dtype(k))
        memory = None if self.compressor is None else self.compressor.init_state(len(k), like)
        seen = torch.zeros(len(k), dtype=torch.long, device=k.device)
        return MemoryState(self.window, slots, seen, memory, kept=self.init_kept(tokens))

    def arrive(
        self, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"], x: Float[Tensor, "b t n"] | None
    ) -> Tokens:
        """New tokens with their write gates, which ride in the window in the dtype of ``k``."""
        gates = {} if self.compressor is None or x is None else self.compressor.gates(x)
        if x is not None:
            gates = gates | {_RIDES + name: score for name, score in self.eviction.gates(x).items()}
        return Tokens(k, v, {name: gate.to(k.dtype) for name, gate in gates.items()})

    def forward(
        self,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b g t d"],
        v: Float[Tensor, "b g t e"],
        x: Float[Tensor, "b t n"] | None = None,
        state: MemoryState | None = None,
        *,
        valid: Bool[Tensor, "b t"] | None = None,
        attention: SoftmaxAttention | None = None,
    ) -> tuple[Float[Tensor, "b h t e"], MemoryState]:
        """Attend with new tokens and take them in.

        Args:
            q: queries of the new tokens, rotated as the model does.
            k: their keys, rotated; ``h`` is a multiple of ``g``.
            v: their values.
            x: the hidden states that entered the attention block; needed with a compressor.
            state: what the last call returned, None to begin.
            valid: False at padding. Padding takes no slot and no rank, and its outputs are zero.
            attention: how the base model attends, where it is not plain scaled dot-product attention.

        Returns:
            The attention output, zero at padding, and the state after these tokens.

        Raises:
            ValueError: if shapes, devices or dtypes do not fit together or do not fit the state. Nothing has changed.
        """
        device = q.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)  # of attention; the memory chooses its dtypes itself
            q, k, v = (u if u.dtype == torch.float64 else u.to(low) for u in (q, k, v))
            with torch.autocast(device, enabled=False):
                return self.forward(q, k, v, x, state, valid=valid, attention=attention)
        check_inputs(q, k, v, x, valid, self.compressor)
        new = self.arrive(k, v, x)
        state = self.init_state(new) if state is None else state
        kept = {} if self.folds_all else self.init_kept(new.map(lambda u: u.to("meta")))
        check_state(state, new, self.window, self.compressor, kept)
        attention = attention or SoftmaxAttention()
        if valid is None:
            return self.push(q, new, x, state, None, attention)
        if len(new) == 1:
            out, state = self.push(q, new, x, state, valid, attention)
            return out.masked_fill(~valid[:, None, :, None], 0), state
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first, in each row
        x = None if x is None else x.gather(1, order.unsqueeze(-1).expand_as(x))
        out, state = self.push(take(q, order), new.take(order), x, state, valid.gather(1, order), attention)
        return take(out, order.argsort(dim=1)).masked_fill(~valid[:, None, :, None], 0), state

    def push(
        self,
        q: Tensor,
        new: Tokens,
        x: Tensor | None,
        state: MemoryState,
        valid: Bool[Tensor, "b t"] | None,
        attention: SoftmaxAttention,
    ) -> tuple[Tensor, MemoryState]:
        """The equations of this class; padding comes last in each row."""
        held, single = state.held, len(new) == 1 and len(state.slots) == self.window.capacity
        if single and held.overwritten and self.folds_all and valid is None:
            out = kernel_step(q, new, x, state, self.compressor, self.positions, attention)
            if out is not None:
                return out, state
        seen, leaving, held = self.window.push(held, new, valid)
        others, leaving, kept = self.evict(state.kept, leaving, len(new))
        ((q, readers),) = share_columns((q, leaving.first, len(new)))
        recalled, memory = self.recall(state.memory, readers, seen.rank, leaving, x)
        out = attention(q, [seen, others], self.positions.facing_sinks(q, seen.rank, held.length))
        out = out if recalled is None else add_to_tail(out, recalled.to(out.dtype))
        return out, state.after(held, memory, kept)

    def bytes_per_row(self, like: Tensor, *, num_kv_heads: int, head_dim: int, value_dim: int, **_: int) -> int:
        """Bytes that a state holds for each row once the window is full.

        Args:
            like: a tensor with the dtype of keys and values.
            num_kv_heads: key/value heads of the attention.
            head_dim: size of keys.
            value_dim: size of values.
        """
        k, v = (like.new_empty(1, num_kv_heads, 1, size, device="meta") for size in (head_dim, value_dim))
        x = None if self.compressor is None else k.new_empty(1, 1, self.compressor.hidden_size)
        if x is not None:
            x = torch.zeros_like(x, device=next(self.compressor.parameters()).device)  # type: ignore[union-attr]
        with torch.no_grad():
            return self.init_state(self.arrive(k, v, x), full=True).nbytes

    def init_kept(self, like: Tokens) -> Kept:
        """What the eviction carries at first, and whether anything has been folded in each key/value head."""
        kept = self.eviction.init_kept(like)
        if self.folds_all:
            return kept
        return kept | {_FOLDED: torch.zeros(like.k.shape[:2], dtype=torch.bool, device=like.k.device)}

    @property
    def folds_all(self) -> bool:
        """Whether everything that leaves the window is folded."""
        return isinstance(self.eviction, FoldAll)

    def evict(self, kept: Kept, leaving: Leaving, count: int) -> tuple[Between | None, Leaving, Kept]:
        """What leaves the window through the eviction; heads read the memory once something has been folded in them."""
        if self.folds_all or leaving.first == count:
            return None, leaving, kept
        own = {name: u for name, u in kept.items() if name != _FOLDED}
        seen, leaving, after = self.eviction.push(own, leaving)
        ever = kept[_FOLDED].unsqueeze(2).expand(-1, -1, count - leaving.first)
        reads = torch.ones_like(ever)
        if leaving.where is not None:
            reads = ever | (_by_head(leaving.where).cumsum(dim=2) > 0)
        return seen, replace(leaving, reading=reads), after | {_FOLDED: reads[:, :, -1]}

    def recall(
        self,
        memory: State | None,
        q: Float[Tensor, "b h u d"],
        rank: Callable[[], Int[Tensor, "*b t"]],
        leaving: Leaving,
        x: Float[Tensor, "b t n"] | None,
    ) -> tuple[Float[Tensor, "b h u e"] | None, State | None]:
        """Fold each token that leaves and read with the query that pushed it out; before the first one, read nothing.

        Args:
            memory: the compressor's state.
            q: the queries from ``leaving.first`` on.
            rank: makes the ranks of all queries.
            leaving: what leaves.
            x: hidden states of all queries' tokens.

        Returns:
            What is added to the attention of these queries, None for nothing, and the state.
        """
        if self.compressor is None or memory is None or q.shape[2] == 0:
            return None, memory
        assert x is not None
        compressor, outputs, evicted, folds = self.compressor, [], leaving.tokens, leaving.where
        x, keys = x[:, leaving.first :], evicted.k
        if self.positions.hidden:
            q, keys = self.positions.for_memory(q, rank()[..., leaving.first :], keys)
        size = _SEGMENT.get(q.device.type, _LONG_SEGMENT)
        several = len(evicted) > size  # asked first: compiled code for one segment serves every length
        for start in range(0, len(evicted), size) if several else (0,):
            part = slice(start, start + size)
            k, v = keys[:, :, part], evicted.v[:, :, part]
            gates = {n: gate[:, :, part] for n, gate in evicted.gates.items() if not n.startswith(_RIDES)}
            mask, reads = (None if u is None else u[..., part] for u in (folds, leaving.reads))
            reading, memory = compressor.scan(memory, q[:, :, part], k, v, gates, mask)
            output = compressor.output(reading, x[:, part])
            outputs.append(output if reads is None else output.masked_fill(~per_head(reads, output), 0))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], memory


def _by_head(mask: Tensor) -> Tensor:
    return mask if mask.ndim == 3 else mask.unsqueeze(1)
