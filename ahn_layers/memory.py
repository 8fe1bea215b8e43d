"""The memory store: a lossless window and a compressor behind one forward.

Dimensions: b batch, h query heads, g key/value heads, t new tokens, d key size, e value size, n hidden size.
"""

from collections.abc import Iterator
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .arrivals import Arrivals
from .autocast import outside_autocast
from .calls import StoreCall
from .checks import check_inputs, check_kinds, check_state, check_whole
from .compressor import Compressor, state_dtype
from .eviction import RIDES, Eviction, FoldAll, evict, first_kept
from .ops.attention.attend import SoftmaxAttention
from .ops.attention.sharing import share_columns
from .padded import as_given, in_parts, padding_last
from .peft import is_choosing, is_of_peft, running
from .positions import MemoryPositions, Positions, Rotary
from .recall import recall, with_reading
from .split import Split
from .state import MemoryState
from .step import kernel_step
from .tokens import Tokens
from .window import Window


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
            memory knows contents only and no distance. Use a memory as it was trained.

    Raises:
        TypeError: if a part is of another kind, a class in place of an object for instance.
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

    __call__: StoreCall

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
        check_kinds({"window": (window, Window)})
        parts = {"compressor": (compressor, Compressor), "rotary": (rotary, Rotary), "eviction": (eviction, Eviction)}
        check_kinds({name: found for name, found in parts.items() if found[0] is not None})
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

        A view: it has the window of this store, also if that is replaced. States of the two do not mix.
        """
        if self.compressor is None and self.eviction.folds_all:
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
        gates = {} if self.recalling is None or x is None else self.recalling.gates(x)
        gates = {name: gate.to(k.dtype) for name, gate in gates.items()}
        if x is not None:  # those of the eviction are compared with each other: they keep their precision
            gates |= {RIDES + name: score for name, score in self.eviction.gates(x, k, v).items()}
        return Tokens(k, v, gates)

    @outside_autocast
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
        compressor, eviction, positions = self.recalling, self.eviction, self.positions
        check_inputs(q, k, v, x, valid, compressor, eviction, self.rotary)
        tokens, outs = self.arrive(k, v, x), []
        state = self.init_state(tokens) if state is None else state
        check_state(state, tokens, self.window, compressor, eviction)
        for given in in_parts(Arrivals(q, tokens, x, valid, attention or SoftmaxAttention()), state):
            check_whole(state, eviction)
            new = padding_last(given, state)
            out = kernel_step(new, state, compressor, eviction, positions)
            if out is None:
                seen, leaving, held = self.window.push(state.held, new.tokens, new.valid)
                slots, leaving, kept = evict(eviction, state.kept, leaving, len(new))
                ((q, readers),) = share_columns((new.q, leaving.first, len(new)))
                reading, memory = recall(compressor, state.memory, readers, new.x, leaving, seen.rank, positions)
                out = with_reading(new.attend(q, seen, slots, positions, held.length), reading, compressor, eviction)
                state = state.after(held, memory, kept, new.tokens)
            outs.append(as_given(out, new, given, state, compressor, eviction, positions))
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0], state

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
