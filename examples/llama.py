"""Chat with a Llama model over a document of any length, in constant memory.

    python examples/llama.py                                     # SmolLM2-135M-Instruct, which is a Llama
    python examples/llama.py --document book.txt --prompt "What is this text about?"
    python examples/llama.py --model meta-llama/Llama-3.2-1B-Instruct --window 8064 --document book.txt
    python examples/llama.py --random-weights --prompt "Hello"   # no network; random replies

You will see the document being read with a running figure of the cache, the reply as it is written, and after each
turn the bytes held and, once the window is full, what full attention would hold. Each turn reads its own tokens only.
"""

from collections.abc import Sequence

from _chat import SMALL, main
from transformers import LlamaConfig


def run(argv: Sequence[str] | None = None) -> list[str]:
    """Chat; returns the replies."""
    return main(argv, description=__doc__, config=LlamaConfig(**SMALL, num_key_value_heads=2), default=None)


if __name__ == "__main__":
    run()
