"""Retrofit a loaded model with a memory, remove the memory, and switch between the two."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import nn

from .arguments import check_arguments
from .attention import HippocampalAttention
from .compressor import Compressor
from .eviction import Eviction, FoldAll
from .missing import needs_transformers
from .peft import out_of_use
from .positions import MemoryPositions
from .record import Mode, Retrofitted, find_retrofitted
from .undo import unchanged_on_failure
from .window import SinkPositions, Window

Model = TypeVar("Model", bound=nn.Module)


def retrofit(
    model: Model,
    compressor: type[Compressor] | None,
    *,
    window_size: int | Mapping[int, int],
    num_sinks: int | Mapping[int, int] = 0,
    layers: Iterable[int] | None = None,
    sink_positions: SinkPositions = "trained",
    memory_positions: MemoryPositions = "absolute",
    eviction: Eviction | Mapping[int, Eviction] | None = None,
    **compressor_options: Any,
) -> Model:
    """Give every attention layer of a loaded transformers decoder a bounded memory, in place.

    Base parameters keep their names and values; the memory's own lie below ``memory.`` of each attention block. Until
    they are trained or loaded ([`load_adapter`][ahn_layers.load_adapter]) the model is exactly sinks + window.

    Args:
        model: a causal language model of transformers whose attention goes through the attention interface.
        compressor: the class of the long-term memory, None for sinks + window alone.
        window_size: most recent tokens kept without loss, sinks not counted; for all layers, or a mapping from layer
            indices.
        num_sinks: first tokens kept without loss, likewise.
        layers: indices of the layers to retrofit. Default: those of a mapping; else every full-attention layer; in a
            model that has none, every layer whose own sliding window holds at least ``num_sinks + window_size`` tokens.
        sink_positions: see [`Window`][ahn_layers.Window].
        memory_positions: see [`MemoryStore`][ahn_layers.MemoryStore].
        eviction: what happens to a token that leaves the window, for all layers or by layer; each layer gets its own
            (``Eviction.for_layer``). Default: it is folded into the compressor's state.
        **compressor_options: passed to the compressor, ``shared_state=True`` for instance.

    Returns:
        The same model.

    Raises:
        TypeError: if ``model`` is not a transformers model, ``compressor`` is not a class, ``eviction`` not an
            ``Eviction``, or an option is unknown.
        ValueError: if the model is retrofitted already, has no suitable layer, an eviction is given for a layer that
            is not retrofitted, or mappings and ``layers`` name different layers. The model is unchanged.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ahn_layers import GatedDeltaNet, retrofit
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = retrofit(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), GatedDeltaNet, window_size=16)
        >>> model.generate(torch.arange(40)[None], max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 43])
    """
    window_of, layers = _windows(window_size, num_sinks, sink_positions, layers)
    check_arguments(compressor, compressor_options, eviction)
    try:
        from .huggingface import install, probe
    except ImportError as error:
        raise needs_transformers("retrofit") from error

    install.check_model(model)
    found = probe.probe_model(model)
    install.check_blocks(model, found.blocks)
    chosen, skipped = install.choose(found.blocks, window_of, layers)
    policies = _by_layer(eviction, [block.layer_idx for block in chosen])
    windows = {block.layer_idx: window_of(block.layer_idx) for block in chosen}
    common = (memory_positions, compressor_options)
    stores = [
        install.make_store(block, windows[block.layer_idx], compressor, policies[block.layer_idx], *common)
        for block in chosen
    ]
    record = Retrofitted(
        windows,
        None if compressor is None else compressor.__name__,
        memory_positions,
        compressor_options,
        skipped,
        found.owned(chosen),
        returns_cache=found.returns_cache,
        goes_on=found.goes_on,
        recurs=found.recurs,
        tells_positions=compressor is not None
        and not compressor.turns_freely
        and any(block.rotary is not None or block.frequencies is not None for block in chosen),
    )
    with unchanged_on_failure(model):
        install.replace_blocks(model, found, chosen, stores, record)
    return model


def _windows(
    window_size: int | Mapping[int, int],
    num_sinks: int | Mapping[int, int],
    sink_positions: SinkPositions,
    layers: Iterable[int] | None,
) -> tuple[Callable[[int], Window], list[int] | None]:
    """The window of each layer, each of them checked, and the layers that are asked for."""
    given = {"window_size": window_size, "num_sinks": num_sinks}
    by_layer = {name: dict(size) for name, size in given.items() if isinstance(size, Mapping)}
    try:
        asked = None if layers is None else [operator.index(layer) for layer in layers]
    except TypeError:
        raise TypeError(f"layers={layers!r}: expected a list of whole numbers, the indices of layers.") from None
    for name, sizes in by_layer.items():
        asked = sorted(sizes) if asked is None else asked
        if set(sizes) != set(asked):
            raise ValueError(
                f"{name} has sizes for the layers {sorted(sizes)}: expected one for each of {sorted(asked)}, which "
                "layers or the other mapping names."
            )

    def window_of(layer: int) -> Window:
        sizes = {name: by_layer[name][layer] if name in by_layer else size for name, size in given.items()}
        return Window(**sizes, sink_positions=sink_positions)  # type: ignore[arg-type]

    for layer in (0,) if asked is None else asked:
        window_of(layer)
    return window_of, asked


def _by_layer(eviction: Eviction | Mapping[int, Eviction] | None, layers: list[int]) -> dict[int, Eviction | None]:
    """The policy of each layer."""
    if not isinstance(eviction, Mapping):
        return dict.fromkeys(layers, eviction)
    unknown = sorted(set(eviction) - set(layers))
    if unknown:
        raise ValueError(f"eviction: no memory in the layers {unknown}, expected some of {sorted(layers)}.")
    return {layer: eviction.get(layer) for layer in layers}


def restore(model: Model) -> Model:
    """Remove the memory: the model is what it was before ``retrofit``, with its current base weights.

    Args:
        model: a retrofitted model, or one that contains it.

    Returns:
        The same model.

    Raises:
        ValueError: if the model is not retrofitted.
    """
    inner, record = find_retrofitted(model)
    from .huggingface import install

    for parent in list(inner.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HippocampalAttention):
                setattr(parent, name, child.unwrap())
    install.take_back(inner, record)
    return model


def full_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context, run the base model exactly: the teacher in distillation, the baseline in measurements.

    Caches filled inside and outside do not mix; mixing them is an error. The switch holds for the model, hence for
    every thread that runs it.

    Args:
        model: a retrofitted model, or one that contains it.

    Raises:
        ValueError: if the model is not retrofitted.
    """
    return _switched(model, "full")


