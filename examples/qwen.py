r"""Chat with a Qwen model over a document of any length, in constant memory. Released AHN memories are for Qwen2.5.

    python examples/qwen.py                                      # Qwen2.5-0.5B-Instruct, no trained memory
    python examples/qwen.py --model Qwen/Qwen2.5-3B-Instruct --window 32640 --sinks 128 --document book.txt \
        --adapter ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-3B
    python examples/qwen.py --random-weights --prompt "Hello"    # no network; random replies

You will see the document being read with a running figure of the cache, the reply as it is written, and after each
turn the bytes held and, once the window is full, what full attention would hold. Each turn reads its own tokens only.
"""

from collections.abc import Sequence

from _chat import SMALL, main
from transformers import Qwen2Config


def run(argv: Sequence[str] | None = None) -> list[str]:
    """Chat; returns the replies."""
    config = Qwen2Config(**SMALL, num_key_value_heads=2)
    return main(argv, description=__doc__, config=config, default="Qwen/Qwen2.5-0.5B-Instruct")


if __name__ == "__main__":
    run()
