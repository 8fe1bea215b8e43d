"""Files of adapters, states and caches, damaged at random: loading is a clear error, or gives what was saved.

Half of the files have bytes changed. In the others values of their JSON are changed; then half get a new checksum, as
if somebody had forged them: these have to be refused, or be usable, without a crash or a large allocation.

Run it from a clone, for instance

    python -m tests.hard.mutations --files 10000
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ahn_layers import (
    GatedDeltaNet,
    HippocampalCache,
    MemoryState,
    MemoryStore,
    SalientSlots,
    Window,
    load_adapter,
    save_adapter,
)
from ahn_layers.adapter_schema import CHECKSUM, checksum
from ahn_layers.files import digest, sha256
from ahn_layers.huggingface.decoder import CACHE
from ahn_layers.record import find_retrofitted
from tests.models import base, retrofitted, tokens

KINDS = ("state", "cache", "adapter")
SECONDS, MEMORY = 20, 1 << 30
"""What loading and using one file may take: time, and memory beside what the process has."""
STRANGE = (
    None, True, 0, 1, -1, 2, 7, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"), "", "x", "é", "memory",
    "F64", [], [0], [[0]], [1, 2, 3, 4], {}, {"a": 1}, "../../etc/passwd", "__import__('os').system('true')",
)  # fmt: skip
FORBIDDEN = ("os.system", "subprocess.Popen", "pickle.find_class", "socket.connect", "compile", "exec")
"""What Python says of itself when it is about to run something else."""


class Subject:
    """A file of one kind: as it was saved, how it is loaded, and whether what comes is what was saved.

    Args:
        kind: which.
        folder: for files.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.kind, self.folder = kind, folder
        self.model = retrofitted(dtype=torch.float32, eviction=SalientSlots(3))
        if kind == "state":
            eviction = SalientSlots(3).for_layer(hidden_size=8, num_kv_heads=2, value_dim=8)
            self.store = MemoryStore(Window(5, 2), GatedDeltaNet(8, 2, 8), eviction=eviction)
            self.path = folder / "state.safetensors"
            self.store(*torch.randn(3, 2, 2, 20, 8), torch.randn(2, 20, 8))[1].save(self.path)
        elif kind == "cache":
            self.path, cache = folder / "cache.safetensors", HippocampalCache()
            mask = torch.ones(2, 20, dtype=torch.long)
            mask[0, :4] = 0
            with torch.no_grad():
                self.model(tokens(2, 20), attention_mask=mask, **{CACHE: cache})
            cache.save(self.path)
        else:
            self.path = folder / "adapter.safetensors"
            save_adapter(self.model, folder)
            self.plain = base(dtype=torch.float32)
        self.files = sorted(folder.iterdir())
        self.saved = {path: path.read_bytes() for path in self.files}
        self.right = self.fingerprint(self.load())

    def load(self) -> Any:
        """What is in the file."""
        if self.kind == "state":
            return MemoryState.load(self.path)
        if self.kind == "cache":
            return HippocampalCache.load(self.path)
        import copy

        return load_adapter(copy.deepcopy(self.plain), self.folder)

    def fingerprint(self, found: Any) -> str:
        """Everything that was loaded, as one text."""
        if self.kind == "state":
            return digest(sorted(found.tensors().items()), json.dumps(found.description()))
        if self.kind == "cache":
            if not all(getattr(one, "state", None) for one in found.layers):
                return "layers of another kind"
            states = [one.state.tensors() for one in found.layers]
            named = [(f"{i}.{name}", u) for i, own in enumerate(states) for name, u in own.items()]
            said = [(one.state.description(), one.padding and one.padding.turns, one.made_with) for one in found.layers]
            return digest(named, json.dumps(said))
        record = find_retrofitted(found)[1]
        policies = [str(m) for m in found.modules() if isinstance(m, SalientSlots)]
        said = [record.window.__dict__, record.compressor, record.options, record.memory_positions, record.layers]
        said.append(policies)
        return digest(found.named_parameters(), json.dumps(said, default=str))

    @torch.no_grad()
    def use(self, found: Any) -> None:
        """Go on with it."""
        if self.kind == "state":
            self.store(*torch.randn(3, 2, 2, 3, 8), torch.randn(2, 3, 8), found)
        elif self.kind == "cache":
            self.model(tokens(2, 3), **{CACHE: found})
        else:
            found(tokens(1, 30))

    def restore(self) -> None:
        """The files as they were."""
        for path, data in self.saved.items():
            path.write_bytes(data)


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    """Some bytes are others, missing, or too many."""
    place, size = dice.randrange(len(data)), dice.choice((1, 1, 2, 8, 64, 1000))
    noise = bytes(dice.randrange(256) for _ in range(min(size, 64)))
    return dice.choice([
        lambda: data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :],
        lambda: data[:place] + noise + data[place + len(noise) :],
        lambda: data[:place],
        lambda: data + noise,
        lambda: data[:place] + data[place + size :],
        lambda: data[:place] + data[place : place + size] + data[place:],
        lambda: data[:place] + bytes(size) + data[place + size :],
        lambda: struct.pack("<Q", dice.choice((0, 1, 2**40, 2**63, len(data)))) + data[8:],
        lambda: b"",
    ])()  # fmt: skip


