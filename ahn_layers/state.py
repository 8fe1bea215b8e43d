"""What a memory store carries between calls: a value that belongs to the caller."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .compressor import State, map_state
from .files import load_tensors, reading, save_tensors
from .tokens import Tokens, join
from .window import Window


@dataclass
class MemoryState:
    """The resident tokens of every row, and the state that holds those that left.

    A store never changes a state that it is given (unless asked to with ``inplace=True``), so a state can be kept,
    forked and continued several times.

    Attributes:
        window: the window it belongs to.
        slots: resident tokens, one column per slot; empty slots hold zeros.
        seen: real tokens seen so far, per row, ``(B,)`` int64.
        memory: the compressor's state, None without one.
        length: columns seen so far, padding included; None where it is known on the device only (static caches).
        padded: whether any column was padding, so that rows may have seen different numbers of tokens.
    """

    window: Window
    slots: Tokens
    seen: Int[Tensor, " b"]
    memory: State | None = None
    length: int | None = 0
    padded: bool = False

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.seen.shape[0]

    @property
    def uniform(self) -> int | None:
        """Tokens seen by every row, None if rows may differ or the number is known on the device only."""
        return None if self.padded else self.length

    @property
    def next_rank(self) -> int | Int[Tensor, "b 1"]:
        """Rank of the next token: one number if it is the same in every row and known, else per row."""
        return self.seen.unsqueeze(1) if self.uniform is None else self.uniform

    def recent(self) -> list[Tokens]:
        """The tokens of the window in the order of rank, the latest last, in pieces; columns before rank 0 are filler.

        As many columns as the fullest row can have; the tokens of rank below ``num_sinks`` are left out.
        """
        window, size = self.window, self.window.window_size
        if self.length is not None:
            size = min(size, max(0, self.length - window.num_sinks))
        if self.uniform is not None and self.uniform <= window.capacity:
            return [self.slots.columns(self.uniform - size, self.uniform)]
        if self.uniform is not None:
            oldest = window.next_slot(self.uniform)
            return [self.slots.columns(oldest, window.capacity), self.slots.columns(window.num_sinks, oldest)]
        rank = self.next_rank + torch.arange(-size, 0, device=self.seen.device)
        return [self.slots.take(window.slot(rank).clamp(min=0, max=max(len(self.slots) - 1, 0)))]

    def sinks_with(self, new: Tokens, arrivals: Int[Tensor, " b"] | None = None) -> Tokens:
        """The sinks once new tokens have arrived: as many columns as there may be, at most ``num_sinks``."""
        first = self.window.num_sinks
        if arrivals is None and self.uniform is not None:
            held = min(self.uniform, first)
            return join(self.slots.columns(0, held), new.columns(0, first - held))
        return self._slots_with(new, arrivals).columns(0, first)

    def extended(
        self, new: Tokens, arrivals: Int[Tensor, " b"] | None = None, *, inplace: bool = False
    ) -> "MemoryState":
        """The state with new tokens in their slots; what they push out is gone, the memory is as it was.

        Args:
            new: the tokens.
            arrivals: how many of them are real in each row, the first ones; None for all.
            inplace: overwrite a full window in the tensors of this state.
        """
        full = arrivals is None and self.uniform is not None and self.uniform >= self.window.capacity
        return replace(
            self,
            slots=self._overwritten(new) if inplace and full else self._slots_with(new, arrivals),
            seen=self.seen + (len(new) if arrivals is None else arrivals),
            length=None if self.length is None else self.length + len(new),
            padded=self.padded or arrivals is not None,
        )

    def _slots_with(self, new: Tokens, arrivals: Int[Tensor, " b"] | None) -> Tokens:
        """Each slot keeps its token, or takes the last of the new ones that belongs there."""
        window, held = self.window, len(self.slots)
        if arrivals is None and self.uniform == held and held + len(new) <= window.capacity:
            return self.slots.cat(new)
        if arrivals is None and self.uniform is not None and self.uniform >= window.capacity:
            return _around_the_ring(window, self.slots, new, window.next_slot(self.uniform))
        if arrivals is None and self.uniform == 0 and len(new) >= window.capacity:
            sinks, rest = new.columns(0, window.num_sinks), new.columns(window.num_sinks, len(new))
            return _around_the_ring(window, sinks, rest, window.num_sinks)
        needed = window.capacity if self.length is None else min(window.capacity, self.length + len(new))
        slot = torch.arange(max(needed, held), device=self.seen.device)
        total = self.next_rank + (len(new) if arrivals is None else arrivals.unsqueeze(1))
        rank = window.resident(slot, torch.as_tensor(total, device=slot.device).view(-1, 1))
        rank = rank.squeeze(0) if isinstance(total, int) else rank
        source = torch.where(rank >= self.next_rank, held + rank - self.next_rank, slot)
        source = torch.where(rank < 0, held + len(new), source)  # empty slots take the column of zeros
        nothing = new.map(lambda u: u.new_zeros(*u.shape[:2], 1, *u.shape[3:]))
        return self.slots.cat(new, nothing).take(source)

    def _overwritten(self, new: Tokens) -> Tokens:
        """The same tensors, the last of the new tokens over the oldest."""
        assert self.uniform is not None
        start = max(0, len(new) - self.window.window_size)
        while start < len(new):
            slot = self.window.next_slot(self.uniform + start)
            size = min(len(new) - start, self.window.capacity - slot)
            for u, v in zip(self.slots.tensors, new.tensors, strict=True):
                u[:, :, slot : slot + size] = v[:, :, start : start + size]
            start += size
        return self.slots

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(u.numel() * u.element_size() for u in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name."""
        named = {"k": self.slots.k, "v": self.slots.v, "seen": self.seen}
        named |= {f"gates.{name}": gate for name, gate in self.slots.gates.items()}
        if isinstance(self.memory, Tensor):
            named["memory"] = self.memory
        elif self.memory is not None:
            named |= {f"memory.{name}": u for name, u in self.memory.items()}
        return named

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        memory = None if self.memory is None else map_state(function, self.memory)
        return replace(self, slots=self.slots.map(function), seen=function(self.seen), memory=memory)

    def clone(self) -> "MemoryState":
        """A copy that shares nothing, detached from any graph."""
        return self._map(lambda u: u.detach().clone())

    def to(self, device: torch.device | str) -> "MemoryState":
        """The state on another device."""
        return self._map(lambda u: u.to(device))

    def reorder(self, index: Int[Tensor, " rows"]) -> "MemoryState":
        """The rows at ``index``, in that order, repeated where it repeats: beams, forks, finished rows dropped.

        Raises:
            IndexError: if an index is not a row.
        """
        return self._map(lambda u: u.index_select(0, index.to(u.device)))

    def without(self, ranks: Bool[Tensor, "b c"]) -> "MemoryState":
        """The state as if some tokens had never arrived: later ones move up. The columns seen stay what they are.

        Args:
            ranks: True for the tokens to leave out, by rank; tokens of further ranks stay.

        Raises:
            ValueError: if a token has left the window of a row that is to lose one.
        """
        late = ranks.any(dim=1) & (self.seen > self.window.capacity)
        if bool(late.any()):
            raise ValueError(
                f"rows {late.nonzero().flatten().tolist()} have folded tokens into their memory: what arrived cannot "
                "be taken back. Keep a clone of the state from before."
            )
        held = len(self.slots)
        slot = torch.arange(held, device=self.seen.device)
        gone = torch.zeros(self.batch_size, held, dtype=torch.bool, device=self.seen.device)
        size = min(held, ranks.shape[1])
        gone[:, :size] = ranks[:, :size]  # while nothing has left, a token sits in the slot of its rank
        seen = self.seen - (gone & (slot < self.seen.unsqueeze(1))).sum(dim=1)
        slots = self.slots.take(gone.to(torch.uint8).argsort(dim=1, stable=True))
        empty = (slot >= seen.unsqueeze(1)).unsqueeze(1)
        slots = slots.map(lambda u: u.masked_fill(empty.view(*empty.shape, *[1] * (u.ndim - 3)), 0))
        return replace(self, slots=slots, seen=seen, padded=True)

    def copy_(self, other: "MemoryState") -> None:
        """Take over another state's values, keeping this one's tensors where they are (static addresses)."""
        theirs = other.tensors()
        for name, mine in self.tensors().items():
            mine.copy_(theirs[name])
        self.length, self.padded = other.length, other.padded

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, atomically: the file is complete or not there."""
        save_tensors(path, self.tensors(), "memory_state", self.description())

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "MemoryState":
        """Read a state back, bit for bit.

        Raises:
            ValueError: if the file is not a state, is damaged, or has an unknown format version.
        """
        tensors, description = load_tensors(path, "memory_state", device)
        with reading(path):
            return cls.from_tensors(tensors, description)

    def description(self) -> dict[str, Any]:
        """What the tensors alone do not say, as JSON values."""
        return {"window": asdict(self.window), "length": self.length, "padded": self.padded}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> "MemoryState":
        """Inverse of ``tensors`` and ``description``."""
        several = {name.removeprefix("memory."): u for name, u in tensors.items() if name.startswith("memory.")}
        gates = {name.removeprefix("gates."): u for name, u in tensors.items() if name.startswith("gates.")}
        return cls(
            window=Window(**description["window"]),
            slots=Tokens(tensors["k"], tensors["v"], gates),
            seen=tensors["seen"],
            memory=several or tensors.get("memory"),
            length=description["length"],
            padded=description["padded"],
        )


def _around_the_ring(window: Window, slots: Tokens, new: Tokens, slot: int) -> Tokens:
    """New tokens from ``slot`` on, round the window and over the oldest; a full window may be missing in ``slots``."""
    first, end, size, count = window.num_sinks, window.capacity, window.window_size, len(new)
    if count > size:  # only the last ones stay
        return _around_the_ring(
            window, slots, new.columns(count - size, count), first + (slot - first + count - size) % size
        )
    wrapped = max(0, slot + count - end)
    return slots.columns(0, first).cat(
        new.columns(count - wrapped, count),
        slots.columns(first + wrapped, slot),
        new.columns(0, count - wrapped),
        slots.columns(slot + count - wrapped, end),
    )
