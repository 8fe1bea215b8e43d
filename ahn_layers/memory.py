"""The memory store: a lossless window and a compressor behind one forward.

Dimensions: b batch, h query heads, g key/value heads, t new tokens, d key size, e value size, n hidden size.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .checks import check_inputs, check_state, check_whole
from .compressor import Compressor, state_dtype
from .eviction import RIDES, Eviction, FoldAll, evict, first_kept
from .ops.attention.attend import SoftmaxAttention
from .ops.attention.sharing import share_columns
from .ops.attention.window_attention import add_to_tail
from .ops.idle import with_idle
from .padded import LARGEST_MASK, attend_at_end, ends_of_padding
from .peft import is_choosing, is_of_peft, running
from .positions import MemoryPositions, Positions, Rotary
from .recall import recall
from .split import Split
from .state import MemoryState
from .step import kernel_step
from .tokens import Tokens, take
from .window import Window


def as_autocast(u: Tensor) -> Tensor:
    """A query, key or value in the dtype of attention under ``torch.autocast``; the memory chooses its own dtypes."""
    device = u.device.type
    if device == "meta" or u.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return u
    return u.to(torch.get_autocast_dtype(device))


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
        self.split: Split | None = None  # of a model that is split over several processes by its heads
        if compressor is not None or eviction is not None:
            self._make_plain()  # now, since compiled code makes no modules

    def without_memory(self) -> "MemoryStore":
        """The same store without compressor and eviction: sinks and window alone, what leaves is forgotten.

        A view: it has the window of this store, whatever that is at the time. States of the two do not mix.

        Examples:
            >>> from ahn_layers import GatedDeltaNet
            >>> store = MemoryStore(Window(4), GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8))
            >>> store.without_memory().compressor is None
            True
        """
        if self.compressor is None and isinstance(self.eviction, FoldAll):
            return self
        plain: MemoryStore = self.__dict__.get("_plain") or self._make_plain()
        plain.window = self.window
        return plain

    def _make_plain(self) -> "MemoryStore":
        """The store of ``without_memory``; not a child, since it has nothing of its own."""
        plain = MemoryStore(self.window, None, self.rotary, memory_positions=self.memory_positions)
        self.__dict__["_plain"] = plain
        return plain

    def extra_repr(self) -> str:
        """Window and positions, for ``print(model)``."""
        return f"{self.window!r}, memory_positions={self.memory_positions!r}"

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; PEFT, when it looks for modules to adapt, finds none below this one."""
        walk = super().named_modules(memo, prefix, remove_duplicate)
        if is_choosing():
            return ((name, module) for name, module in walk if module is self or is_of_peft(module))
        return walk

    @property
    def recalling(self) -> Compressor | None:
        """The compressor that runs: ``compressor``, or the copy of it that PEFT trains (``modules_to_save``)."""
        compressor: nn.Module | None = self.compressor
        if compressor is None or isinstance(compressor, Compressor):
            return compressor
        return running(compressor)  # type: ignore[return-value]

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
        memory = None if self.recalling is None else self.recalling.init_state(len(k), like)
        seen = torch.zeros(len(k), dtype=torch.long, device=k.device)
        return MemoryState(self.window, slots, seen, memory, kept=first_kept(self.eviction, tokens))

    def arrive(
        self, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"], x: Float[Tensor, "b t n"] | None
    ) -> Tokens:
        """New tokens with their gates, which ride in the window: write gates in the dtype of ``k``."""
        compressor = self.recalling
        gates = {} if compressor is None or x is None else compressor.gates(x)
        gates = {name: gate.to(k.dtype) for name, gate in gates.items()}
        if x is not None:  # those of the eviction are compared with each other: they keep their precision
            gates |= {RIDES + name: score for name, score in self.eviction.gates(x, k, v).items()}
        return Tokens(k, v, gates)

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
            valid: False at padding. Padding takes no slot and no rank. Its queries see what the last real token of
                their row saw; before the first one their outputs are zero.
            attention: how the base model attends, where it is not plain scaled dot-product attention.

        Returns:
            The attention output and the state after these tokens.

        Raises:
            ValueError: if shapes, devices or dtypes do not fit together or do not fit the state. Nothing has changed.
        """
        device = q.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            q, k, v = (as_autocast(u) for u in (q, k, v))
            with torch.autocast(device, enabled=False):
                return self.forward(q, k, v, x, state, valid=valid, attention=attention)
        compressor = self.recalling
        check_inputs(q, k, v, x, valid, compressor, self.eviction)
        new = self.arrive(k, v, x)
        state = self.init_state(new) if state is None else state
        check_state(state, new, self.window, compressor, self.eviction)
        return self.take_in(q, new, x, state, valid, attention or SoftmaxAttention())

    def take_in(
        self,
        q: Tensor,
        new: Tokens,
        x: Tensor | None,
        state: MemoryState,
        valid: Bool[Tensor, "b t"] | None,
        attention: SoftmaxAttention,
    ) -> tuple[Tensor, MemoryState]:
        """``push`` with padding wherever it is: real tokens first, the call cut where they go on after padding."""
        if valid is None or (len(new) == 1 and len(state.slots) == self.window.capacity):
            return self.push(q, new, x, state, valid, attention)
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        lossless = state.uniform == 0 and len(new) <= self.window.capacity
        if attention.dense is not None and lossless and len(q) * len(new) ** 2 <= LARGEST_MASK:
            out = attention.dense(q, new.k, new.v, valid)
            if torch.compiler.is_compiling() or not bool(out.isnan().any()):  # of rows that see nothing, in float64
                held = self.window.push(state.held, new.take(order), valid.gather(1, order))[2]
                return self._idle(out), state.after(held, state.memory, state.kept)
        attention, outs = replace(attention, dense=None), []
        ends = ends_of_padding(valid, state.seen)
        for a, b in pairwise((0, *ends, len(new))) if ends else ():
            part = None if x is None else x[:, a:b]
            how = attention.columns(a, b)
            out, state = self.take_in(q[:, :, a:b], new.columns(a, b), part, state, valid[:, a:b], how)
            outs.append(out)
        if outs:
            return torch.cat(outs, dim=2), state
        ordered = None if x is None else x.gather(1, order.unsqueeze(-1).expand_as(x))
        how = attention.reordered(order)
        out, state = self.push(take(q, order), new.take(order), ordered, state, valid.gather(1, order), how)
        out = take(out, order.argsort(dim=1)).masked_fill(~valid[:, None, :, None], 0)
        return attend_at_end(out, q, x, state, valid, attention, self.recalling, self.eviction, self.positions), state

    def _idle(self, out: Tensor) -> Tensor:
        """The output of a call that folds nothing: the memory's parameters get gradients all the same, zeros."""
        return out if self.recalling is None else with_idle(out, self.recalling.parameters())

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
        check_whole(state, self.eviction)
        held, single = state.held, len(new) == 1 and len(state.slots) == self.window.capacity
        compressor, positions = self.recalling, self.positions
        if single and held.overwritten and valid is None:
            out = kernel_step(q, new, x, state, compressor, self.eviction, positions, attention)
            if out is not None:
                return out, state
        seen, leaving, held = self.window.push(held, new, valid)
        others, leaving, kept = evict(self.eviction, state.kept, leaving, len(new))
        queries = q
        ((q, readers),) = share_columns((q, leaving.first, len(new)))
        recalled, memory = recall(compressor, state.memory, readers, x, leaving, seen.rank, positions)
        q_kept, others = positions.facing_kept(queries, others)
        facing, later = positions.facing_sinks(q, seen.rank, held.length), attention.later(new.k, new.v)
        out = attention(q, [seen, others], facing, q_kept, later)
        out = self._idle(out) if recalled is None else add_to_tail(out, recalled.to(out.dtype))
        if single and valid is not None:
            out = out.masked_fill((held.seen == 0).view(-1, 1, 1, 1), 0)
        return out, state.after(held, memory, kept)

    def bytes_per_row(
        self, like: Tensor, *, num_kv_heads: int, head_dim: int, value_dim: int, hidden_size: int = 0, **_: int
    ) -> int:
        """Bytes that a state holds for each row once the window is full.

        Args:
            like: a tensor with the dtype of keys and values.
            num_kv_heads: key/value heads of the attention.
            head_dim: size of keys.
            value_dim: size of values.
            hidden_size: width of the hidden states. Default: what the compressor was made for.
        """
        device = next((parameter.device for parameter in self.parameters()), torch.device("meta"))
        if self.recalling is not None:
            hidden_size = hidden_size or self.recalling.hidden_size
        like = torch.zeros(1, num_kv_heads, 1, 1, dtype=like.dtype, device=device)
        k, v = (like.expand(-1, -1, -1, size) for size in (head_dim, value_dim))
        with torch.no_grad():
            tokens = self.arrive(k, v, like.new_zeros(1, 1, hidden_size))
            return self.init_state(tokens.map(lambda u: u.to("meta")), full=True).nbytes
