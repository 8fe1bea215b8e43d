"""Chat with a Mistral model over a document of any length, in constant memory.

    python examples/mistral.py                                   # Mistral-7B-Instruct-v0.3: 15 GB in bfloat16
    python examples/mistral.py --dtype bfloat16 --window 8064 --document book.txt --prompt "What is this text about?"
    python examples/mistral.py --random-weights --prompt "Hello" # no network; random replies

Models with a sliding window of their own (v0.1: 4,096 tokens) take a window that fits into it: ``--window 3968``.
You will see the document being read with a running figure of the cache, the reply as it is written, and after each
turn the bytes held and, once the window is full, what full attention would hold. Each turn reads its own tokens only.
"""

from collections.abc import Sequence

from _chat import SMALL, main
from transformers import MistralConfig


def run(argv: Sequence[str] | None = None) -> list[str]:
    """Chat; returns the replies."""
    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)
    return main(argv, description=__doc__, config=config, default="mistralai/Mistral-7B-Instruct-v0.3")


if __name__ == "__main__":
    run()
