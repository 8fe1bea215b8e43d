"""A million tokens through one cache: its bytes stay the same, the loss does not drift, and nothing is infinite.

The model is small and real: bytes of Python's standard library, learned on the spot in a few minutes, then its memory.
The stream is one passage over and over, so that the loss of each pass can be compared with that of the first.

Run it from a clone, for instance

    python -m tests.hard.streaming --tokens 1000000
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ahn_layers import GatedDeltaNet, HippocampalCache, SalientSlots, adapter_parameters, retrofit
from ahn_layers.huggingface.decoder import CACHE

LENGTH, WINDOW, SINKS = 512, 112, 16
"""Bytes that the base model is trained on, and what of them the memory's window keeps."""


def stream_of_bytes(count: int) -> Tensor:
    """Source files of the standard library, one after the other."""
    data = bytearray()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        data += path.read_bytes()
        if len(data) >= count:
            break
    return torch.frombuffer(data[:count], dtype=torch.uint8).long()


def train(model: Any, parameters: list[torch.nn.Parameter], text: Tensor, steps: int, rate: float) -> float:
    """Next-byte prediction on random crops.

    Returns:
        The mean loss of the last ten steps.
    """
    optimizer, dice, losses = torch.optim.AdamW(parameters, lr=rate), torch.Generator().manual_seed(0), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        starts = torch.randint(len(text) - LENGTH, (8,), generator=dice).tolist()
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / len(losses[-10:])


def trained_model(steps: int, eviction: bool) -> tuple[Any, str]:
    """A byte-level model with a memory, both trained.

    Returns:
        The model, and what training came to.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    text, model = stream_of_bytes(3_000_000)[500_000:], LlamaForCausalLM(config)
    base = train(model, list(model.parameters()), text, steps, 3e-3)
    model.requires_grad_(False)
    slots = SalientSlots(16, score="key_norm", rate=1e-3) if eviction else None
    retrofit(model, GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS, eviction=slots)
    memory = [parameter.requires_grad_() for _, parameter in adapter_parameters(model)]
    with_memory = train(model, memory, text, steps // 4, 3e-3)
    return model.eval(), f"loss {base:.3f} nats a byte with full attention, {with_memory:.3f} with the memory"


@torch.no_grad()
def stream(model: Any, passage: Tensor, passes: int, piece: int) -> tuple[list[float], set[int], HippocampalCache]:
    """Read a passage several times in one cache.

    Returns:
        The mean loss of each pass, the sizes of the cache in bytes once the window was full, and the cache.
    """
    cache, losses, sizes = HippocampalCache(), [], set()
    following = torch.cat((passage[1:], passage[:1]))
    for _ in range(passes):
        total = 0.0
        for ids, targets in zip(passage.split(piece), following.split(piece), strict=True):
            logits = model(ids[None], **{CACHE: cache}).logits[0]
            assert bool(logits.isfinite().all()), f"not finite after {int(cache.get_seq_length()):,} tokens"
            total += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
            if int(cache.get_seq_length()) > 2 * LENGTH:
                sizes.add(cache.nbytes)
        losses.append(total / len(passage))
    for layer in cache.layers:
        for name, u in layer.state.tensors().items():
            assert not u.is_floating_point() or bool(u.isfinite().all()), f"{name} is not finite"
    return losses, sizes, cache


def drift(losses: list[float]) -> float:
    """The largest difference of a later pass from the second, as a share; the first one begins with nothing."""
    return max(abs(loss / losses[1] - 1) for loss in losses[1:])


def main() -> None:
    """Train, stream, compare."""
    parser = argparse.ArgumentParser(description="A long stream.")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--passage", type=int, default=50_000, help="tokens of the passage that is repeated")
    parser.add_argument("--steps", type=int, default=600, help="of training the base")
    parser.add_argument("--piece", type=int, default=1000, help="tokens of a call")
    parser.add_argument("--slots", action="store_true", help="with slots for salient tokens too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    model, said = trained_model(options.steps, options.slots)
    print(
        f"{sum(u.numel() for u in model.parameters()):,} parameters, {said}; {time.monotonic() - start:.0f} s",
        flush=True,
    )
    start, passage = time.monotonic(), stream_of_bytes(options.passage)
    passes = max(2, options.tokens // options.passage)
    losses, sizes, cache = stream(model, passage, passes, options.piece)
    seconds = time.monotonic() - start
    print(f"{int(cache.get_seq_length()):,} tokens in {seconds:.0f} s, a cache of {sorted(sizes)} bytes")
    print("loss of each pass: " + " ".join(f"{loss:.4f}" for loss in losses))
    step = copy.deepcopy(cache)  # single tokens from here on give what a piece gives
    with torch.no_grad():
        whole = model(passage[None, :40], **{CACHE: cache}).logits
        single = torch.cat([model(passage[None, i : i + 1], **{CACHE: step}).logits for i in range(40)], dim=1)
    difference = float((whole - single).abs().max())
    print(
        f"largest drift from the second pass: {drift(losses):.2%}; pieces and single tokens differ by {difference:.1e}"
    )
    if len(sizes) != 1 or drift(losses) > 0.02:
        sys.exit("the cache grows, or the loss drifts")


if __name__ == "__main__":
    main()
