"""The memory weights alone, in files: our own format, and the released AHN naming.

An adapter is a folder with ``adapter.safetensors`` (``layers.<layer_idx>.<parameter>``) and ``adapter.json``.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import HippocampalAttention
from .compressor import Compressor
from .files import write_atomically
from .peft import in_use
from .retrofit import find_retrofitted, retrofit
from .version import __version__

FORMAT_VERSION = 1
_WEIGHTS, _DESCRIPTION = "adapter.safetensors", "adapter.json"
_OURS = re.compile(r"layers\.(\d+)\.(.+)")
_RELEASED = re.compile(r"(?:.*\.)?layers\.(\d+)\.ahn\.fn\.(.+)")
_DESCRIBED = (
    "compressor", "compressor_options", "window_size", "num_sinks", "sink_positions", "memory_positions", "layers",
    "sizes", "base_model_type",
)  # fmt: skip
_Weights = dict[int, dict[str, Tensor]]


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the memory weights of a retrofitted model, and what is needed to load them, to a folder.

    Sharded weights (FSDP2) are gathered: all processes have to call it, and all write the same files.

    Args:
        model: a retrofitted model, or one that contains it.
        folder: made if it is not there; earlier adapter files in it are replaced.

    Raises:
        ValueError: if the model is not retrofitted or has no compressor.
    """
    from safetensors.torch import save

    inner, record = find_retrofitted(model)
    if record.compressor is None:
        raise ValueError("the model was retrofitted without a compressor: there are no memory weights to save.")
    layers = _compressors(inner)
    tensors = {
        f"layers.{index}.{name}": _whole(u.detach()).cpu().contiguous()
        for index, compressor in layers.items()
        for name, u in compressor.state_dict().items()
    }
    config = inner.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    description = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "compressor": record.compressor,
        "compressor_options": record.options,
        "window_size": record.window.window_size,
        "num_sinks": record.window.num_sinks,
        "sink_positions": record.window.sink_positions,
        "memory_positions": record.memory_positions,
        "layers": sorted(layers),
        "sizes": _sizes(next(iter(layers.values()))),
        "base_model_type": config.model_type,
        "base_model": getattr(inner.config, "_name_or_path", "") or None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _WEIGHTS, save(tensors, {"format": "pt"}))
    write_atomically(folder / _DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def load_adapter(
    model: nn.Module, source: str | Path, *, window_size: int | None = None, num_sinks: int | None = None
) -> nn.Module:
    """Load memory weights into a model, in place; the model is unchanged if anything about them is wrong.

    Args:
        model: a retrofitted model, or one that contains it. A model that is not retrofitted yet is, the way the
            adapter says; released files do not say, so for them call [`retrofit`][ahn_layers.retrofit] first.
        source: a folder written by [`save_adapter`][ahn_layers.save_adapter]; a safetensors file, or a folder of
            them, with the released names ``model.layers.<i>.ahn.fn.<parameter>``; or the id of a hub repository that
            holds either.
        window_size: of a model that is not retrofitted yet, instead of the adapter's own.
        num_sinks: likewise.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        ValueError: if the adapter belongs to another base model or compressor, a parameter is missing, unknown, wrongly
            shaped or not finite, or a file is damaged. The message names it.
    """
    files = _find(source)
    weights = _read(files)
    description = _read_description(files[0].parent / _DESCRIPTION) if files[0].name == _WEIGHTS else None
    chosen = {"window_size": window_size, "num_sinks": num_sinks}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if description is not None:
        model = _retrofit_as_described(model, description | chosen)
    inner, record = find_retrofitted(model)
    for name, size in chosen.items():
        if getattr(record.window, name) != size:
            raise ValueError(
                f"{name}={size}: the model is retrofitted already, with {name}={getattr(record.window, name)}. Choose "
                "the window there, or call restore(model) first."
            )
    if description is not None:
        _check_base(inner, record, description, source)
    elif record.memory_positions != "absolute":
        raise ValueError(
            f"{source}: released memories were trained with memory_positions='absolute', the model was retrofitted "
            f"with {record.memory_positions!r}."
        )
    updates = _match(_compressors(inner), weights, source)
    with torch.no_grad():
        for parameter, value in updates:
            parameter.copy_(_as_sharded(value, parameter))
    return model


def _whole(u: Tensor) -> Tensor:
    """A tensor in one piece: FSDP2 shards it, and all processes gather it together."""
    gathered: Tensor = u.full_tensor() if hasattr(u, "full_tensor") else u
    return gathered


def _as_sharded(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, laid out over the processes as the parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _compressors(inner: nn.Module) -> dict[int, Compressor]:
    blocks = [module for module in inner.modules() if isinstance(module, HippocampalAttention)]
    compressors = {
        block.layer_idx: in_use(block.memory.compressor) for block in blocks if block.memory.compressor is not None
    }
    for index, compressor in compressors.items():
        for name, u in compressor.state_dict().items():
            if not isinstance(u, Tensor):
                raise ValueError(
                    f"the memory of layer {index} was quantized ({name!r} is a {type(u).__name__}): save and load "
                    "adapters before quantize_dynamic, or leave the memory out of it."
                )
    return compressors  # type: ignore[return-value]


def _sizes(compressor: Compressor) -> dict[str, int]:
    return {
        name: getattr(compressor, name)
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "value_dim")
    }


def _find(source: str | Path) -> list[Path]:
    """The safetensors files of a source: our own file if there is one."""
    path = Path(source)
    if not path.exists():
        path = _download(str(source))
    if path.is_file():
        return [path]
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source}: no safetensors file in this folder.")
    return files


