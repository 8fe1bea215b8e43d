"""Random cases by hypothesis, each compared with an independent answer.

Run it from a clone, for instance

    python -m tests.hard.properties --cases 2000
"""

import argparse
import time
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.hard.batches import check_generate, check_packed, generate_cases, packed_cases
from tests.hard.caches import cache_cases, check_cache
from tests.hard.rounding import check_rounding, rounding_cases, table
from tests.hard.stores import check_store, store_cases

KINDS: dict[str, tuple[Any, Any, float]] = {
    "stores": (store_cases, check_store, 0.45),
    "rounding": (rounding_cases, check_rounding, 0.1),
    "caches": (cache_cases, check_cache, 0.25),
    "generate": (generate_cases, check_generate, 0.1),
    "packed": (packed_cases, check_packed, 0.1),
}
"""Strategy, check, and share of all cases."""


def run(kind: str, cases: int, number: int) -> int:
    """Try as many cases of a kind.

    Returns:
        How many ran.
    """
    strategy, check, _ = KINDS[kind]
    count = 0

    @seed(number)
    @settings(
        max_examples=cases, deadline=None, database=None, print_blob=False, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy())
    def one(case: Any) -> None:
        nonlocal count
        count += 1
        check(case)

    one()
    return count


def main() -> None:
    """Try all kinds."""
    parser = argparse.ArgumentParser(description="Random cases by hypothesis.")
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    total = 0
    kinds = options.kind or list(KINDS)
    weight = sum(KINDS[kind][2] for kind in kinds)
    for kind in kinds:
        start = time.monotonic()
        count = run(kind, max(1, round(options.cases * KINDS[kind][2] / weight)), options.seed)
        total += count
        print(f"{kind}: {count:,} cases, no failure, {time.monotonic() - start:.0f} s", flush=True)
        if kind == "rounding":
            print(f"  outputs and states in bfloat16, in float16, off by at most\n{table()}", flush=True)
    print(f"{total:,} cases, no failure")


if __name__ == "__main__":
    main()
