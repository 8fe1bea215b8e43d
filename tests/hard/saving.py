"""Processes that are killed while they save, and disks that are full: what was saved before is still there, or the new.

Run it from a clone, for instance

    python -m tests.hard.saving --kills 300

A full disk is a small tmpfs where it can be mounted (as root), else a limit on the size of files.
"""

import argparse
import copy
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ahn_layers import GatedDeltaNet, HippocampalCache, MemoryState, MemoryStore, Window, load_adapter, save_adapter
from ahn_layers.files import digest
from ahn_layers.huggingface.decoder import CACHE
from tests.models import base, retrofitted, tokens, train_memory

KINDS = ("state", "cache", "adapter", "model")


class Versions:
    """Things of one kind that are saved in turn: version 0, version 1, ...

    Args:
        kind: which.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        torch.manual_seed(0)
        self.model = retrofitted(dtype=torch.float32)
        self.plain = base(dtype=torch.float32)

    def make(self, version: int) -> Any:
        """What is saved."""
        if self.kind in ("adapter", "model"):
            train_memory(self.model, seed=version)
            return self.model
        torch.manual_seed(version)
        if self.kind == "state":
            store = MemoryStore(Window(500), GatedDeltaNet(8, 8, 64))
            return store(*torch.randn(3, 1, 8, 600, 64), torch.randn(1, 600, 8))[1].clone()
        cache = HippocampalCache()
        with torch.no_grad():
            self.model(tokens(40, 20, seed=version), **{CACHE: cache})
        return cache

    def save(self, made: Any, folder: Path) -> None:
        """Save it into a folder."""
        if self.kind == "adapter":
            save_adapter(made, folder)
        elif self.kind == "model":
            made.save_pretrained(folder)
        else:
            made.save(folder / "file")

    def load(self, folder: Path) -> Any:
        """Load it."""
        if self.kind == "adapter":
            return load_adapter(copy.deepcopy(self.plain), folder)
        if self.kind == "model":
            return AutoModelForCausalLM.from_pretrained(folder)
        return (MemoryState if self.kind == "state" else HippocampalCache).load(folder / "file")

    def identity(self, made: Any) -> str:
        """The same for the same version."""
        if self.kind == "state":
            return digest(sorted(made.tensors().items()))
        if self.kind == "cache":
            held = [(f"{i}.{name}", u) for i, one in enumerate(made.layers) for name, u in one.state.tensors().items()]
            return digest(sorted(held))
        return digest(sorted(made.state_dict().items()))


def _save_again(versions: Versions, folder: Path, first: int, ready: Any) -> None:
    """Save one version after the other until killed."""
    torch.set_num_threads(1)
    version = first
    while True:
        made = versions.make(version)
        ready.send(versions.identity(made))
        versions.save(made, folder)
        ready.send("saved")
        version += 1


def try_kills(kind: str, count: int, seed: int = 0) -> dict[str, int]:
    """Kill processes while they save over what is there.

    Returns:
        How often the earlier version was there afterwards, how often the later one, and how often files were left over.
    """
    dice, found = random.Random(seed), {"earlier": 0, "later": 0, "left over": 0}
    versions = Versions(kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        versions.save(versions.make(0), folder)
        start = time.monotonic()
        versions.save(versions.make(0), folder)
        duration = time.monotonic() - start
        known = [versions.identity(versions.load(folder))]
        for i in range(count):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(
                target=_save_again, args=(versions, folder, 1000 * i + 1, theirs)
            )
            process.start()
            theirs.close()
            for _ in range(dice.choice((1, 1, 3))):
                known.append(ours.recv())
            time.sleep(dice.random() * duration * 1.5)
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            try:
                while ours.poll():
                    known.append(ours.recv())
            except EOFError:
                pass
            known = [identity for identity in known if identity != "saved"][-3:]
            identity = versions.identity(versions.load(folder))
            assert identity in known, f"{kind}: neither the earlier version nor the later"
            found["later" if identity == known[-1] else "earlier"] += 1
            known = [identity]
            for path in folder.glob("*.tmp"):
                found["left over"] += 1
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


@contextmanager
def full_disk(size: int) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """A folder on a disk that has room for so many bytes, and what a process there has to do first."""
    with tempfile.TemporaryDirectory() as name:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
        try:
            yield Path(name), (lambda: None) if mounted else (lambda: _limit(size // 2))
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", name], check=True)  # files may still be mapped


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def try_full_disk(kind: str) -> int:
    """Save onto disks of growing sizes that have room for one version, but not always for two.

    Returns:
        On how many of them saving was refused.
    """
    versions, refused = Versions(kind), 0
    with tempfile.TemporaryDirectory() as name:
        versions.save(versions.make(0), Path(name))
        needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in Path(name).rglob("*") if path.is_file())
    for tenths in range(11, 25, 2):
        with full_disk(needed * tenths // 10) as (folder, prepare):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(
                target=_save_twice, args=(versions, folder, prepare, theirs)
            )
            process.start()
            theirs.close()
            known = [ours.recv(), ours.recv()]
            error = ours.recv()
            process.join()
            identity = versions.identity(versions.load(folder))
            assert identity == known[0 if error else 1], f"{kind}: something else is there"
            assert not list(folder.glob("*.tmp*")), "something is left over"
            refused += bool(error)
    return refused


def _save_twice(versions: Versions, folder: Path, prepare: Callable[[], Any], connection: Any) -> None:
    torch.set_num_threads(1)
    versions.save(versions.make(0), folder)
    connection.send(versions.identity(versions.make(0)))
    made = versions.make(1)
    connection.send(versions.identity(made))
    prepare()
    error = ""
    try:
        versions.save(made, folder)
    except Exception as raised:
        error = repr(raised)
        full = isinstance(raised, OSError) and raised.errno in (errno.ENOSPC, errno.EFBIG)
        assert full or "No space left" in error or "File too large" in error, error
    connection.send(error)


def main() -> None:
    """All kinds."""
    parser = argparse.ArgumentParser(description="Killed while saving; full disks.")
    parser.add_argument("--kills", type=int, default=300, help="of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for kind in options.kind or KINDS:
        start = time.monotonic()
        found, refused = try_kills(kind, options.kills), try_full_disk(kind)
        print(
            f"{kind}: killed {options.kills} times, {found['earlier']} times the earlier version was there and "
            f"{found['later']} times the later one, never anything else ({found['left over']} temporary files were "
            f"left); full disk: {refused} of 7 saves refused, nothing lost; {time.monotonic() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