def _download(source: str) -> Path:
    missing = FileNotFoundError(f"{source}: no such file or folder, and not a hub repository that can be reached.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise missing
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing from None
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise FileNotFoundError(f"{missing} ({type(error).__name__}: {error})") from error


def _read(files: list[Path]) -> _Weights:
    """All memory weights by layer and name; anything else in released full checkpoints is passed over."""
    from safetensors import SafetensorError, safe_open

    weights: _Weights = {}
    for path in files:
        pattern = _OURS if path.name == _WEIGHTS else _RELEASED
        try:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    match = pattern.fullmatch(key)
                    if match:
                        weights.setdefault(int(match[1]), {})[match[2]] = file.get_tensor(key)
                    elif pattern is _OURS:
                        raise ValueError(f"{path}: unknown key {key!r}, expected layers.<index>.<parameter>.")
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or truncated safetensors file ({error}).") from error
    if not weights:
        raise ValueError(
            f"{', '.join(str(path) for path in files)}: no memory weights, expected keys like "
            "'model.layers.0.ahn.fn.o_proj.weight'."
        )
    return weights


def _read_description(path: Path) -> dict[str, Any]:
    """The JSON beside our own weights, with all that is needed to use them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, it says which compressor and base the weights belong to.")
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        version = description["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the description of an adapter ({error}).") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: adapter format version {version}, this library reads {FORMAT_VERSION}. Load it with the version "
            "of ahn_layers that wrote it."
        )
    for name in _DESCRIBED:
        if name not in description:
            raise ValueError(f"{path}: lacks {name!r}.")
    if description["compressor"] not in Compressor.by_name:
        raise ValueError(
            f"{path}: unknown compressor {description['compressor']!r}, known are {sorted(Compressor.by_name)}. Import "
            "the module that defines the class first."
        )
    return description


def _retrofit_as_described(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    try:
        find_retrofitted(model)
    except ValueError:
        return retrofit(
            model,
            Compressor.by_name[description["compressor"]],
            window_size=description["window_size"],
            num_sinks=description["num_sinks"],
            sink_positions=description["sink_positions"],
            memory_positions=description["memory_positions"],
            layers=description["layers"],
            **description["compressor_options"],
        )
    return model


def _check_base(inner: nn.Module, record: Any, description: dict[str, Any], source: str | Path) -> None:
    config = inner.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    compressors = _compressors(inner)
    facts: dict[str, Any] = {
        "base_model_type": config.model_type,
        "compressor": record.compressor,
        "compressor_options": record.options,
        "memory_positions": record.memory_positions,
        "layers": sorted(compressors),
    }
    if compressors:
        facts["sizes"] = _sizes(next(iter(compressors.values())))
    for name, ours in facts.items():
        if description[name] != ours:
            raise ValueError(f"{source}: the adapter has {name}={description[name]!r}, the model has {ours!r}.")


def _match(compressors: dict[int, Compressor], weights: _Weights, source: str | Path) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with its new value, every one of them checked."""
    if compressors.keys() != weights.keys():
        raise ValueError(
            f"{source}: memory weights for the layers {sorted(weights)}, the model has a memory in"
            f" {sorted(compressors)}."
        )
    updates = []
    for index, compressor in sorted(compressors.items()):
        own, given = compressor.state_dict(keep_vars=True), weights[index]
        for name in sorted(own.keys() - given.keys()):
            raise ValueError(f"{source}: layer {index} lacks {name!r}, which {type(compressor).__name__} needs.")
        for name in sorted(given.keys() - own.keys() - set(compressor.unused_parameters)):
            raise ValueError(f"{source}: layer {index} has {name!r}, which {type(compressor).__name__} does not know.")
        for name, parameter in own.items():
            value = given[name]
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{source}: layer {index} {name!r} has shape {tuple(value.shape)}, "
                    f"expected {tuple(parameter.shape)}."
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{source}: layer {index} {name!r} holds values that are not finite.")
            updates.append((parameter, value))
    return updates
