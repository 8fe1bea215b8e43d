"""One model serves many: threads that generate at once, and a thousand generations one after the other.

Run it from a clone, for instance

    python -m tests.hard.serving --threads 16 --generations 1000
"""

import argparse
import gc
import itertools
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ahn_layers import HippocampalCache, SalientSlots
from ahn_layers.huggingface.decoder import CACHE
from tests.models import retrofitted

NEW = 12
"""Tokens of each answer."""


def model_with_slots() -> Any:
    """A small model with slots and a memory that says something."""
    return retrofitted(eviction=SalientSlots(4))


def request(model: Any, number: int) -> Tensor:
    """The answer to a prompt that depends on the number: batches, static caches, forks, beams, sampling by turns."""
    made = torch.Generator().manual_seed(number)
    rows, length = 1 + number % 3, int(torch.randint(1, 60, (), generator=made))
    ids = torch.randint(1, 64, (rows, length), generator=made)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, : int(torch.randint(0, length, (), generator=made))] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    kind = number % 5
    if kind == 1:
        options |= {"cache_implementation": "static", "disable_compile": True}
    elif kind == 2:
        options |= {"num_beams": 2}
    elif kind == 3:
        options |= {"prefill_chunk_size": 7}
    if kind != 4:
        return model.generate(ids, **options)
    cache = HippocampalCache()  # two turns, and a fork of the first
    first = model.generate(ids[:1], **options | {"attention_mask": mask[:1] * 0 + 1}, **{CACHE: cache})
    fork = cache.clone()
    more = torch.cat((first, ids[:1]), dim=1)
    options["attention_mask"] = torch.ones_like(more)
    outs = [model.generate(more, **options, **{CACHE: held}) for held in (cache, fork)]
    assert torch.equal(*outs), "a fork went on differently"
    return outs[0]


def try_threads(threads: int, each: int, seed: int = 0) -> int:
    """Let threads generate at once, and compare with the same one by one.

    Returns:
        How many answers were compared.
    """
    model = model_with_slots()
    numbers = [seed + number for number in range(threads * each)]
    with torch.no_grad():
        expected = {number: request(model, number) for number in numbers}
    found: dict[int, Any] = {}
    start = threading.Barrier(threads)

    def run(mine: list[int]) -> None:
        start.wait()
        for number in mine:
            try:
                found[number] = request(model, number)
            except BaseException as error:
                found[number] = error

    every = [threading.Thread(target=run, args=(numbers[i::threads],)) for i in range(threads)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # they interrupt each other as often as they can
    try:
        for thread in every:
            thread.start()
        for thread in every:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for number in numbers:
        if not isinstance(found[number], Tensor):
            raise AssertionError(f"request {number}: {found[number]!r}") from found[number]
        assert torch.equal(found[number], expected[number]), f"request {number}: another answer"
    return len(numbers)


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def try_generations(count: int) -> tuple[int, int, int]:
    """Generate many times, and see whether anything stays.

    Returns:
        By how much Python's allocated blocks, live tensors, and the bytes of the process grew after the first tenth.
    """
    model = model_with_slots()
    tenth = max(8, count // 10)
    numbers = itertools.count()

    def some(many: int) -> tuple[int, int, int]:
        for number in itertools.islice(numbers, many):
            request(model, number % min(20, tenth))
        gc.collect()
        tensors = sum(issubclass(type(u), Tensor) for u in gc.get_objects())
        return sys.getallocatedblocks(), tensors, resident()

    before, after = some(tenth), some(count - tenth)
    blocks, tensors, process = (b - a for a, b in zip(before, after, strict=True))
    return blocks, tensors, process


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description="Threads and many generations.")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--each", type=int, default=20, help="answers of each thread")
    parser.add_argument("--generations", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    count = try_threads(options.threads, options.each)
    print(f"{options.threads} threads at once: {count} answers, all as one by one, {time.monotonic() - start:.0f} s")
    start = time.monotonic()
    blocks, tensors, process = try_generations(options.generations)
    print(
        f"{options.generations:,} generations: {blocks:+,} blocks of Python objects, {tensors:+} tensors, "
        f"{process / 2**20:+.1f} MiB of the process after the first tenth, {time.monotonic() - start:.0f} s"
    )
    assert blocks < options.generations and tensors <= 0 and process < 30 * 2**20, "memory grows"


if __name__ == "__main__":
    main()
