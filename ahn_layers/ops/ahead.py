"""Triton kernels compiled side by side, before they are needed.

Triton compiles a kernel when it is first launched, so that a process waits for one after the other. Here a function
runs on tensors that have no memory: its launches are noted, not made, and what they need is compiled in threads. Most
of a compilation does not hold Python's lock, so that all kernels together take little longer than the slowest one.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .triton_forms import OPERATORS

_THREADS = max(2, min(16, os.cpu_count() or 1))
"""Compilations at a time."""


@dataclass(frozen=True)  # to triton a tuple would be several arguments
class Pointer:
    """Stands for a tensor where a kernel is compiled: all that matters is its type, and how it is aligned.

    Attributes:
        dtype: of its elements.
        offset: bytes from an aligned address.
    """

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        """An address."""
        return self.offset

    def ptr_range(self) -> int:
        """As of triton's own stand-in."""
        return 0


class Launch(NamedTuple):
    """A kernel, its arguments, and its constants and options."""

    kernel: "Kernel"
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, device: torch.device) -> None:
        """Compile and load what it needs; of each kernel one at a time, since launches may need the same."""
        with self.kernel.lock, torch.cuda.device(-1 if device.index is None else device.index):
            compiled = self.kernel.function.warmup(*self.args, grid=(1,), **self.options)
            compiled.run  # noqa: B018  # it is loaded when this is first asked for


class Kernel:
    """A function of Triton that is launched as ``kernel[grid](*args, **options)``.

    A launch waits for the compilations of this kernel that are under way in threads: nothing is compiled twice.

    Args:
        function: what ``triton.jit`` made.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.coming: list[Future[None]] = []
        self.lock = threading.Lock()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """What launches it on this grid."""
        noted = _NOW.noted
        if noted is not None:
            return lambda *args, **options: noted.append(Launch(self, tuple(map(_without_memory, args)), options))
        if _STARTING or self.coming:
            wait([*_STARTING])
            wait(self.coming)
            self.coming = [future for future in self.coming if not future.done()]
        return self.function[grid]  # type: ignore[no-any-return]


class _Now(threading.local):
    """What this thread does instead of launching kernels."""

    noted: list[Launch] | None = None


_NOW = _Now()
_STARTING: list[Future[None]] = []
"""Functions that run to have their launches noted."""


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """Inside, new tensors have no memory, and this thread launches none of our kernels: each launch is noted."""
    before, _NOW.noted = _NOW.noted, []
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Operators():
            yield _NOW.noted
    finally:
        _NOW.noted = before


class _Operators(TorchDispatchMode):
    """Our operators run down to their launches on tensors without memory too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return OPERATORS.get(function.name(), function)(*args, **kwargs or {})


def compile_ahead(function: Callable[[], Any], device: torch.device) -> None:
    """Compile, in threads, the kernels that a function launches. If that fails, they are compiled when needed.

    Args:
        function: makes its tensors itself and changes nothing else.
        device: the GPU that will run the kernels.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="compile-ahead")

    def run() -> None:
        with noting() as noted, suppress(Exception):  # what was noted before may be of use
            function()
        known: list[Launch] = []
        for launch in noted:
            if launch not in known:
                known.append(launch)
                launch.kernel.coming.append(pool.submit(launch.compile, device))

    def end(starting: Future[None]) -> None:
        _STARTING.remove(starting)
        pool.shutdown(wait=False)

    starting = pool.submit(run)
    _STARTING.append(starting)
    starting.add_done_callback(end)


def _without_memory(u: Any) -> Any:
    return Pointer(u.dtype, int(u.storage_offset()) * u.element_size()) if isinstance(u, FakeTensor) else u
