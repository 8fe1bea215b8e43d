"""What attention with a bounded memory costs: the paper's formulas, beside what is really allocated."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .attention import HippocampalAttention
from .compressor import Compressor, check_size
from .flops import Sizes, cache_ratio, memory_parameters, mixing_flops, model_flops, num_gates
from .record import find_retrofitted
from .retrofit import full_attention

__all__ = [
    "CostReport",
    "CostRow",
    "Sizes",
    "cache_ratio",
    "cost_report",
    "memory_parameters",
    "mixing_flops",
    "model_flops",
    "num_gates",
]


@dataclass
class CostRow:
    """Costs at one length, for one sequence.

    Attributes:
        length: tokens.
        full_flops: of the model with full attention.
        window_ratio: FLOPs of sinks + window, relative to that.
        memory_ratio: FLOPs with the memory, relative to that.
        cache_ratio: the paper's cache figure, in numbers.
        full_bytes: a full cache of the retrofitted layers, in the model's dtype.
        state_bytes: what the memory states really hold: keys, values, write gates, lengths, float32 states.
        measured: seconds and peak bytes of a forward pass by arm, if measured.
    """

    length: int
    full_flops: int
    window_ratio: float
    memory_ratio: float
    cache_ratio: float
    full_bytes: int
    state_bytes: int
    measured: dict[str, tuple[float, int | None]] = field(default_factory=dict)


@dataclass
class CostReport:
    """The result of [`cost_report`][ahn_layers.cost.cost_report]; ``print`` it, or ``plot`` it.

    Attributes:
        name: class of the model.
        capacity: sinks + window.
        parameters: of the memory, in all layers.
        rows: one per length.
    """

    name: str
    capacity: int
    parameters: int
    rows: list[CostRow]

    def __str__(self) -> str:
        head = ("tokens", "FLOPs, full", "window", "memory", "cache (paper)", "full cache", "state", "state / full")
        cells: list[tuple[str, ...]] = [head]
        for row in self.rows:
            ratios = (f"{100 * u:.2f} %" for u in (row.window_ratio, row.memory_ratio, row.cache_ratio))
            held = (_bytes(row.full_bytes), _bytes(row.state_bytes), f"{100 * row.state_bytes / row.full_bytes:.2f} %")
            cells.append((f"{row.length:,}", f"{row.full_flops:.3e}", *ratios, *held))
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells]
        lines.insert(1, "-" * len(lines[0]))
        for row in self.rows:
            for arm, (seconds, peak) in row.measured.items():
                memory = "" if peak is None else f", peak {_bytes(peak)} above the weights"
                lines.append(f"measured, {row.length:,} tokens, {arm}: {seconds:.2f} s{memory}")
        title = f"{self.name}: capacity {self.capacity:,}, memory of {self.parameters:,} parameters"
        return "\n".join([title, *lines])

    def plot(self, path: str) -> None:
        """Draw relative FLOPs and bytes over the length to an image file; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib.") from error

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        lengths = [row.length for row in self.rows]
        left.plot(lengths, [1.0] * len(lengths), "o-", label="full attention")
        left.plot(lengths, [row.window_ratio for row in self.rows], "o-", label="window")
        left.plot(lengths, [row.memory_ratio for row in self.rows], "o--", label="window + memory")
        right.plot(lengths, [row.full_bytes for row in self.rows], "o-", label="full attention")
        right.plot(lengths, [row.state_bytes for row in self.rows], "o--", label="window + memory")
        for axes, title in ((left, "FLOPs, relative"), (right, "bytes per sequence")):
            axes.set(xscale="log", xlabel="tokens", title=title, ylim=(0, None))
            axes.legend()
        figure.savefig(path, dpi=120)


