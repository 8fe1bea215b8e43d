"""How fast and how large: chunked scans against the token-by-token loop, and window attention by length.

    python examples/benchmark.py

Prints the ratios that the documentation quotes, measured on this machine, with one thread.
"""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from _common import positive
from peak_memory import PeakMemory
from tqdm import tqdm

from ahn_layers import Compressor, DeltaNet, GatedDeltaNet, LinearAttention, Mamba2
from ahn_layers.ops.attention.window_attention import window_attention

SEGMENT = 1024  # as in MemoryStore


def best_of(repeats: int, function: Callable[[], object]) -> float:
    """Shortest of a few runs, in seconds, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def scan_times(compressor: Compressor, length: int, *, chunked: bool, repeats: int) -> tuple[float, float]:
    """Seconds of a forward pass, and of a forward and a backward pass, over one sequence."""
    heads, size = compressor.num_heads, compressor.head_dim
    q, k, v = torch.randn(3, 1, heads, length, size)
    gates = {
        name: gate.detach() for name, gate in compressor.gates(torch.randn(1, length, compressor.hidden_size)).items()
    }
    scan = compressor.scan if chunked else compressor.loop

    def forward(q: Any, k: Any, v: Any, gates: dict[str, Any]) -> Any:
        state, total = compressor.init_state(1, q), 0.0
        for start in range(0, length, SEGMENT):
            part = slice(start, start + SEGMENT)
            now = {name: gate[:, :, part] for name, gate in gates.items()}
            reading, state = scan(state, q[:, :, part], k[:, :, part], v[:, :, part], now)
            total = total + reading.sum()
        return total

    def both() -> None:
        inputs = [u.clone().requires_grad_() for u in (q, k, v)]
        forward(*inputs, {name: gate.clone().requires_grad_() for name, gate in gates.items()}).backward()

    with torch.no_grad():
        seconds = best_of(repeats, lambda: forward(q, k, v, gates))
    return seconds, best_of(repeats, both)


def scans(length: int, heads: int, size: int) -> None:
    """Print how many times faster the chunked scan is."""
    print(f"chunked scan against the loop, T={length}, H={heads}, D={size}, float32, one thread")
    for kind in tqdm((LinearAttention, DeltaNet, GatedDeltaNet, Mamba2), leave=False):
        compressor = kind(heads * size, heads, size)
        slow = scan_times(compressor, length, chunked=False, repeats=1)
        fast = scan_times(compressor, length, chunked=True, repeats=5)
        ratios = [a / b for a, b in zip(slow, fast, strict=True)]
        tqdm.write(
            f"  {kind.__name__:16} forward {ratios[0]:5.1f} times, forward + backward {ratios[1]:5.1f} times faster"
        )


def attention_peak(length: int, backward: bool) -> int:
    """Bytes that window attention needs beyond its inputs; meant to run in a process of its own."""
    q, k, v = torch.randn(3, 1, 9, length, 64, requires_grad=backward).unbind()
    rank = torch.arange(length)
    with PeakMemory(q.device) as peak:
        out = window_attention(q, k[:, :, :128], v[:, :, :128], k, v, rank, window_size=1920, num_sinks=128)
        if backward:
            out.sum().backward()
    return peak.nbytes or 0


def attention(lengths: list[int]) -> None:
    """Print the peak memory of window attention by length, each in a fresh process."""
    print("peak memory of window attention beyond its inputs, 128 sinks + 1920, H=9, D=64, float32")
    for length in lengths:
        peaks = []
        for backward in (False, True):
            command = [sys.executable, __file__, "--peak", str(length)] + ["--backward"] * backward
            peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 2**20)
        dense = length**2 / 2**20
        print(f"  T={length:6}: forward {peaks[0]:6.0f} MiB, forward + backward {peaks[1]:6.0f} MiB", end="")
        print(f" (a dense mask: {dense:.0f} MiB)")


def main(argv: list[str] | None = None) -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=positive, default=4096, help="tokens for the scans")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[8192, 16384, 32768], help="tokens for the attention"
    )
    parser.add_argument("--peak", type=positive, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.peak:
        print(attention_peak(arguments.peak, arguments.backward))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {date.today()}")
    scans(arguments.length, heads=9, size=64)
    attention(arguments.lengths)


if __name__ == "__main__":
    main()
