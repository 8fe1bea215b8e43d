"""What a memory store carries between calls: a value that belongs to the caller."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .compressor import State, map_state
from .consistency import check_parts, check_same
from .files import as_device, load_tensors, reading, save_tensors
from .kinds import check_maker, maker
from .ring import Held
from .tokens import Later, Tokens
from .window import Window


@dataclass(repr=False)
class MemoryState:
    """The resident tokens of every row, and the state that holds those that left.

    A store never changes a state that it is given, unless the state says that it may (``inplace``), so a state can be
    kept, forked and continued several times.

    Attributes:
        window: the window it belongs to.
        slots: resident tokens, one column per slot; empty slots hold zeros.
        seen: real tokens seen so far, per row, ``(B,)`` int64.
        memory: the compressor's state, None without one.
        length: columns seen so far, padding included; None where it is known on the device only (static caches).
        padded: whether any column was padding, so that rows may have seen different numbers of tokens.
        inplace: whether a store may overwrite the tensors once the window is full, for speed. Set it on a state that
            nothing else refers to; later states inherit it. Where gradients are recorded, nothing is overwritten.
        kept: what the eviction policy carries, by name.
    """

    window: Window
    slots: Tokens
    seen: Int[Tensor, " b"]
    memory: State | None = None
    length: int | None = 0
    padded: bool = False
    inplace: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """The slots, made when they are first asked for: with gradients, wherever that is."""
        if name != "slots" or "_slots" not in self.__dict__:
            return object.__getattribute__(self, name)  # raises the usual error
        with torch.enable_grad():
            self.slots = self.__dict__.pop("_slots")()
        return self.slots

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, with the slots."""
        return {"slots": self.slots} | {name: u for name, u in self.__dict__.items() if name != "_slots"}

    def __repr__(self) -> str:
        """What it belongs to; its tensors fill pages."""
        return f"MemoryState({self.batch_size} rows, length={self.length}, {self.window})"

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.seen.shape[0]

    @property
    def uniform(self) -> int | None:
        """Tokens seen by every row, None if rows may differ or the number is known on the device only."""
        return None if self.padded else self.length

    @property
    def held(self) -> Held:
        """What the window holds; it may be overwritten if this state may, and no gradients are recorded."""
        inplace = self.inplace and not torch.is_grad_enabled()
        return Held(Later(lambda: self.slots), self.seen, self.length, self.padded, inplace)

    def after(self, held: Held, memory: State | None, kept: dict[str, Tensor], new: Tokens) -> "MemoryState":
        """The state once its window holds these tokens: this one itself if its tensors were overwritten.

        Where gradients are recorded, as in training, the slots are made when they are asked for: often they are not,
        and what they are made of is kept for the backward pass anyhow. Tensors without gradients may be overwritten.
        """
        if not held.overwritten:
            waits = torch.is_grad_enabled() and new.requires_grad and not torch.compiler.is_compiling()
            slots = self.slots if waits else held.slots
            window: dict[str, Any] = {"seen": held.seen, "length": held.length, "padded": held.padded}
            after = replace(self, slots=slots, memory=memory, kept=kept, **window)
            if waits:
                del after.slots
                after.__dict__["_slots"] = held.made
            return after
        assert held.slots is not None  # they are written when they are asked for
        self.seen.copy_(held.seen)
        if held.length is None:  # a static state: every address is fixed
            kept = {name: u.copy_(kept[name]) for name, u in self.kept.items()}
            if memory is not None:
                memory = map_state(lambda old, now: old.copy_(now), self.memory, memory)  # type: ignore[arg-type]
        self.memory, self.kept, self.length, self.padded = memory, kept, held.length, held.padded
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(u.numel() * u.element_size() for u in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name."""
        named = self.slots.named() | {"seen": self.seen} | {f"kept.{name}": u for name, u in self.kept.items()}
        if isinstance(self.memory, Tensor):
            named["memory"] = self.memory
        elif self.memory is not None:
            named |= {f"memory.{name}": u for name, u in self.memory.items()}
        return named

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        memory = None if self.memory is None else map_state(function, self.memory)
        kept = {name: function(u) for name, u in self.kept.items()}
        slots, seen = self.slots.map(function), function(self.seen)
        return replace(self, slots=slots, seen=seen, memory=memory, kept=kept, inplace=False)

    def outside_inference(self) -> "MemoryState":
        """The state with copies of tensors that were made under ``torch.inference_mode``, unless it is on."""
        if torch.is_inference_mode_enabled():
            return self
        memory = self.memory if isinstance(self.memory, dict) else {"": self.memory}
        parts = (self.seen, self.slots.k, *memory.values(), *self.kept.values())  # a part may have been overwritten
        return self._map(outside_inference) if any(u is not None and u.is_inference() for u in parts) else self

    def clone(self) -> "MemoryState":
        """A copy that shares nothing, detached from any graph."""
        return self._map(lambda u: u.detach().clone())

    def to(self, device: torch.device | str) -> "MemoryState":
        """A copy on another device, or on this one; it shares nothing. A dtype is a TypeError."""
        place = as_device(device)
        return self._map(lambda u: u.to(place, copy=True))

    def reorder(self, index: Int[Tensor, " rows"] | Sequence[int]) -> "MemoryState":
        """The rows at ``index``, in that order, repeated where it repeats: beams, forks, finished rows dropped.

        Raises:
            IndexError: if an index is not a row.
        """
        rows = torch.as_tensor(index)
        return self._map(lambda u: u.index_select(0, rows.to(u.device)))

    def copy_(self, other: "MemoryState") -> None:
        """Take over another state's values, keeping this one's tensors where they are (static addresses).

        Raises:
            ValueError: if it has another window, or other rows, slots or tensors. Nothing has changed.
        """
        mine, theirs = self.tensors(), other.tensors()
        check_same(self.window, mine, other.window, theirs)
        for name, u in mine.items():
            u.copy_(theirs[name])
        self.length, self.padded = other.length, other.padded

    def save(self, path: str | Path, store: nn.Module | None = None) -> None:
        """Write the state to a safetensors file, atomically: the file is complete or not there.

        Args:
            path: the file.
            store: the store that made the state; the file then knows its weights.
        """
        save_tensors(path, self.tensors(), "memory_state", self.description() | maker(store))

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", *, store: nn.Module | None = None
    ) -> "MemoryState":
        """Read a state back, bit for bit.

        Args:
            path: the file.
            device: where its tensors go.
            store: the store that will continue the state, to be compared with the one that made it.

        Raises:
            ValueError: if the file is not a state, is damaged, has an unknown format version, or was made with other
                weights or options than the store has.
        """
        tensors, description = load_tensors(path, "memory_state", device)
        if store is not None:
            check_maker(path, description, store)
        with reading(path):
            return cls.from_tensors(tensors, description).check()

    def description(self) -> dict[str, Any]:
        """What the tensors alone do not say, as JSON values."""
        return {"window": asdict(self.window), "length": self.length, "padded": self.padded}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> "MemoryState":
        """Inverse of ``tensors`` and ``description``."""
        several = {name.removeprefix("memory."): u for name, u in tensors.items() if name.startswith("memory.")}
        kept = {name.removeprefix("kept."): u for name, u in tensors.items() if name.startswith("kept.")}
        return cls(
            window=Window(**description["window"]),
            slots=Tokens.from_named(tensors),
            seen=tensors["seen"],
            memory=several or tensors.get("memory"),
            length=description["length"],
            padded=description["padded"],
            kept=kept,
        )

    def check(self) -> "MemoryState":
        """This state, if its parts fit together; those of a file may be anything.

        Raises:
            ValueError: if they do not.
        """
        held = self.slots.named().keys() | {"seen"}
        others = {name: u for name, u in self.tensors().items() if name not in held}
        check_parts(self.window, self.slots, self.seen, self.length, self.padded, others)
        return self


def outside_inference(u: Tensor) -> Tensor:
    """A copy of a tensor that was made under ``torch.inference_mode``, unless it is on; autograd can save no such."""
    return u.clone() if u.is_inference() and not torch.is_inference_mode_enabled() else u
