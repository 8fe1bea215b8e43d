"""A compressor of your own in ten lines: checked against the contract, then at work inside a language model.

    python examples/new_compressor.py

You will see the contract pass, a small random Llama run with the new memory far past its window, and how many bytes it
holds while it does. Takes seconds; nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from _common import Help, positive
from transformers import LlamaConfig, LlamaForCausalLM

# --8<-- [start:compressor]
from ahn_layers import Compressor, HippocampalCache, check_compressor, outer, retrofit, window_only


class MovingAverage(Compressor):
    """An exponential moving average of ``k v^T``."""

    def fold(self, state, k, v):
        """Forget one percent, add the token that leaves the window."""
        return 0.99 * state + outer(k, v)


# --8<-- [end:compressor]
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check the compressor and run it.

    Returns:
        ``cache``: the cache after generation; ``gap``: how much the memory changed the logits.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--tokens", type=positive, default=400, help="length of the prompt (default: 400)")
    parser.add_argument("--new-tokens", type=positive, default=40, help="tokens to generate (default: 40)")
    args = parser.parse_args(argv)

    check_compressor(MovingAverage)
    print("check_compressor(MovingAverage): passed")

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).eval()
    retrofit(model, MovingAverage, window_size=60, num_sinks=4)
    for layer in model.model.layers:  # an untrained memory adds nothing: pretend that it was trained
        torch.nn.init.normal_(layer.self_attn.memory.compressor.o_proj.weight, std=0.1)

    ids, cache = torch.randint(256, (1, args.tokens)), HippocampalCache()
    text = model.generate(ids, cache=cache, max_new_tokens=args.new_tokens, do_sample=False)
    print(f"{text.shape[1]} tokens read or written, {cache.nbytes:,} bytes held: 64 slots and the memory per layer")
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
        with window_only(model):
            gap = (logits - model(ids).logits[0, -1]).abs().max().item()
    print(f"the memory moves the last logits by up to {gap:.3f}")
    return {"cache": cache, "gap": gap}


if __name__ == "__main__":
    main()
