"""Memory runs out at any operation of a prefill: the cache goes on as before, or says that it cannot.

Run it from a clone, for instance

    python -m tests.hard.exhausted --failures 400
"""

import argparse
import time
from typing import Any

import torch

from ahn_layers import HippocampalCache, SalientSlots
from ahn_layers.huggingface.decoder import CACHE
from tests.hard.stores import Interrupt
from tests.models import retrofitted, tokens

CASES = {
    "first prompt, longer than the window": (0, 40),
    "a prompt in a cache that is not full": (3, 4),
    "a prompt that fills the cache": (5, 30),
    "a prompt in a full cache": (30, 20),
}
"""Tokens in the cache, and in the prompt."""


def operations(model: Any, cache: Any, ids: torch.Tensor) -> int:
    """How many operations a call has."""
    counter = Interrupt(1 << 40, RuntimeError())
    with counter:
        generate(model, cache, ids)
    return (1 << 40) - counter.left


def generate(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """The prompt in pieces, and two tokens after it."""
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False, "prefill_chunk_size": 11}
    return model.generate(ids, **options, **{CACHE: cache})


def try_failures(count: int) -> dict[str, dict[str, int]]:
    """Let memory run out at as many places, evenly spread over each case.

    Returns:
        For each case, how often the same cache went on, and how often a copy from before had to.
    """
    model, found = retrofitted(eviction=SalientSlots(3)), {}
    for name, (held, new) in CASES.items():
        whole = tokens(1, held + new, seed=held)
        before = HippocampalCache()
        if held:
            with torch.no_grad():
                model(whole[:, :held], **{CACHE: before})
        expected = generate(model, before.clone(), whole)
        total = operations(model, before.clone(), whole)
        verdicts = {"went on": 0, "refused": 0}
        for i in range(-(-count // len(CASES))):
            cache = before.clone()
            try:
                with Interrupt(i * total // -(-count // len(CASES)), torch.OutOfMemoryError("simulated")):
                    generate(model, cache, whole)
                raise AssertionError("nothing happened")
            except torch.OutOfMemoryError:
                pass
            try:
                found_ids = generate(model, cache, whole)
                verdicts["went on"] += 1
            except RuntimeError as error:
                if "this cache is unusable" not in str(error):
                    raise
                verdicts["refused"] += 1
                found_ids = generate(model, before.clone(), whole)
            except ValueError as error:  # it was in the last tokens: the whole prompt is in the cache
                if "nothing new to read" not in str(error):
                    raise
                verdicts["went on"] += 1
                cache.crop(-1) if cache.layers[0].state.length <= 8 else None
                continue
            assert torch.equal(found_ids, expected), f"{name}: another answer after operation {i}"
        found[name] = verdicts
    return found


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description="Memory runs out in a prefill.")
    parser.add_argument("--failures", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    for name, verdicts in try_failures(options.failures).items():
        print(
            f"{name}: {verdicts['went on']} times the cache went on as before, {verdicts['refused']} times it refused"
        )
    print(f"{options.failures} failures, no wrong answer, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
