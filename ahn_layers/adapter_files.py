"""The two files of an adapter, and the released AHN naming: writing, finding and reading them.

An adapter is a folder with ``adapter.safetensors`` (``layers.<layer_idx>.<parameter>`` of the compressor, and
``layers.<layer_idx>.eviction.<parameter>``) and ``adapter.json``.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter_schema import CHECKSUM, check_checksum, check_schema, with_checksum
from .compressor import Compressor
from .eviction import Eviction
from .files import digest, reading, sha256, write_atomically
from .hub import download

FORMAT_VERSION = 3
"""What this library writes for memories whose windows differ by layer; version 2 with an eviction, else 1."""
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
HASHES = ("weights_sha256", CHECKSUM)
"""What is added to a description when it is written."""
_INSIDE = "adapter"
"""What the description is called in the file of the weights."""
Weights = dict[int, dict[str, Tensor]]
"""Memory weights by layer and name."""

_OURS = re.compile(r"layers\.(\d+)\.(.+)")
_RELEASED = re.compile(r"(?:.*\.)?layers\.(\d+)\.ahn\.fn\.(.+)")
_DESCRIBED = (
    "compressor", "compressor_options", "window_size", "num_sinks", "sink_positions", "memory_positions", "layers",
    "sizes", "base_model_type",
)  # fmt: skip


def write(folder: str | Path, weights: Weights, description: dict[str, Any]) -> None:
    """Write an adapter. A crash leaves the earlier adapter or the new one, wherever it comes.

    The description is in both files: the one of the weights appears complete, and from then on it is the new adapter.
    """
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {
        f"layers.{i}.{name}": u.detach().cpu().contiguous() for i, own in weights.items() for name, u in own.items()
    }
    inner = json.dumps(description)
    known = {"description": inner, "sha256": digest(sorted(tensors.items()), inner)}
    data = save(tensors, {_INSIDE: json.dumps(known)})  # several entries would come in any order
    text = json.dumps(with_checksum(description | {"weights_sha256": sha256(data)}), indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, data)
    write_atomically(folder / DESCRIPTION, (text + "\n").encode())


@dataclass
class AdapterFiles:
    """What was read.

    Attributes:
        path: the file of the weights, the first of several.
        weights: all memory weights.
        description: what stands beside our own weights, or in their file; None for released ones.
    """

    path: Path
    weights: Weights
    description: dict[str, Any] | None

    def check_hash(self) -> None:
        """Raise a ValueError if the two files were not written together."""
        if self.description is None:
            return
        if self.description.get("weights_sha256") not in (None, sha256(self.path)):
            raise ValueError(
                f"{self.path}: not the weights that {DESCRIPTION} beside it was written with (weights_sha256). Saving "
                "was interrupted, or one of the files was replaced: save the adapter again."
            )
        check_checksum(self.description, self.path.with_name(DESCRIPTION))


def read(source: str | Path, revision: str | None = None) -> AdapterFiles:
    """The memory weights of a folder, a file or a hub repository.

    Args:
        source: where they are.
        revision: of a hub repository.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        ValueError: if a file is damaged, or a folder was given with a revision.
    """
    files = _find(source, revision)
    description = _read_both(files[0]) if files[0].name == WEIGHTS else None
    weights = _read_weights(files)
    if not weights and description is None:
        raise ValueError(
            f"{', '.join(str(path) for path in files)}: no memory weights, expected keys like "
            "'model.layers.0.ahn.fn.o_proj.weight'."
        )
    return AdapterFiles(files[0], weights, description)


def _read_both(path: Path) -> dict[str, Any]:
    """The description beside the weights; where saving broke off between the two files, the one among the weights."""
    beside = path.with_name(DESCRIPTION)
    description = _read_description(beside) if beside.is_file() else None
    if description is not None and description.get("weights_sha256") in (None, sha256(path)):
        return description
    inside = _read_inside(path)
    if inside is not None:
        return inside
    return _read_description(beside) if description is None else description


def _read_inside(path: Path) -> dict[str, Any] | None:
    """The description in the file of the weights, if both are what was written."""
    from safetensors import safe_open

    with reading(path), safe_open(str(path), framework="pt") as file:
        known = json.loads((file.metadata() or {}).get(_INSIDE, "null"))
        if known is None:
            return None
        found = digest(sorted((name, file.get_tensor(name)) for name in file.keys()), known["description"])  # noqa: SIM118
        return _checked(json.loads(known["description"]), path) if found == known["sha256"] else None


def check_known(description: dict[str, Any], source: str | Path) -> None:
    """Raise a ValueError if no class has the name of the compressor or of an eviction."""
    named: list[tuple[str, str | None, Mapping[str, type]]]
    named = [("compressor", description["compressor"], Compressor.by_name)]
    named += [("eviction", one["eviction"], Eviction.by_name) for one in description.get("evictions", ())]
    for kind, name, known in named:
        if name is not None and name not in known:
            raise ValueError(
                f"{source}: unknown {kind} {name!r}, known are {sorted(known)}. Import the module that defines the "
                "class first."
            )


def _find(source: str | Path, revision: str | None) -> list[Path]:
    """The safetensors files of a source: our own file if there is one."""
    path = Path(source)
    if not path.exists():
        path = download(str(source), revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r}: {source} is on this machine, where there are no revisions.")
    if path.is_file():
        return [path]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source}: no safetensors file in this folder.")
    return files


def _read_weights(files: list[Path]) -> Weights:
    """All memory weights by layer and name; anything else in released full checkpoints is passed over."""
    from safetensors import safe_open

    weights: Weights = {}
    for path in files:
        pattern = _OURS if path.name == WEIGHTS else _RELEASED
        with reading(path), safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                match = pattern.fullmatch(key)
                if match:
                    weights.setdefault(int(match[1]), {})[match[2]] = file.get_tensor(key)
                elif pattern is _OURS:
                    raise ValueError(f"{path}: unknown key {key!r}, expected layers.<index>.<parameter>.")
    return weights


def _read_description(path: Path) -> dict[str, Any]:
    """The JSON beside our own weights, with all that is needed to use them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, it says which compressor and base the weights belong to.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the description of an adapter ({error}).") from error
    return _checked(description, path)


def _checked(description: Any, path: Path) -> dict[str, Any]:
    """A description that has all that is needed, of the right kinds."""
    if not isinstance(description, dict) or "format_version" not in description:
        raise ValueError(f"{path}: not the description of an adapter (no format_version).")
    version = description["format_version"]
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{path}: adapter format version {version}, this library reads 1 to {FORMAT_VERSION}. Load it with the "
            "version of ahn_layers that wrote it."
        )
    for name in _DESCRIBED:
        if name not in description:
            raise ValueError(f"{path}: lacks {name!r}.")
    check_schema(description, path)
    check_known(description, path)
    return description