def cost_report(model: nn.Module, lengths: list[int], *, measure: bool = False) -> CostReport:
    """What a retrofitted model costs per sequence: the paper's figures, and what is really allocated.

    Args:
        model: a retrofitted transformers model with a memory, all of whose layers are alike and without slots.
        lengths: numbers of tokens.
        measure: also run each length once, on the model's device, with full attention and with the memory: seconds,
            and on a GPU the peak of allocated memory.

    Returns:
        The report: ``print`` it, read its ``rows``, or ``plot`` it.

    Raises:
        ValueError: if the model is not retrofitted, has no memory, its layers differ in their window or keep tokens in
            slots, its config lacks a size, or a length is not a positive whole number.
    """
    inner, _ = find_retrofitted(model)
    for length in lengths:
        check_size("length", length)
    blocks = [m for m in inner.modules() if isinstance(m, HippocampalAttention)]
    compressor = blocks[0].memory.compressor
    if compressor is None:
        raise ValueError("the model was retrofitted without a compressor: expected a memory to report on.")
    capacities = {block.memory.window.capacity for block in blocks}
    if len(capacities) > 1:
        raise ValueError(
            f"windows of the capacities {sorted(capacities)}: the formulas are for equal layers. memory_report "
            "has the bytes of each layer."
        )
    keeping = next((u for u in (b.memory.eviction for b in blocks) if not u.folds_all), None)
    if keeping is not None:
        raise ValueError(
            f"{keeping} keeps tokens beside the window: the formulas are for sinks and window, and would not count "
            "them. memory_report has the bytes of each layer."
        )
    sizes, capacity = Sizes.of(inner.config), capacities.pop()
    gates, numbers = num_gates(compressor), sum(u.numel() for u in _empty(compressor))
    rows = []
    for length in lengths:
        full = model_flops(sizes, length)
        row = CostRow(
            length=length,
            full_flops=full,
            window_ratio=model_flops(sizes, length, capacity) / full,
            memory_ratio=model_flops(sizes, length, capacity, gates) / full,
            cache_ratio=cache_ratio(sizes, length, capacity, num_states=numbers / sizes.head_dim**2),
            full_bytes=sum(_full_bytes(block, length) for block in blocks),
            state_bytes=sum(_state_bytes(block, length) for block in blocks),
        )
        if measure:
            with full_attention(model):
                row.measured["full attention"] = _measure(model, length, sizes.vocab_size)
            row.measured["memory"] = _measure(model, length, sizes.vocab_size)
        rows.append(row)
    parameters = sum(p.numel() for b in blocks for p in b.memory.parameters())
    return CostReport(type(inner).__name__, capacity, parameters, rows)


def _full_bytes(block: Any, length: int) -> int:
    """Keys and values of a full cache, in the model's dtype."""
    sizes = block.found.sizes
    per_token: int = sizes["num_kv_heads"] * (sizes["head_dim"] + sizes["value_dim"]) * block.found.like.element_size()
    return per_token * length


def _state_bytes(block: Any, length: int) -> int:
    """What one row of a layer's state holds after ``length`` tokens: slots are allocated as they fill."""
    store, like = block.memory, block.found.like
    total: int = store.bytes_per_row(like, **block.found.sizes)
    precise = torch.promote_types(like.dtype, torch.float32)
    numbers = sum(u.numel() for u in _empty(store.compressor))
    fixed = numbers * precise.itemsize + torch.long.itemsize  # and the count of tokens seen
    return fixed + (total - fixed) * min(length, store.window.capacity) // store.window.capacity


def _empty(compressor: Compressor) -> list[torch.Tensor]:
    """The tensors of a state, without their values."""
    memory = compressor.init_state(1, torch.zeros((), device="meta"))
    return [memory] if isinstance(memory, torch.Tensor) else list(memory.values())


@torch.no_grad()
def _measure(model: nn.Module, length: int, vocab_size: int) -> tuple[float, int | None]:
    """Seconds of one forward pass with a cache, and on a GPU the peak of allocated memory above what was there."""
    device = next(model.parameters()).device
    ids = torch.randint(vocab_size, (1, length), device=device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    if not on_gpu:
        return time.perf_counter() - start, None
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) - before


def _bytes(count: int) -> str:
    """A number of bytes for people."""
    size, unit = float(count), 0
    while size >= 1024 and unit < 4:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}" if unit else f"{count} B"
