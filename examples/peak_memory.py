"""Measure the peak memory of a block of code."""

import ctypes
import gc
import re
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """The most memory that a ``with`` block added at any time.

    On a GPU the tensors that PyTorch allocated; on a CPU under Linux the resident memory of the process, reset by the
    kernel at the start. ``nbytes`` is None where neither is known.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.nbytes: int | None = None

    @property
    def meaning(self) -> str:
        """What ``nbytes`` counts."""
        return "tensors on the GPU" if self.cuda else "resident memory of the process, with its allocator's slack"

    def __enter__(self) -> "PeakMemory":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self._before: int | None = torch.cuda.memory_allocated(self.cuda)
        else:
            self._before = _reset_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = torch.cuda.max_memory_allocated(self.cuda) if self.cuda else _resident("VmHWM")
        if self._before is not None and peak is not None:
            self.nbytes = peak - self._before


def _reset_resident() -> int | None:
    """Set the kernel's high-water mark of this process to what is resident now, and return that."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed, which would hide what comes next
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    """A field of /proc/self/status, in bytes."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
