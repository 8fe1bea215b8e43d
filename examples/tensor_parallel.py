"""Split a model by its heads over several processes, its memory with it, and let it continue a text.

    torchrun --nproc-per-node 3 examples/tensor_parallel.py    # SmolLM2-135M-Instruct has 3 key/value heads
    python examples/tensor_parallel.py                         # the same text from one process

On GPUs each process takes its own; without one they share the cores.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Help, find_adapter, positive, user_errors
from smollm2 import load_tokenizer, smollm2_folder
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from ahn_layers import load_adapter, memory_report

TRAINED = Path(__file__).parent / "adapters" / "smollm2-135m-instruct-gdn"
"""A trained memory for the default model."""


def load(name: str | None, adapter: str | Path, processes: int) -> tuple[Any, Any]:
    """A model with a memory, split if there are several processes, and its tokenizer."""
    tokenizer = load_tokenizer(name)
    source = str(name or smollm2_folder())
    split = {} if processes == 1 else {"distributed_config": DistributedConfig(tp_plan="auto")}
    model = AutoModelForCausalLM.from_pretrained(source, **split).eval()
    return load_adapter(model, adapter), tokenizer


def main(argv: Sequence[str] | None = None) -> str:
    """Load, report and generate; every process does the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Help)
    parser.add_argument("--model", help="folder or hub id of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--adapter", default=TRAINED, help="trained memory: folder, file or hub id")
    parser.add_argument("--repeat", type=positive, default=500, help="how often the prompt says the same sentence")
    parser.add_argument("--max-new-tokens", type=positive, default=30, help="tokens to generate")
    args = parser.parse_args(argv)

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with user_errors("tensor_parallel"):
        adapter = find_adapter(args.adapter) or args.adapter
        model, tokenizer = load(args.model, adapter, processes)
    first = int(os.environ.get("RANK", "0")) == 0
    prompt = tokenizer("The hippocampus turns what is left of the day into memory. " * args.repeat, return_tensors="pt")
    out = model.generate(**prompt.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)
    continuation = str(tokenizer.decode(out[0, prompt.input_ids.shape[1] :]))
    if first:
        print(f"{memory_report(model)}\n{prompt.input_ids.shape[1]:,} tokens, then: {continuation}")
    if processes > 1:
        torch.distributed.destroy_process_group()
    return continuation


if __name__ == "__main__":
    main()
