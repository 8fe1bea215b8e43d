"""An eviction policy of your own in ten lines: checked against the contract, then at work inside a language model.

    python examples/new_eviction.py

You will see the contract pass, and a small random Llama run far past its window with the policy. Takes seconds; nothing
is downloaded.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from _common import Help, positive
from transformers import LlamaConfig, LlamaForCausalLM

# --8<-- [start:eviction]
from ahn_layers import (
    Eviction,
    GatedDeltaNet,
    HippocampalCache,
    check_eviction,
    empty_slots,
    keep_best,
    retrofit,
    window_only,
)


class LargestKeys(Eviction):
    """Every key/value head keeps the tokens with its largest keys and folds the others."""

    def __init__(self, num_slots):
        super().__init__()
        self.num_slots = num_slots

    def init_kept(self, like):
        """Empty slots."""
        return empty_slots(like, self.num_slots)

    def push(self, kept, leaving):
        """Each token that leaves the window competes with those in the slots; the loser is folded."""
        return keep_best(kept, leaving, lambda tokens: tokens.k.norm(dim=-1))


# --8<-- [end:eviction]
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check the policy and run it.

    Returns:
        ``cache``: the cache after generation; ``gap``: how much the policy changed the logits.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--tokens", type=positive, default=400, help="length of the prompt (default: 400)")
    parser.add_argument("--new-tokens", type=positive, default=40, help="tokens to generate (default: 40)")
    parser.add_argument("--slots", type=positive, default=8, help="tokens kept in each key/value head (default: 8)")
    args = parser.parse_args(argv)

    check_eviction(LargestKeys, num_slots=args.slots)
    print(f"check_eviction(LargestKeys, num_slots={args.slots}): passed")

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).eval()
    retrofit(model, GatedDeltaNet, window_size=60, num_sinks=4, eviction=LargestKeys(args.slots))
    ids, cache = torch.randint(256, (1, args.tokens)), HippocampalCache()
    text = model.generate(ids, cache=cache, max_new_tokens=args.new_tokens, do_sample=False)
    print(f"{text.shape[1]} tokens read or written, {cache.nbytes:,} bytes held")
    with torch.no_grad(), window_only(model):
        without = model(ids).logits[0, -1]
    with torch.no_grad():
        gap = (without - model(ids).logits[0, -1]).abs().max().item()
    print(f"the kept tokens move the last logits by up to {gap:.3f}")
    return {"cache": cache, "gap": gap}


if __name__ == "__main__":
    main()
