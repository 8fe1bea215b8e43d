"""Retrofit a tiny random model of every type that transformers can build, and try it.

``python -m tests.families.try_every_type`` tries all types and prints a table. Each is tried in a process of its own
within a time limit, and its result kept in ``build/families``: a second run tries only what the code has changed since.

    python -m tests.families.try_every_type gpt_oss gemma3n      # these types, anew
    python -m tests.families.try_every_type --fails              # those that failed
    python -m tests.families.try_every_type --write              # all, and the table of the documentation
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "families"
LIMIT = 240
"""Seconds for one type."""
MEMORY = 6 << 30
"""Bytes for one type."""


def code_version() -> str:
    """Of the package and of these tests."""
    import torch
    import transformers

    found = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for path in sorted((*ROOT.glob("ahn_layers/**/*.py"), *ROOT.glob("tests/families/*.py"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def try_type(name: str) -> dict[str, Any]:
    """The verdict on one type, in a process of its own."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name.replace('/', '+')}.json"
    path.unlink(missing_ok=True)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _judge_and_leave(name, path)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - begin > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.05)
    found = json.loads(path.read_text()) if path.exists() else {"word": "fails", "cause": "no answer in time"}
    found |= {"seconds": round(time.monotonic() - begin, 1)}
    path.write_text(json.dumps(found))
    return found


def _judge_and_leave(name: str, path: Path) -> None:
    import resource

    from .cases import build
    from .checks import Verdict, judge

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        try:
            case = build(name)
        except Exception as error:
            verdict = Verdict("not built", f"{type(error).__name__}: {error}")
            trace = traceback.format_exc()
        else:
            trace = ""
            try:
                verdict = Verdict("no such prompt") if case is None else judge(case)
            except Exception as error:
                verdict, trace = Verdict("fails", f"retrofit: {type(error).__name__}: {error}"), traceback.format_exc()
        path.write_text(json.dumps(asdict(verdict) | {"trace": trace}))
    finally:
        sys.stdout.flush()
        os._exit(0)


def short(cause: str) -> str:
    """The first thing that a cause says."""
    lines = cause.strip().splitlines() or [""]
    if len(lines) > 1 and lines[0].endswith("candidates:"):
        reasons = Counter(re.sub(r"^\s*\S+: ", "", line) for line in lines[1:])
        return "; ".join(reasons)
    return " ".join(lines)


def main() -> None:
    """Try types, print what became of each, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types to try anew")
    parser.add_argument("--fails", action="store_true", help="try those again that failed")
    parser.add_argument("--stale", action="store_true", help="take results of older code as they are")
    parser.add_argument("--only", choices=["causal", "multimodal"])
    parser.add_argument("--write", action="store_true", help="write the table of the documentation")
    parser.add_argument("--share", default="0/1", help="i/n: of n processes, this is the i-th")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    if not torch.cuda.is_available():
        sys.modules["fla"] = None  # type: ignore[assignment]  # transformers would call its kernels, which need a GPU
    import transformers

    from .cases import all_names
    from .table import write

    transformers.logging.set_verbosity(60)
    torch.set_num_threads(1)
    version, names = code_version(), arguments.types or all_names(arguments.only)
    share, shares = (int(part) for part in arguments.share.split("/"))
    found = {}
    for i, name in enumerate(names):
        path = RESULTS / f"{name.replace('/', '+')}.json"
        known = json.loads(path.read_text()) if path.exists() else None
        again = bool(arguments.types) or known is None or (arguments.fails and known["word"] == "fails")
        again = again or not (arguments.stale or arguments.fails or known.get("version") == version)
        if again and i % shares == share:
            known = try_type(name) | {"version": version}
            path.write_text(json.dumps(known))
            print(f"{name:32} {known['word']:9} {known['seconds']:6} s  {short(known['cause'])[:240]}", flush=True)
            if arguments.types and known.get("trace"):
                print(known["trace"])
        if known is not None:
            found[name] = known
    for kind in ("causal", "multimodal"):
        counts = Counter(u["word"] for name, u in found.items() if ("/" in name) == (kind == "multimodal"))
        print(kind, dict(counts))
    if arguments.write:
        write(found, version)


if __name__ == "__main__":
    main()