def change_value(value: Any, dice: random.Random) -> Any:
    """Something in a tree of JSON values is another value, missing, or doubled."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(sorted(value))
        other = dict(value)
        kind = dice.random()
        if kind < 0.1:
            del other[key]
        elif kind < 0.2:
            other[dice.choice(sorted(value)) + dice.choice(("", "x"))] = other.pop(key)
        else:
            other[key] = change_value(value[key], dice)
        return other
    if isinstance(value, list) and value and dice.random() < 0.9:
        at = dice.randrange(len(value))
        return dice.choice([
            lambda: value[:at] + value[at + 1 :],
            lambda: [*value, value[at]],
            lambda: [*value[:at], change_value(value[at], dice), *value[at + 1 :]],
            lambda: value[::-1],
        ])()  # fmt: skip
    if isinstance(value, int) and dice.random() < 0.5:
        return value + dice.choice((-1, 1))
    return dice.choice(STRANGE)


def change_header(data: bytes, dice: random.Random, forge: bool) -> bytes:
    """The JSON of a safetensors file is changed: its tensors, or what it says in ``description``."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    about = header.get("__metadata__", {})
    if "description" in about and dice.random() < 0.7:
        about["description"] = json.dumps(change_value(json.loads(about["description"]), dice))
    else:
        header = change_value(header, dice)
    text = json.dumps(header).encode()
    changed = struct.pack("<Q", len(text)) + text + data[8 + size :]
    return forged(changed) if forge else changed


