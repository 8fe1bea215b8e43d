"""How fast and how large: chunked scans against the token-by-token loop, window attention by length, a decode step.

    python examples/benchmark.py
    python examples/benchmark.py --decode --threads 2    # a token with the memory, and with the window alone

Prints the ratios that the documentation quotes, measured on this machine with one thread (``--threads`` for more).
"""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from typing import Any

import torch
from _common import Help, count, positive
from peak_memory import PeakMemory
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from ahn_layers import (
    Compressor,
    DeltaNet,
    GatedDeltaNet,
    HippocampalCache,
    LinearAttention,
    Mamba2,
    adapter_parameters,
    retrofit,
    window_only,
)
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


class Operations(TorchDispatchMode):
    """Counts the operations that run within its context, views too."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One more."""
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def decoding(window: int, sinks: int, repeats: int, layers: int) -> None:
    """Print what a token takes once the window is full, with the memory and with the window alone.

    The two take turns, so that they share what else the machine does.
    """
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49_152, num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    model: Any = retrofit(LlamaForCausalLM(config).eval(), GatedDeltaNet, window_size=window, num_sinks=sinks)
    for _, parameter in adapter_parameters(model):
        parameter.add_(0.02 * torch.randn_like(parameter))
    ids = torch.randint(config.vocab_size, (1, window + sinks + 8))
    arms: dict[str, Callable[[], Any]] = {"memory": nullcontext, "window alone": lambda: window_only(model)}
    caches: dict[str, HippocampalCache] = {name: HippocampalCache() for name in arms}
    counts, wall, cpu = {}, {name: [] for name in arms}, {name: [] for name in arms}
    for name, arm in arms.items():
        with arm():
            for part in (*ids[:, :-1].split(512, dim=1), ids[:, -1:]):
                model(part, cache=caches[name], use_cache=True, logits_to_keep=1)
            with Operations() as operations:
                model(ids[:, :1], cache=caches[name], use_cache=True)
        counts[name] = operations.count
    for i in tqdm(range(repeats), leave=False):
        for name, arm in arms.items():
            with arm():
                started = time.perf_counter(), time.thread_time()
                model(ids[:, i % ids.shape[1]][None], cache=caches[name], use_cache=True)
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.thread_time() - started[1])
    print(f"a token, SmolLM2-135M's shape with {layers} layers, window {window} + {sinks}, full, float32, "
          f"{torch.get_num_threads()} threads, shortest of {repeats}")  # fmt: skip
    for name in arms:
        times = f"{min(wall[name]) * 1e3:6.1f} ms, {min(cpu[name]) * 1e3:6.1f} ms of the main thread's CPU time"
        print(f"  {name:12} {counts[name]:6} operations, {times}")
    ratios = [min(u["memory"]) / min(u["window alone"]) for u in (wall, cpu)]
    print(f"  memory / window alone: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by CPU time")


def main(argv: list[str] | None = None) -> None:
    """Run the scans and the attention, or a decode step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--length", type=positive, default=4096, help="tokens for the scans")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[8192, 16384, 32768], help="tokens for the attention"
    )
    parser.add_argument("--decode", action="store_true", help="measure a decode step instead")
    parser.add_argument("--window", type=positive, default=1920, help="of the decode step")
    parser.add_argument("--sinks", type=count, default=128, help="of the decode step")
    parser.add_argument("--repeats", type=positive, default=50, help="tokens to decode")
    parser.add_argument("--layers", type=positive, default=30, help="layers of the model that decodes")
    parser.add_argument("--threads", type=positive, default=1, help="of PyTorch")
    parser.add_argument("--peak", type=positive, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(attention_peak(arguments.peak, arguments.backward))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {date.today()}")
    if arguments.decode:
        decoding(arguments.window, arguments.sinks, arguments.repeats, arguments.layers)
        return
    scans(arguments.length, heads=9, size=64)
    attention(arguments.lengths)


if __name__ == "__main__":
    main()
