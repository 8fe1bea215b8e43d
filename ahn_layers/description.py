"""The description of a model's memory in files: how it was retrofitted, and its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter_files import Weights
from .attention import HippocampalAttention
from .compressor import Compressor
from .eviction import RIDES, Eviction, FoldAll
from .fingerprint import base_fingerprint, whole
from .peft import in_use, state_in_use
from .record import Retrofitted
from .retrofit import retrofit
from .split import Split
from .version import __version__


class Memory(NamedTuple):
    """What has weights in the memory of a layer."""

    compressor: Compressor | None
    eviction: Eviction
    split: Split | None = None

    def sizes(self) -> dict[str, int] | None:
        """The sizes of the compressor for all heads, None without one."""
        if self.compressor is None:
            return None
        names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "value_dim")
        sizes = {name: getattr(self.compressor, name) for name in names}
        return sizes if self.split is None else self.split.whole_sizes(sizes)

    def weights(self) -> dict[str, Tensor]:
        """Its weights in this process, by the names that they have in files."""
        own = {} if self.compressor is None else state_in_use(self.compressor)
        return own | {RIDES + name: u for name, u in state_in_use(self.eviction).items()}

    def gather(self) -> dict[str, Tensor]:
        """The same, each in one piece and for all heads."""
        own = {name: whole(u.detach()) for name, u in self.weights().items()}
        return own if self.split is None else {name: self.split.whole(name, u) for name, u in own.items()}


def memories_of(inner: nn.Module) -> dict[int, Memory]:
    """The memory of each retrofitted layer, as PEFT runs it.

    Raises:
        ValueError: if one was quantized.
    """
    memories = {}
    for block in inner.modules():
        if isinstance(block, HippocampalAttention):
            compressor = None if block.memory.compressor is None else in_use(block.memory.compressor)
            memory = Memory(compressor, in_use(block.memory.eviction), block.store.split)  # type: ignore[arg-type]
            memories[int(block.layer_idx)] = memory
            for name, u in memory.weights().items():
                if not isinstance(u, Tensor):
                    raise ValueError(
                        f"the memory of layer {block.layer_idx} was quantized ({name!r} is a {type(u).__name__}): save "
                        "and load adapters before quantize_dynamic, or leave the memory out of it."
                    )
    return memories


def is_described(inner: nn.Module, record: Retrofitted) -> bool:
    """Whether there is anything to save beside the sizes of the window."""
    return record.compressor is not None or bool(_describe_evictions(inner))


def describe(inner: nn.Module, record: Retrofitted) -> dict[str, Any]:
    """What ``retrofit`` was asked for, as JSON values.

    Raises:
        ValueError: if the options of the compressor or an eviction are no JSON values.
    """
    try:
        options = json.loads(json.dumps(record.options))
    except TypeError as error:
        raise ValueError(
            f"compressor_options={record.options!r}: cannot be written as JSON ({error}). Use numbers, texts, lists."
        ) from error
    evictions = _describe_evictions(inner)
    sizes = {name: _by_layer(record, name) for name in ("window_size", "num_sinks", "sink_positions")}
    differ = any(isinstance(size, dict) for size in sizes.values())
    return {
        # earlier versions of this library must not read what they would not understand
        "format_version": 3 if differ else 2 if evictions else 1,
        "library_version": __version__,
        "compressor": record.compressor,
        "compressor_options": options,
        **sizes,
        "memory_positions": record.memory_positions,
        "layers": sorted(record.layers),
    } | ({"evictions": evictions} if evictions else {})


def _by_layer(record: Retrofitted, name: str) -> Any:
    """What all windows have in common, or by layer if they differ."""
    found = {layer: getattr(window, name) for layer, window in record.windows.items()}
    return found if len(set(found.values())) > 1 else next(iter(found.values()))


def _as_given(size: Any) -> Any:
    """A size of a window as ``retrofit`` takes it: JSON has no whole numbers as keys."""
    return {int(layer): value for layer, value in size.items()} if isinstance(size, dict) else size


def _describe_evictions(inner: nn.Module) -> list[dict[str, Any]]:
    """Every policy but ``FoldAll``, with the layers that have it."""
    found: list[dict[str, Any]] = []
    for index, memory in memories_of(inner).items():
        if isinstance(memory.eviction, FoldAll):
            continue
        one = {"eviction": type(memory.eviction).__name__, "options": memory.eviction.options()}
        same = next((other for other in found if other.items() >= one.items()), None)
        if same is None:
            found.append(one | {"layers": [index]})
        else:
            same["layers"].append(index)
    return found


def describe_adapter(inner: Any, record: Retrofitted, given: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What ``adapter.json`` says, except the hash of the weights; of the base weights in a given state dict."""
    return describe(inner, record) | {
        "sizes": next(iter(memories_of(inner).values())).sizes(),
        "base_model_type": inner.config.get_text_config(decoder=True).model_type,
        "base_model": getattr(inner.config, "_name_or_path", "") or None,
        "base": base_fingerprint(inner, given),
    }