def forged(data: bytes) -> bytes:
    """The same with a hash that is right, if it is a safetensors file with one."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            with safe_open(file.name, framework="pt") as opened:
                about = opened.metadata()
                text = about["description"]
                found = digest(sorted((name, opened.get_tensor(name)) for name in opened.keys()), text)  # noqa: SIM118
        except Exception:  # it is no such file
            return data
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["sha256"] = found
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def damage(subject: Subject, dice: random.Random) -> bool:
    """Damage one of the files. Returns whether it was forged."""
    path = dice.choice(subject.files)
    data, forge = subject.saved[path], dice.random() < 0.5
    if dice.random() < 0.5:
        path.write_bytes(change_bytes(data, dice))
        return False
    if path.suffix == ".json":
        changed = change_value(json.loads(data), dice)
        if forge and isinstance(changed, dict):
            changed[CHECKSUM] = checksum(changed)
        path.write_text(json.dumps(changed))
        return forge
    changed = change_header(data, dice, forge)
    path.write_bytes(changed)
    beside = path.with_suffix(".json")
    if forge and beside.exists():  # the two files of an adapter
        description = json.loads(beside.read_text()) | {"weights_sha256": sha256(changed)}
        beside.write_text(json.dumps(description | {CHECKSUM: checksum(description)}))
    return forge


def try_one(subject: Subject, number: int) -> str:
    """Damage, load and use a file. Returns what happened; what must not happen begins with "FAULT"."""
    dice = random.Random(number)
    subject.restore()
    is_forged = damage(subject, dice)
    try:
        found = subject.load()
    except (ValueError, FileNotFoundError) as error:
        clear = str(subject.folder) in str(error) and len(str(error)) > len(str(subject.folder)) + 10
        return "refused" if clear else f"FAULT unclear: {error!r}"
    except Exception as error:
        return f"FAULT {type(error).__name__}: {error}"
    if subject.fingerprint(found) == subject.right:
        return "as saved"
    if not is_forged:
        return "FAULT accepted, and not what was saved"
    try:
        subject.use(found)
    except (ValueError, RuntimeError, TypeError) as error:
        return "refused when used" if len(str(error)) > 20 else f"FAULT unclear: {error!r}"
    except Exception as error:
        return f"FAULT used: {type(error).__name__}: {error}"
    return "forged, and usable"


def watch(event: str, arguments: Any) -> None:
    """End the process if a file is about to run something."""
    checked = "beartype" in sys.modules and event in ("compile", "exec")  # shapes, by code that is made on the spot
    if WATCHING and event in FORBIDDEN and not checked:
        print(f"FAULT {event} {str(arguments)[:200]}", file=sys.stderr, flush=True)
        os._exit(3)


WATCHING: list[int] = []


def work(kind: str, first: int, last: int, connection: Any) -> None:
    """Try the files of these numbers, and say of each what happened."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(kind, Path(folder))
        subject.use(subject.load())  # whatever is imported late is there
        try_one(subject, -1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        sys.addaudithook(watch)
        WATCHING.append(1)
        for number in range(first, last):
            connection.send((number, None))
            signal.alarm(SECONDS)
            connection.send((number, try_one(subject, number)))
        signal.alarm(0)
        WATCHING.clear()


def try_files(kind: str, count: int, seed: int, report: Callable[[str], None]) -> collections.Counter[str]:
    """Damage as many files of a kind, in processes that may die.

    Returns:
        How often what happened.
    """
    found: collections.Counter[str] = collections.Counter()
    number, last = seed * 1_000_000, seed * 1_000_000 + count
    while number < last:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=work, args=(kind, number, last, theirs))
        process.start()
        theirs.close()
        running = None
        try:
            while True:
                at, verdict = ours.recv()
                if verdict is None:
                    running = at
                    continue
                running, number = None, at + 1
                found[verdict.split(":")[0]] += 1
                if verdict.startswith("FAULT"):
                    report(f"{kind} {at}: {verdict}")
        except EOFError:
            process.join()
        if running is not None:
            code = process.exitcode or 0
            what = "hangs" if code == -signal.SIGALRM else f"exit {code}"
            found[f"FAULT {what}"] += 1
            report(f"{kind} {running}: FAULT the process {what}")
            number = running + 1
        elif process.exitcode:
            raise RuntimeError(f"exit {process.exitcode}")
    return found


def main() -> None:
    """Try files of all kinds."""
    parser = argparse.ArgumentParser(description="Damaged files.")
    parser.add_argument("--files", type=int, default=10_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these")
    options = parser.parse_args()
    faults, kinds = 0, options.kind or KINDS
    for kind in kinds:
        start = time.monotonic()
        found = try_files(kind, -(-options.files // len(kinds)), options.seed, print)
        faults += sum(count for verdict, count in found.items() if verdict.startswith("FAULT"))
        print(f"{kind}: {sum(found.values()):,} files, {time.monotonic() - start:.0f} s")
        for verdict, count in found.most_common():
            print(f"  {verdict}: {count:,}", flush=True)
    if faults:
        raise SystemExit(f"{faults} faults")


if __name__ == "__main__":
    main()
