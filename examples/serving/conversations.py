"""Conversations by id: the latest in memory, older ones on disk, and no more than a number of each.

Several servers can share a folder, if none of them keeps conversations in memory.
"""

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # on Windows a folder cannot be shared
    fcntl = None  # type: ignore[assignment]

from ahn_layers import HippocampalCache

from .metrics import Metrics

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What ids look like: they are names of files."""


class InUseError(Exception):
    """A conversation is being answered, and takes no other message until that is over."""


@dataclass(frozen=True, eq=False)
class Conversation:
    """What was read and said so far.

    Attributes:
        cache: one row, of fixed size however long the conversation is.
        pending: tokens of the last reply that the cache does not hold.
    """

    cache: HippocampalCache
    pending: tuple[int, ...] = ()


class Conversations:
    """Keeps conversations between their turns.

    Args:
        folder: where those go that are too many for the memory; None drops them.
        in_memory: how many stay in memory.
        on_disk: how many files are kept; the ones that were not used for longest go first.
        device: where resumed conversations go.
        metrics: what is counted.
    """

    def __init__(
        self, folder: Path | None, in_memory: int, on_disk: int, device: torch.device | str, metrics: Metrics
    ) -> None:
        self.folder, self.in_memory, self.on_disk, self.device = folder, in_memory, on_disk, device
        self.metrics = metrics
        self._lock = threading.RLock()
        self._held: OrderedDict[str, Conversation] = OrderedDict()
        self._used: set[str] = set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._locks = (folder / "locks").open("ab")
        self._count()

    def begin(self, name: str) -> Conversation | None:
        """Go on with a conversation; until ``end`` nobody else can.

        Returns:
            A copy of it; None if there is none of that name.

        Raises:
            InUseError: if somebody does already.
            ValueError: if its file is damaged.
        """
        with self._lock:
            if name in self._used or not self._lock_file(name):
                raise InUseError(name)
            held = self._held.get(name)
            if held is not None:
                self.metrics.add("conversations_resumed_total", source="memory")
                found = Conversation(held.cache.clone(), held.pending)
            else:
                try:
                    found = self._load(name)
                except BaseException:
                    self._unlock_file(name)
                    raise
            self._used.add(name)
            return found

    def end(self, name: str, conversation: Conversation | None) -> None:
        """A turn is over.

        Args:
            name: of the conversation.
            conversation: what it is now; None leaves it as it was before ``begin``.
        """
        with self._lock:
            try:
                if conversation is not None:
                    self._held[name] = conversation
                    self._held.move_to_end(name)
                    while len(self._held) > self.in_memory:
                        self._save(*self._held.popitem(last=False))
            finally:
                self._used.discard(name)
                self._unlock_file(name)
            self._count()

    def forget(self, name: str) -> bool:
        """Delete a conversation; returns whether there was one.

        Raises:
            InUseError: if it is being answered.
        """
        with self._lock:
            if name in self._used:
                raise InUseError(name)
            known = self.knows(name)
            self._held.pop(name, None)
            for path in self._paths(name) if self.folder is not None else ():
                path.unlink(missing_ok=True)
            self._count()
            return known

    def knows(self, name: str) -> bool:
        """Whether there is a conversation of this name."""
        with self._lock:
            return name in self._held or (self.folder is not None and self._paths(name)[1].exists())

    def close(self) -> None:
        """Write everything to disk."""
        with self._lock:
            while self._held:
                self._save(*self._held.popitem(last=False))
            self._count()

    def _paths(self, name: str) -> tuple[Path, Path]:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def _save(self, name: str, conversation: Conversation) -> None:
        """Write a conversation; the file that says that it is there comes last."""
        if self.folder is None:
            return
        tensors, about = self._paths(name)
        about.unlink(missing_ok=True)
        conversation.cache.save(tensors)
        draft = about.with_suffix(".tmp")
        draft.write_text(json.dumps({"pending": conversation.pending}))
        os.replace(draft, about)
        files = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in files[: max(0, len(files) - self.on_disk)]:
            old.unlink(missing_ok=True)
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def _load(self, name: str) -> Conversation | None:
        if self.folder is None or not self._paths(name)[1].exists():
            return None
        tensors, about = self._paths(name)
        pending = tuple(json.loads(about.read_text())["pending"])
        cache = HippocampalCache.load(tensors, self.device)
        self.metrics.add("conversations_resumed_total", source="disk")
        return Conversation(cache, pending)

    def _lock_file(self, name: str) -> bool:
        """Lock a conversation against other servers; ends with the process. Returns whether nobody else has."""
        if self.folder is None or fcntl is None:
            return True
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(name))
        except OSError:
            return False
        return True

    def _unlock_file(self, name: str) -> None:
        if self.folder is not None and fcntl is not None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, _place(name))

    def _count(self) -> None:
        self.metrics.set("conversations", len(self._held), place="memory")
        files = 0 if self.folder is None else len(list(self.folder.glob("*.json")))
        self.metrics.set("conversations", files, place="disk")


def _place(name: str) -> int:
    """The byte of the file of locks that stands for a conversation."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
