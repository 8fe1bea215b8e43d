"""What ``gpu_benchmark.py`` measures of a conversation on a cache that is kept: the time of a token, turn by turn."""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from gpu_measurements import Clock, Results, build, forget_peak, peak, synchronize
from torch._dynamo.utils import counters
from transformers import DynamicCache

from ahn_layers import HippocampalCache, full_attention

TURNS = 3
ASKED = 200
"""New tokens of the prompt of every turn but the first."""
AT_MOST = 48
"""New tokens of a reply where steps are not recorded, each of which takes as long as 20 recorded ones."""


def kept(options: Namespace) -> Results:
    """Three turns: a step as one CUDA graph, plain steps of the same model, and full attention."""
    model = build(options)
    arms: dict[str, tuple[Callable[[Any], Any], type, dict[str, Any], int]] = {
        "memory": (nullcontext, HippocampalCache, {}, options.new_tokens),
        "memory, another conversation": (nullcontext, HippocampalCache, {}, options.new_tokens),
        "memory, not recorded": (nullcontext, HippocampalCache, {"cache_implementation": "dynamic"}, AT_MOST),
        "full attention": (full_attention, DynamicCache, {}, AT_MOST),
    }
    results: Results = {}
    for arm, (mode, cache, how, count) in arms.items():
        with mode(model):
            for turn, found in enumerate(converse(model, options, cache(), min(count, options.new_tokens), **how), 1):
                results[f"{arm}, turn {turn}"] = found
                print(f"kept, {arm}, turn {turn}: {found}", flush=True)
    return results


def converse(model: Any, options: Namespace, cache: Any, new: int, **how: Any) -> list[Results]:
    """What each turn takes."""
    device, found = options.device, []
    ids = torch.randint(0, model.config.vocab_size, (1, options.length), device=device)
    for _ in range(TURNS):
        clock, compiled = Clock(), counters["stats"]["unique_graphs"]
        forget_peak(device)
        synchronize(device)
        begin = time.perf_counter()
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            cache=cache, logits_processor=[clock], **how,
        )  # fmt: skip
        synchronize(device)
        end = time.perf_counter()
        steady = clock.stamps[4:]
        found.append({
            "ms": 1e3 * (steady[-1] - steady[0]) / (len(steady) - 1),
            "median, ms": 1e3 * median(b - a for a, b in pairwise(steady)),
            "prompt, s": clock.stamps[0] - begin, "turn, s": end - begin,
            "compiled": float(counters["stats"]["unique_graphs"] - compiled),
            "held, GB": sum(u.nbytes for layer in cache.layers for u in (layer.keys, layer.values)) / 1e9,
            "peak, GB": peak(device),
        })  # fmt: skip
        asked = torch.randint(0, model.config.vocab_size, (1, ASKED), device=device)
        ids = torch.cat((ids, asked), dim=1)
    return found
