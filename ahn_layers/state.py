"""What a memory store carries between calls: a value that belongs to the caller."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from .compressor import State, map_state
from .tokens import Tokens
from .window import Window

FORMAT_VERSION = 1


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

    def _map(self, function) -> "MemoryState":  # type: ignore[no-untyped-def]
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
        return cls.from_tensors(tensors, description)

    def description(self) -> dict[str, object]:
        """What the tensors alone do not say, as JSON values."""
        return {"window": asdict(self.window), "length": self.length, "padded": self.padded}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], description: dict) -> "MemoryState":  # type: ignore[type-arg]
        """Inverse of :meth:`tensors` and :meth:`description`."""
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


def save_tensors(path: str | Path, tensors: dict[str, Tensor], kind: str, description: dict) -> None:  # type: ignore[type-arg]
    """Write tensors and a JSON description to a safetensors file that appears complete or not at all."""
    from safetensors.torch import save

    metadata = {"format": f"ahn_layers.{kind}", "version": str(FORMAT_VERSION), "description": json.dumps(description)}
    write_atomically(path, save({name: u.detach().contiguous() for name, u in tensors.items()}, metadata))


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that it is complete or not there, whatever happens meanwhile."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_tensors(path: str | Path, kind: str, device: torch.device | str) -> tuple[dict[str, Tensor], dict]:  # type: ignore[type-arg]
    """Read back what :func:`save_tensors` wrote; every defect of the file is a ValueError that names it."""
    from safetensors import SafetensorError, safe_open

    expected = f"ahn_layers.{kind}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != expected:
                raise ValueError(f"{path}: expected a file of format {expected!r}, found {metadata.get('format')!r}.")
            if metadata.get("version") != str(FORMAT_VERSION):
                raise ValueError(
                    f"{path}: format version {metadata.get('version')}, this library reads {FORMAT_VERSION}. "
                    "Load it with the version of ahn_layers that wrote it."
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["description"])  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error}).") from error
