"""One piece of compiled code for all layers of a model: what differs between them is hidden from the compiler."""

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from transformers.cache_utils import Cache

from ...ops.ahead import compile_ahead
from ...ops.triton_forms import OPERATORS
from ..cache_layers import LayerCache
from ..decoder import DecoderAttention
from .matvec import merge_matvecs


def twin(model: nn.Module, cache: Cache, region: Callable[..., Any]) -> nn.Module:
    """A model that shares everything with this one, but runs its retrofitted layers through ``region``.

    Only the modules above and of the retrofitted blocks are copied, and shallowly: the given model stays as it is.
    """
    copied, blocks = copy.copy(model), [u for u in model.children() if isinstance(u, DecoderAttention)]
    if len(blocks) == 1 and "forward" not in vars(model):  # else somebody has replaced it
        copied._modules = {
            name: child.anonymous() if child is blocks[0] else child for name, child in model._modules.items()
        }  # type: ignore[union-attr]
        if isinstance(vars(model).get("layer_idx"), int):
            copied.__dict__["layer_idx"] = 0
        layer = blocks[0].cache_layer(cache)
        assert layer is not None
        runs = copy.copy(copied)  # another object: one that refers to itself would outlive its use
        runs.forward = partial(_run_layer, region, copied, LayerCache(layer))  # type: ignore[method-assign]
        return runs
    copied._modules = {
        name: twin(child, cache, region) if any(isinstance(u, DecoderAttention) for u in child.modules()) else child
        for name, child in model._modules.items()
        if child is not None
    }
    return copied


def compiled_region(**options: Any) -> Callable[..., Any]:
    """Runs a layer, ``(module, *args, **kwargs)``, compiled; as it is if that fails."""
    # torch.compile counts what it made of a piece of code: each model has its own piece
    plain = inspect.unwrap(run_plainly)
    function = FunctionType(plain.__code__.replace(), plain.__globals__)
    compiled: Callable[..., Any] | None = torch.compile(function, **options)

    def run(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(module, *args, **kwargs)
            except torch._dynamo.exc.RecompileError:  # was asked for
                raise
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                warnings.warn(f"{type(module).__name__} runs uncompiled: {error}", stacklevel=2)
                compiled = None
        return run_plainly(module, *args, **kwargs)

    return run


def run_plainly(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The layer as it is."""
    return type(module).forward(module, *args, **kwargs)


def _run_layer(region: Callable[..., Any], module: nn.Module, cache: LayerCache, /, *args: Any, **kwargs: Any) -> Any:
    """The layer, given its own part of the cache alone: so nothing in its arguments tells it from other layers."""
    args = tuple(cache if isinstance(u, Cache) else u for u in args)
    kwargs = {name: cache if isinstance(u, Cache) else u for name, u in kwargs.items()}
    with cache.layer.overwriting(cache.layer.state is not None):  # compiled code takes no notes
        return region(module, *args, **kwargs)


def decoding_backend(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Inductor, after the products with a single row that share it have become one launch each.

    What is left are small operations: those that do not depend on each other share launches too.
    """
    from torch._inductor.compile_fx import compile_fx

    merge_matvecs(graph.graph)
    graph.recompile()
    run, devices = launches_of(graph.graph)
    if len(devices) == 1 and (device := devices.pop()).type == "cuda":
        compile_ahead(run, device)  # beside Inductor
    return compile_fx(graph, inputs, config_patches={"combo_kernels": True})  # type: ignore[return-value]


def launches_of(graph: Graph) -> tuple[Callable[[], None], set[torch.device]]:
    """A function that launches our kernels as a graph does, on tensors that it makes; and the devices of the graph."""
    launches: list[tuple[Callable[..., Any], Any]] = []
    devices: set[torch.device] = set()

    def made_later(u: Any) -> Any:
        value = u.meta.get("example_value") if isinstance(u, Node) else u
        if not isinstance(value, Tensor):
            return value
        devices.add(value.device)
        return partial(torch.empty_strided, value.shape, value.stride(), dtype=value.dtype, device=value.device)

    for node in graph.nodes:
        launch = OPERATORS.get(node.target.name()) if isinstance(node.target, torch._ops.OpOverload) else None
        if launch is not None:
            launches.append((launch, map_aggregate(node.args, made_later)))

    def run() -> None:
        for launch, args in launches:
            launch(*map_aggregate(args, lambda u: u() if isinstance(u, partial) else u))  # type: ignore[misc]

    return run, devices
