"""The memory store: a lossless window and a compressor behind one forward.

Dimensions: b batch, h query heads, g key/value heads, t new tokens, d key size, e value size, n hidden size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .checks import check_inputs, check_state
from .compressor import Compressor, State, map_state, state_dtype
from .ops.decode import slot_attention
from .ops.sharing import share_columns
from .ops.window_attention import add_to_tail, window_attention
from .positions import MemoryPositions, Positions, Rotary
from .state import MemoryState
from .step import kernel_step
from .tokens import Tokens, join, take
from .window import Window

_SEGMENT = {"cpu": 1024}
"""Tokens folded in one go, by device type: bounds what the scan expands and converts at a time, within caches."""
_LONG_SEGMENT = 8192
"""The same for every other device, where launches cost more than memory traffic."""


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
        self.memory_positions = memory_positions
        # not a child: it has nothing of its own
        self.__dict__["_plain"] = (
            None if compressor is None else MemoryStore(window, None, rotary, memory_positions=memory_positions)
        )

    def without_memory(self) -> "MemoryStore":
        """The same store without its compressor: sinks and window alone, what leaves is forgotten.

        A view: it has the window of this store, whatever that is at the time. States of the two do not mix.

        Examples:
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
        return MemoryState(self.window, slots, torch.zeros(len(k), dtype=torch.long, device=k.device), memory)

    def arrive(
        self, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t e"], x: Float[Tensor, "b t n"] | None
    ) -> Tokens:
        """New tokens with their write gates, which ride in the window in the dtype of ``k``."""
        gates = {} if self.compressor is None or x is None else self.compressor.gates(x)
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
        scale: float | None = None,
        softcap: float | None = None,
        inplace: bool = False,
        final: bool = False,
        dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b h t e"], MemoryState | None]:
        """Attend with new tokens and take them in.

        Args:
            q: queries of the new tokens, rotated as the model does.
            k: their keys, rotated; ``h`` is a multiple of ``g``.
            v: their values.
            x: the hidden states that entered the attention block; needed with a compressor.
            state: what the last call returned, None to begin.
            valid: False at padding. Padding takes no slot and no rank, and its outputs are zero.
            scale: logit factor, default ``d ** -0.5``.
            softcap: logits become ``softcap * tanh(logits / softcap)``.
            inplace: overwrite the tensors of ``state`` once the window is full.
            final: no tokens will follow, as in training: a state need not be made, None may come in its place.
            dense: the base model's own causal attention ``(q, k, v) -> out``, called instead of ours as long as
                nothing has left the window and no row is padded, for bit-identical results.

        Returns:
            The attention output, zero at padding, and the state after these tokens.

        Raises:
            ValueError: if shapes, devices or dtypes do not fit together or do not fit the state. Nothing has changed.
        """
        device = q.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)  # of attention; the memory chooses its dtypes itself
            q, k, v = (u if u.dtype == torch.float64 else u.to(low) for u in (q, k, v))
            options: dict[str, Any] = {"scale": scale, "softcap": softcap, "inplace": inplace, "dense": dense}
            with torch.autocast(device, enabled=False):
                return self.forward(q, k, v, x, state, valid=valid, final=final, **options)
        check_inputs(q, k, v, x, valid, self.compressor)
        new = self.arrive(k, v, x)
        if state is None:
            state = self.init_state(new)
        check_state(state, new, self.window, self.compressor)
        attention = {"scale": scale, "softcap": softcap}
        if len(new) == 1 and len(state.slots) == self.window.capacity:
            return self._step(q, new, x, state, valid, inplace, attention)
        if final and valid is None and state.uniform == 0:
            if dense is not None and len(new) <= self.window.capacity:
                return dense(q, k, v), None
            return self._attend(q, new, x, state, None, attention)[0], None
        if valid is None:
            return self._extend(q, new, x, state, None, attention, dense, inplace)

        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first, in each row
        x = None if x is None else x.gather(1, order.unsqueeze(-1).expand_as(x))
        out, state = self._extend(take(q, order), new.take(order), x, state, valid.sum(dim=1), attention, None, inplace)
        return take(out, order.argsort(dim=1)).masked_fill(~valid[:, None, :, None], 0), state

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

    def _extend(
        self,
        q: Tensor,
        new: Tokens,
        x: Tensor | None,
        state: MemoryState,
        arrivals: Int[Tensor, " b"] | None,
        attention: dict[str, float | None],
        dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
        inplace: bool,
    ) -> tuple[Tensor, MemoryState]:
        """Any number of new tokens; with ``arrivals``, only the first so many columns of each row are real."""
        if dense is not None and state.uniform is not None and arrivals is None:
            total = state.uniform + len(new)
            if total <= self.window.capacity:
                after = state.extended(new)
                resident = after.slots.columns(0, total)
                return dense(q, resident.k, resident.v), after
        out, memory = self._attend(q, new, x, state, arrivals, attention)
        after = state.extended(new, arrivals, inplace=inplace)
        after.memory = memory
        return out, after

    def _attend(
        self,
        q: Tensor,
        new: Tokens,
        x: Tensor | None,
        state: MemoryState,
        arrivals: Int[Tensor, " b"] | None,
        attention: dict[str, float | None],
    ) -> tuple[Tensor, State | None]:
        """What new tokens see in sinks, window and memory; and the memory with what they push out."""
        window, count, begins = self.window, len(new), state.uniform == 0 and arrivals is None
        total = None if state.uniform is None or arrivals is not None else state.uniform + count
        context = join(*state.recent(), new)
        past, rank = len(context) - count, state.next_rank + torch.arange(count, device=q.device)
        # Query i pushes out column i - spare of the context; sinks are never pushed out.
        spare, memory = window.window_size - past, state.memory
        first = spare + (0 if state.uniform is None else max(0, window.num_sinks + past - state.uniform))
        evicts = memory is not None and first < count
        if evicts:
            leaves = (first - spare, count - spare)
            shared = share_columns((q, first, count), (context.k, *leaves), (context.v, *leaves))
            (q, readers), (k, evicted_k), (v, evicted_v) = shared
            evicted = Tokens(evicted_k, evicted_v, context.columns(*leaves).gates)
            context = Tokens(k, v, context.gates)
        sinks = None if begins else state.sinks_with(new, arrivals)
        out = window_attention(
            q,
            None if sinks is None else sinks.k,
            None if sinks is None else sinks.v,
            context.k,
            context.v,
            rank,
            window_size=window.window_size,
            num_sinks=window.num_sinks,
            q_sinks=self.positions.facing_sinks(q, rank, None if state.length is None else state.length + count),
            first_rank=state.uniform,
            **attention,  # type: ignore[arg-type]
        )
        if evicts:
            assert memory is not None and x is not None
            folds = None
            if total is None:
                folds = window.leaves(state.seen.unsqueeze(1) + torch.arange(first, count, device=q.device))
                if arrivals is not None:
                    folds = folds & (torch.arange(first, count, device=q.device) < arrivals.unsqueeze(1))
            recalled, memory = self._remember(memory, readers, rank[..., first:], evicted, x[:, first:], folds)
            out = add_to_tail(out, recalled.to(out.dtype))
        return out, memory

    def _step(
        self,
        q: Tensor,
        new: Tokens,
        x: Tensor | None,
        state: MemoryState,
        valid: Bool[Tensor, "b 1"] | None,
        inplace: bool,
        attention: dict[str, float | None],
    ) -> tuple[Tensor, MemoryState]:
        """One new token and every slot allocated: read the slot that leaves, fold it, write the new token, attend."""
        if inplace and valid is None:
            out = kernel_step(q, new, x, state, self.compressor, self.positions, **attention)
            if out is not None:
                return out, state
        window = self.window
        slot, arrives = window.slot(state.seen), None if valid is None else valid.squeeze(1)
        memory, recalled = state.memory, None
        if memory is not None:
            folds = window.leaves(state.seen) if arrives is None else window.leaves(state.seen) & arrives
            evicted = state.slots.take(slot.unsqueeze(1))
            rank = state.seen.unsqueeze(1)
            recalled, memory = self._remember(memory, q, rank, evicted, x, folds.unsqueeze(1))  # type: ignore[arg-type]
        arrived = 1 if arrives is None else arrives.long()
        slots = state.slots.put(slot, new, arrives, inplace=inplace)
        seen = state.seen + arrived
        length = None if state.length is None else state.length + 1
        out = slot_attention(
            q,
            slots.k,
            slots.v,
            seen,
            full=state.uniform is not None and state.uniform >= window.capacity,
            q_sinks=self.positions.facing_sinks(q, state.seen.unsqueeze(1), length),
            num_sinks=window.num_sinks,
            **attention,  # type: ignore[arg-type]
        )
        if recalled is not None:
            out = out + recalled.to(out.dtype)
        if arrives is not None:
            out = out.masked_fill(~arrives.view(-1, 1, 1, 1), 0)
        padded = state.padded or valid is not None
        if not inplace:
            return out, replace(state, slots=slots, seen=seen, memory=memory, length=length, padded=padded)
        state.seen.copy_(seen)
        if memory is not None and length is None:  # a static state: every address is fixed
            memory = map_state(lambda old, now: old.copy_(now), state.memory, memory)  # type: ignore[arg-type]
        state.memory, state.length, state.padded = memory, length, padded
        return out, state

    def _remember(
        self,
        memory: State,
        q: Float[Tensor, "b h t d"],
        rank: Int[Tensor, "*b t"],
        evicted: Tokens,
        x: Float[Tensor, "b t n"],
        folds: Bool[Tensor, "b t"] | None,
    ) -> tuple[Float[Tensor, "b h t e"], State]:
        """Fold each evicted token and read with the query that pushed it out; nothing is read before the first fold."""
        assert self.compressor is not None
        compressor, outputs = self.compressor, []
        q, keys = self.positions.for_memory(q, rank, evicted.k)
        size = _SEGMENT.get(q.device.type, _LONG_SEGMENT)
        several = len(evicted) > size  # asked first: compiled code for one segment serves every length
        for start in range(0, len(evicted), size) if several else (0,):
            part = slice(start, start + size)
            k, v = keys[:, :, part], evicted.v[:, :, part]
            gates = {name: gate[:, :, part] for name, gate in evicted.gates.items()}
            mask = None if folds is None else folds[:, part]
            reading, memory = compressor.scan(memory, q[:, :, part], k, v, gates, mask)
            output = compressor.output(reading, x[:, part])
            outputs.append(output if mask is None else output.masked_fill(~mask[:, None, :, None], 0))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], memory
