"""The model card of an adapter: what it is and how to load it, written from its files."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import adapter_files
from .adapter_files import AdapterFiles
from .compressor import Compressor
from .eviction import Eviction
from .hub import is_repo_id
from .memory import MemoryStore
from .version import __version__
from .window import Window

CARD = "README.md"
MARK = "<!-- Written by ahn_layers. Remove this line to keep the changes that you make. -->"
"""A card with this line in it is written anew; any other is left as it is."""
_UNKNOWN = (
    "Not recorded. To be added before it is published: the data and their licence, the command, the hardware, and the "
    "loss of full attention, of sinks + window alone, and of this memory on texts that it was not trained on."
)
TRAINING = "training.json"
"""What a training script may leave beside the adapter: command, hardware, metrics, ..."""


def adapter_card(
    folder: str | Path, *, base_model: str | None = None, license: str | None = None, repo_id: str | None = None
) -> str:
    """The model card of an adapter, Markdown with the metadata that the Hugging Face hub reads.

    Args:
        folder: written by [`save_adapter`][ahn_layers.save_adapter].
        base_model: hub id of the base model. Default: what the adapter says, if that is a hub id.
        license: of the adapter, as the hub names it (``"apache-2.0"``, ``"other"``, ...). Default: none is named.
        repo_id: where the adapter will be. Default: the card says how to load it from a folder.

    Returns:
        The text of ``README.md``. Training and evaluation are filled in from a ``training.json`` in the folder.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is damaged, or a name is none that the hub knows.
    """
    files = adapter_files.read(folder)
    description = described(files, folder)
    base = base_model_of(description, base_model)
    for name, value in (("base_model", base), ("repo_id", repo_id)):
        if value is not None and not is_repo_id(value):
            raise ValueError(f"{name}={value!r}: expected 'owner/name'.")
    if license is not None and not re.fullmatch(r"[a-z0-9.-]+", license):
        raise ValueError(f"license={license!r}: expected an identifier of the hub, 'apache-2.0' for instance.")
    parts = [
        _front_matter(base, license),
        MARK,
        f"# A bounded memory for {base or 'a ' + description['base_model_type'] + ' model'}",
        "The weights of a memory for a decoder language model; the base model is not included. The model keeps the "
        f"first and the last tokens of a text without loss. {_what_leaves(description)}",
        "## Load it",
        _loading(base, repo_id or str(Path(folder).name), description),
        "## What it is",
        _table(["", ""], _facts(files, description)),
        "## Training and evaluation",
        _training(Path(folder) / TRAINING),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | Path, **options: Any) -> None:
    """Write the card into the folder of an adapter, unless there is one that somebody has worked on."""
    path = Path(folder) / CARD
    if not path.exists() or MARK in path.read_text(encoding="utf-8"):
        path.write_text(adapter_card(folder, **options), encoding="utf-8")


def described(files: AdapterFiles, source: str | Path) -> dict[str, Any]:
    """The description of an adapter of this library.

    Raises:
        ValueError: if these are released files, which have none, or files that were not written together.
    """
    if files.description is None:
        raise ValueError(f"{source}: no adapter of this library. Load it into a model, and save_adapter that.")
    files.check_hash()
    return files.description


def base_model_of(description: dict[str, Any], given: str | None) -> str | None:
    """The hub id of the base model: as given, or as the adapter says if it says one and not a folder."""
    found = given or description.get("base_model") or ""
    return found if given or (is_repo_id(found) and not Path(found).exists()) else None


def _what_leaves(description: dict[str, Any]) -> str:
    slots = "A token that leaves the window competes for a slot" if description.get("evictions") else ""
    if description["compressor"] is None:
        return f"{slots}; what does not get one is forgotten."
    if slots:
        return f"{slots}; what does not get one goes into a state of fixed size (arXiv 2510.07318)."
    return "What leaves the window goes into a state of fixed size (arXiv 2510.07318)."


def _front_matter(base: str | None, license: str | None) -> str:
    lines = [] if base is None else [f"base_model: {base}", "base_model_relation: adapter"]
    lines += ["library_name: ahn_layers"]
    lines += [] if license is None else [f"license: {license}"]
    lines += ["pipeline_tag: text-generation", "tags:", "- ahn_layers", "- long-context", "- memory"]
    return "\n".join(["---", *lines, "---"])


def _loading(base: str | None, where: str, description: dict[str, Any]) -> str:
    window, sinks = _sizes(description["window_size"]), _sizes(description["num_sinks"])
    return f"""```python
from transformers import AutoModelForCausalLM

from ahn_layers import load_adapter

model = AutoModelForCausalLM.from_pretrained({json.dumps(base or "the base model")})
load_adapter(model, {json.dumps(where)})  # also retrofits: window {window}, sinks {sinks}
```