def window_only(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context, run sinks + window without the memory: the ablation that a memory has to beat.

    With gradient checkpointing the backward pass has to be inside as well: it runs the layers again.

    Args:
        model: a retrofitted model, or one that contains it.

    Raises:
        ValueError: if the model is not retrofitted.
    """
    return _switched(model, "window")


def memory_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context, run with the memory, where a surrounding context has switched it off.

    Raises:
        ValueError: if the model is not retrofitted.
    """
    return _switched(model, "memory")


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the memory alone, by their names in the model.

    Where PEFT trains a copy of the memory (``modules_to_save``), these are the parameters of the active adapter's copy.

    Args:
        model: any model that contains [`HippocampalAttention`][ahn_layers.HippocampalAttention] blocks.
    """
    for name, module in model.named_modules():
        if isinstance(module, HippocampalAttention):
            idle = out_of_use(module.memory)
            yield from ((f"{name}.memory.{key}", p) for key, p in module.memory.named_parameters() if p not in idle)


def memory_report(model: nn.Module) -> str:
    """A table of what is retrofitted, and what each layer holds per sequence once its window is full.

    Of a model that is split over several processes (tensor parallelism), this process's share.

    Args:
        model: a retrofitted model, or one that contains it.

    Raises:
        ValueError: if the model is not retrofitted.
    """
    inner, record = find_retrofitted(model)
    stores = [module.memory for module in inner.modules() if isinstance(module, HippocampalAttention)]
    evicts = any(not isinstance(store.eviction, FoldAll) for store in stores)
    rows = [
        (
            "layer",
            "window",
            "sinks",
            *(["eviction"] if evicts else []),
            "compressor",
            "parameters",
            "bytes per sequence",
        )
    ]
    parameters = total = 0
    for name, module in inner.named_modules():
        if isinstance(module, HippocampalAttention):
            count = sum(p.numel() for p in module.memory.parameters())
            size = module.memory.bytes_per_row(module.found.like, **module.found.sizes)  # type: ignore[union-attr]
            parameters, total = parameters + count, total + size
            window = module.memory.window
            kind = type(module.memory.compressor).__name__ if module.memory.compressor else "none"
            policy = [str(module.memory.eviction)] if evicts else []
            row = (name, f"{window.window_size:,}", f"{window.num_sinks:,}", *policy, kind, f"{count:,}", f"{size:,}")
            rows.append(row)
    rows.append(("total", *[""] * (len(rows[0]) - 3), f"{parameters:,}", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        sides = ("<", ">", ">", *["<"] * (len(row) - 5), ">", ">")
        cells = zip(row, widths, sides, strict=True)
        lines.append("  ".join(f"{cell:{side}{width}}" for cell, width, side in cells))
    lines.insert(1, "-" * len(lines[0]))
    shares = max(1 if store.split is None else store.split.shares for store in stores)
    lines += [f"split by heads over {shares} processes: parameters and bytes of this one"] if shares > 1 else []
    lines += [f"skipped {name}: {reason}" for name, reason in record.skipped.items()]
    return "\n".join(lines)


@contextmanager
def _switched(model: nn.Module, mode: Mode) -> Iterator[None]:
    _, record = find_retrofitted(model)
    with record.switched(mode):
        yield