def gather_weights(inner: nn.Module) -> Weights:
    """The memory weights of a model, each in one piece."""
    return {layer: memory.gather() for layer, memory in memories_of(inner).items()}


def retrofit_as_described(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    """Retrofit a model the way that ``describe`` says."""
    name = description["compressor"]
    evictions = {
        layer: Eviction.by_name[one["eviction"]](**one["options"])
        for one in description.get("evictions", ())
        for layer in one["layers"]
    }
    return retrofit(
        model,
        None if name is None else Compressor.by_name[name],
        window_size=_as_given(description["window_size"]),
        num_sinks=_as_given(description["num_sinks"]),
        sink_positions=description["sink_positions"],
        memory_positions=description["memory_positions"],
        layers=description["layers"],
        eviction=evictions or None,
        **description["compressor_options"],
    )


def check_described(description: dict[str, Any], weights: Weights, source: str | Path) -> None:
    """Raise a ValueError if what a description names cannot be made, or has weights of other shapes than there are.

    It is made on the meta device, so that sizes in a damaged file take no memory.
    """
    sizes, name, options = description["sizes"], description["compressor"], description["compressor_options"]
    evictions: dict[int, Eviction] = {}
    compressor = None
    try:
        with torch.device("meta"):
            if name is not None and sizes is not None:
                compressor = Compressor.by_name[name](**sizes, **options)
            for one in description.get("evictions", ()):
                made = Eviction.by_name[one["eviction"]](**one["options"])
                evictions |= dict.fromkeys(one["layers"], made if sizes is None else made.for_layer(**sizes))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: not the description of an adapter ({error}).") from error
    except (NotImplementedError, RuntimeError):
        return  # it cannot be made there
    if not evictions.keys() <= set(description["layers"]):
        raise ValueError(
            f"{source}: not the description of an adapter (evictions for layers {sorted(evictions)}, a memory in "
            f"{sorted(description['layers'])})."
        )
    for index, given in weights.items():
        for key, u in Memory(compressor, evictions.get(index, FoldAll())).weights().items():
            if key in given and given[key].shape != u.shape:
                raise ValueError(
                    f"{source}: layer {index} {key!r} has shape {tuple(given[key].shape)}, expected {tuple(u.shape)}."
                )


def bound_options(evictions: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By layer, the policies without the options that a user may choose for each model."""
    bound: dict[int, dict[str, Any]] = {}
    for one in evictions:
        free = Eviction.by_name[one["eviction"]](**one["options"]).free_options
        own = {"eviction": one["eviction"]} | {k: v for k, v in one["options"].items() if k not in free}
        bound |= dict.fromkeys(one["layers"], own)
    return bound


def take_free_options(inner: nn.Module, description: dict[str, Any]) -> None:
    """Give the policies of a model those options of a description that may differ between the two."""
    memories = memories_of(inner)
    for one in description.get("evictions", ()):
        for policy in (memories[layer].eviction for layer in one["layers"]):
            for name in policy.free_options:
                setattr(policy, name, one["options"][name])
