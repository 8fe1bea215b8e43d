"""The memory of a model in files: save it, load it into a model, check that both belong together."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import adapter_files
from .adapter_files import Weights
from .card import write_card
from .description import (
    Memory,
    bound_options,
    check_described,
    describe,
    describe_adapter,
    gather_weights,
    is_described,
    memories_of,
    retrofit_as_described,
)
from .eviction import RIDES, FoldAll
from .fingerprint import differences
from .record import Retrofitted, find_retrofitted
from .undo import unchanged_on_failure

Checked = Literal["all", "weights", "nothing"]
"""What of the base is compared: config and weights, weights alone, or nothing."""


def save_adapter(model: nn.Module, folder: str | Path, *, card: bool = False) -> None:
    """Write the memory weights of a retrofitted model, and what is needed to load them, to a folder.

    Weights that several processes share (FSDP2, tensor parallelism) are gathered: all processes have to call it, and
    all write the same files.

    Args:
        model: a retrofitted model, or one that contains it.
        folder: made if it is not there; earlier adapter files in it are replaced.
        card: also write a model card, ``README.md``: what [`adapter_card`][ahn_layers.adapter_card] returns. A
            ``README.md`` that somebody has worked on stays.

    Raises:
        ValueError: if the model is not retrofitted, has neither compressor nor eviction, or weights that are not
            finite; an earlier adapter stays as it is.
        OSError: if the folder cannot be written to.
    """
    inner, record = find_retrofitted(model)
    if not is_described(inner, record):
        raise ValueError(
            "the model was retrofitted without a compressor and without an eviction: there is no memory to save."
        )
    weights = gather_weights(inner)
    for index, own in weights.items():
        for name, value in own.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"layer {index} {name!r} has values that are not finite, so nothing was written to {folder}. The "
                    "training diverged: go on from an earlier adapter, with a lower learning rate."
                )
    adapter_files.write(folder, weights, describe_adapter(inner, record))
    if card:
        write_card(folder)


def load_adapter(
    model: nn.Module,
    source: str | Path,
    *,
    window_size: int | None = None,
    num_sinks: int | None = None,
    check_base: bool = True,
    revision: str | None = None,
) -> nn.Module:
    """Load memory weights into a model, in place; the model is unchanged if anything about them is wrong.

    Args:
        model: a retrofitted model, or one that contains it. A model that is not retrofitted yet is, the way the
            adapter says; released files do not say, so for them call [`retrofit`][ahn_layers.retrofit] first.
        source: a folder written by [`save_adapter`][ahn_layers.save_adapter]; a safetensors file, or a folder of
            them, with the released names ``model.layers.<i>.ahn.fn.<parameter>``; or the id of a hub repository that
            holds either, of which safetensors and JSON files alone are downloaded.
        window_size: of a model that is not retrofitted yet, instead of the adapter's own.
        num_sinks: likewise.
        check_base: False loads the memory into another base model than the one it was trained for, if its shapes fit.
        revision: branch, tag or commit of a hub repository. Default: its main branch.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: if there is nothing at ``source``.
        ValueError: if the adapter belongs to another base model or compressor, a parameter is missing, unknown, wrongly
            shaped or not finite, a file is damaged, or there is a revision of something on this machine. The message
            names it.
    """
    asked = {"window_size": window_size, "num_sinks": num_sinks}
    chosen = {name: value for name, value in asked.items() if value is not None}
    return load_checked(model, source, chosen, "all" if check_base else "nothing", revision=revision)


def load_checked(
    model: nn.Module,
    source: str | Path,
    chosen: dict[str, int],
    checked: Checked,
    *,
    keep_dtype: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """``load_adapter``, with a choice of what is compared; ``keep_dtype`` gives the memory the dtype of the file."""
    files = adapter_files.read(source, revision)
    description = files.description
    with unchanged_on_failure(model):
        if description is not None and not _is_retrofitted(model):
            check_base_model(model, description, source, checked)  # before anything else can go wrong about it
            check_described(description, files.weights, source)
            retrofit_as_described(model, description | chosen)
        inner, record = find_retrofitted(model)
        _check_window(record, chosen)
        if description is not None:
            _check_memory(inner, record, description, source)
            check_base_model(inner, description, source, checked)
        elif record.memory_positions != "absolute":
            raise ValueError(
                f"{source}: released memories were trained with memory_positions='absolute', the model was retrofitted "
                f"with {record.memory_positions!r}."
            )
        memories = memories_of(inner)
        if description is None:  # released files know compressors alone
            memories = {index: memory._replace(eviction=FoldAll()) for index, memory in memories.items()}
        updates = _match(memories, files.weights, source, keep_dtype)
        files.check_hash()
        _write_parameters(updates, keep_dtype)
    return model


def check_base_model(model: Any, description: dict[str, Any], source: str | Path, checked: Checked) -> None:
    """Raise a ValueError if the adapter was made for another base model than this one."""
    if checked == "nothing" or not hasattr(model, "config"):
        return
    theirs, ours = description["base_model_type"], model.config.get_text_config(decoder=True).model_type
    found = [f"base_model_type={theirs!r}, the model has {ours!r}"] if theirs != ours else []
    if not found and "base" in description:
        found = list(differences(description["base"], model, facts=checked == "all"))
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{source}: the adapter was made for another base model ({description.get('base_model')}): "
            f"{'; '.join(found[:3])}{more}. Load it into that model, or pass check_base=False to use it with this one."
        )


def _is_retrofitted(model: nn.Module) -> bool:
    return any(isinstance(module.__dict__.get("hippocampus"), Retrofitted) for module in model.modules())


def _check_window(record: Retrofitted, chosen: dict[str, int]) -> None:
    for name, size in chosen.items():
        found = sorted({getattr(window, name) for window in record.windows.values()})
        if found != [size]:
            raise ValueError(
                f"{name}={size}: the model is retrofitted already, with {name}={', '.join(map(str, found))}. Choose "
                "the window there, or call restore(model) first."
            )


def _check_memory(inner: nn.Module, record: Retrofitted, description: dict[str, Any], source: str | Path) -> None:
    own = describe(inner, record)
    facts = {name: own[name] for name in ("compressor", "compressor_options", "memory_positions", "layers")}
    facts["sizes"] = next(iter(memories_of(inner).values())).sizes()
    facts["evictions"], theirs = (bound_options(u.get("evictions", [])) for u in (own, description))
    for name, ours in facts.items():
        found = theirs if name == "evictions" else description[name]
        if found != ours:
            raise ValueError(f"{source}: the adapter has {name}={found!r}, the model has {ours!r}.")


def _match(
    memories: dict[int, Memory], weights: Weights, source: str | Path, keep_dtype: bool
) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with its new value, every one of them checked."""
    with_weights = {index for index, memory in memories.items() if memory.weights()}
    if with_weights != weights.keys():
        raise ValueError(
            f"{source}: memory weights for the layers {sorted(weights)}, the model has a memory in"
            f" {sorted(with_weights)}."
        )
    updates = []
    for index in sorted(with_weights):
        compressor, own, given = memories[index].compressor, memories[index].weights(), weights[index]
        split = memories[index].split
        unused = () if compressor is None else compressor.unused_parameters
        for name in sorted(own.keys() - given.keys()):
            needs = memories[index].eviction if name.startswith(RIDES) else compressor
            raise ValueError(f"{source}: layer {index} lacks {name!r}, which {type(needs).__name__} needs.")
        for name in sorted(given.keys() - own.keys() - set(unused)):
            lacks = memories[index].eviction if name.startswith(RIDES) else compressor
            raise ValueError(f"{source}: layer {index} has {name!r}, which {type(lacks).__name__} does not know.")
        for name, parameter in own.items():
            value = given[name]
            expected = tuple(parameter.shape) if split is None else split.whole_shape(name, parameter)
            if value.shape != expected:
                raise ValueError(
                    f"{source}: layer {index} {name!r} has shape {tuple(value.shape)}, expected {expected}."
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{source}: layer {index} {name!r} holds values that are not finite.")
            if not (keep_dtype or torch.isfinite(value.to(parameter.dtype)).all()):
                raise ValueError(
                    f"{source}: layer {index} {name!r} holds values up to {float(value.abs().max()):.0f}, too large "
                    f"for {parameter.dtype}, which the model has: load the model in bfloat16 or float32."
                )
            updates.append((parameter, value if split is None else split.part(name, value)))
    return updates


@torch.no_grad()
def _write_parameters(updates: list[tuple[Tensor, Tensor]], keep_dtype: bool) -> None:
    """Write all values or none of them."""
    before = [(parameter, parameter.data, parameter.detach().clone()) for parameter, _ in updates]
    try:
        for parameter, value in updates:
            if keep_dtype and parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device, copy=True)
            else:
                parameter.copy_(_as_sharded(value, parameter))
    except BaseException:
        for parameter, data, old in before:
            parameter.data = data
            parameter.copy_(old)
        raise


def _as_sharded(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, laid out over the processes as the parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