Nothing changes in how the model is called. Another window: `load_adapter(..., window_size=..., num_sinks=...)`."""


def _facts(files: AdapterFiles, description: dict[str, Any]) -> Iterable[tuple[str, str]]:
    weights = [u for own in files.weights.values() for u in own.values()]
    size = sum(u.nbytes for u in weights)
    dtypes = sorted({str(u.dtype).removeprefix("torch.") for u in weights})
    options = ", ".join(f"{name}={value!r}" for name, value in description["compressor_options"].items())
    yield "window", f"{_sizes(description['window_size'])} tokens"
    yield "sinks", f"{_sizes(description['num_sinks'])} tokens"
    yield "compressor", f"`{description['compressor']}({options})`" if description["compressor"] else "none"
    for one in description.get("evictions", ()):
        listed = ", ".join(f"{name}={value!r}" for name, value in one["options"].items())
        yield "eviction", f"`{one['eviction']}({listed})` in the layers {_ranges(one['layers'])}"
    if not description.get("evictions"):
        yield "eviction", "none: every token that leaves the window is compressed"
    yield "positions in the memory", f"`{description['memory_positions']}`"
    yield "layers", _ranges(description["layers"])
    yield "parameters", f"{sum(u.numel() for u in weights):,}"
    yield "weights", f"{size / 1e6:.1f} MB, {', '.join(dtypes)}"
    held = state_bytes(description)
    if held is not None:
        yield "state of a sequence", f"{held / 1e6:.1f} MB with keys and values in bfloat16, at any length"
    yield "written by", f"ahn_layers {description.get('library_version', __version__)}"


def state_bytes(description: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> int | None:
    """Bytes that a sequence holds in all layers once the window is full; None where the sizes are not known.

    Args:
        description: of an adapter.
        dtype: of keys and values.
    """
    sizes = description["sizes"]
    if sizes is None:
        return None
    policies = {layer: one for one in description.get("evictions", ()) for layer in one["layers"]}
    total = 0
    for layer in description["layers"]:
        with torch.device("meta"):
            compressor = Compressor.by_name[description["compressor"]](**sizes, **description["compressor_options"])
            one = policies.get(layer)
            eviction = one and Eviction.by_name[one["eviction"]](**one["options"]).for_layer(**sizes)
        window = Window(_of(description["window_size"], layer), num_sinks=_of(description["num_sinks"], layer))
        store = MemoryStore(window, compressor, eviction=eviction)
        total += store.bytes_per_row(torch.empty((), dtype=dtype, device="meta"), **sizes)
    return total


def _of(size: Any, layer: int) -> int:
    """A size of one layer: JSON has texts as keys."""
    return int(size[str(layer)] if str(layer) in size else size[layer]) if isinstance(size, dict) else int(size)


def _sizes(size: Any) -> str:
    found = sorted(set(size.values())) if isinstance(size, dict) else [size]
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _ranges(layers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _training(path: Path) -> str:
    """What a training script wrote down, or that nothing is known."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _UNKNOWN
    rows = [(name, _cell(found[name])) for name in ("date", "hardware", "steps", "tokens", "seconds") if name in found]
    rows += [(name, str(version)) for name, version in (found.get("versions") or {}).items()]
    rows += [(name, _cell(value)) for name, value in (found.get("metrics") or {}).items() if value is not None]
    command = f"```\n{found['command']}\n```\n\n" if "command" in found else ""
    return command + _table(["", ""], rows)


def _cell(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _table(head: list[str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
