"""Read a long prefix once; fork it, save it, and resume it in another process, bit for bit.

    python examples/sessions.py                              # a small random model, seconds, no download
    python examples/sessions.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # or any causal language model

You will see two continuations grow from one cache that stays as it was, the size of the file it is saved to, and a
second process that loads the file and computes the same logits: equal in every bit, not nearly.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Help, positive, user_errors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ahn_layers import GatedDeltaNet, HippocampalCache, adapter_parameters, retrofit

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(name: str | None) -> Any:
    """The same model in every process: weights of a checkpoint, or of a fixed seed."""
    torch.manual_seed(0)
    if name is None:
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **SIZES))
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    retrofit(model.eval(), GatedDeltaNet, window_size=96, num_sinks=4)
    for _, parameter in adapter_parameters(model):  # pretend that the memory was trained, so that it matters
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
def feed(model: Any, ids: Tensor, cache: HippocampalCache) -> Tensor:
    """Logits of new tokens; the cache takes the tokens in."""
    return model(ids, cache=cache, use_cache=True).logits


def prefix_and_questions(vocabulary: int, length: int) -> tuple[Tensor, Tensor]:
    """A long prefix ``(1, length)``, and two ways to go on ``(2, 20)``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    return ids, torch.randint(vocabulary, (2, 20), generator=generator)


def resume(name: str | None, length: int, folder: Path) -> None:
    """What the second process does: load the cache and go on from it."""
    model = build(name)
    cache = HippocampalCache.load(folder / "prefix.safetensors")
    _, questions = prefix_and_questions(model.config.vocab_size, length)
    save_file({"logits": feed(model, questions[:1], cache)}, folder / "resumed.safetensors")
    print(f"process {os.getpid()}: resumed after {cache.get_seq_length() - questions.shape[1]} tokens")


def main(argv: Sequence[str] | None = None) -> dict[str, bool]:
    """Fork, save and resume.

    Returns:
        ``forked``: the prefix was untouched by its forks; ``resumed``: the other process agrees in every bit.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", help="folder or hub id (default: a small random model)")
    parser.add_argument("--tokens", type=positive, default=1000, help="length of the prefix (default: 1000)")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.resume:
        resume(args.model, args.tokens, args.resume)
        return {}

    with user_errors("sessions"):
        model = build(args.model)
    ids, questions = prefix_and_questions(model.config.vocab_size, args.tokens)
    prefix = HippocampalCache()
    feed(model, ids, prefix)  # read once
    first = feed(model, questions[:1], prefix.clone())
    second = feed(model, questions[1:], prefix.clone())
    again = feed(model, questions[:1], prefix.clone())
    forked = torch.equal(first, again)
    differ = (first - second).abs().max().item()
    print(f"process {os.getpid()}: {args.tokens} tokens read once, {prefix.nbytes:,} bytes held")
    print(
        f"two continuations differ by up to {differ:.2f}; the first one repeated from the prefix is identical: {forked}"
    )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix.save(folder / "prefix.safetensors")
        print(f"saved: {(folder / 'prefix.safetensors').stat().st_size:,} bytes")
        model_argument = [] if args.model is None else ["--model", args.model]
        command = [sys.executable, __file__, "--tokens", str(args.tokens), "--resume", name, *model_argument]
        subprocess.run(command, check=True)
        resumed = torch.equal(load_file(folder / "resumed.safetensors")["logits"], first)
    print(f"logits of the two processes are identical: {resumed}")
    return {"forked": forked, "resumed": resumed}


if __name__ == "__main__":
    main()
