"""What ``gpu_benchmark.py`` measures of several prompts at once, and of full attention that reads in pieces."""

from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import torch
from gpu_measurements import Results, build, forget_peak, measure, peak

from ahn_layers import full_attention

PIECE = 8192
"""Tokens that full attention reads at a time, beside reading all of them at once."""


def batches(options: Namespace) -> Results:
    """Seconds of ``generate`` for one token, by the number of prompts: inside the window, and a quarter longer."""
    model, device = build(options), options.device
    capacity = options.window + options.sinks
    cases: list[tuple[str, int, int, int | None]] = [
        ("memory", rows, length, None)
        for length in (capacity, capacity + capacity // 4)
        for rows in (1, *options.batches)
    ]
    cases += [("full", 1, capacity, None), ("full", 1, options.length, None), ("full", 1, options.length, PIECE)]
    results: Results = {}
    for arm, rows, length, piece in cases:
        ids = torch.randint(0, model.config.vocab_size, (rows, length), device=device)
        how: dict[str, Any] = {} if piece is None else {"prefill_chunk_size": piece}

        def run(ids: torch.Tensor = ids, how: dict[str, Any] = how) -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **how)

        with full_attention(model) if arm == "full" else nullcontext():
            forget_peak(device)
            first, seconds = measure(run, device), measure(run, device, 2)
        name = f"{arm}, {rows} x {length:,}" + (f", pieces of {piece:,}" if piece else "")
        results[name] = {"s": seconds, "s a row": seconds / rows, "first, s": first, "peak, GB": peak(device)}
        print(f"batches, {name}: {results[name]}", flush=True)
    return results
