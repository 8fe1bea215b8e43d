"""Decoding on a GPU: one CUDA graph for the step of the whole model, its layers compiled as one piece of code.

A static cache has fixed addresses, so one step can be recorded and replayed: nothing is left of what Python does
between kernels. Recorded are the model's own operations, except that each retrofitted layer runs compiled: all layers
are the same code, which is compiled once, however many there are.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers.cache_utils import Cache

from ..decoder import CACHE
from ..static_layer import StaticMemoryLayer
from .region import twin

_CHANGING = ("input_ids", "position_ids", CACHE)
_CONSTANT = (
    "attention_mask",
    "logits_to_keep",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
"""Arguments of a step that are tensors or the cache, and those that stay what they are, an empty mask among them."""


class Step:
    """The call of one token in ``generate``: the model, recorded as soon as two calls look the same.

    The first step runs as it is and compiles; the second is recorded; from then on the recording is replayed. A step
    that cannot be recorded, or whose arguments change their shape, runs as it is.

    Args:
        model: the retrofitted model.
        region: the compiled function for a layer, from ``compiled_region``.
        records: whether steps are recorded; layers are compiled in any case.

    Attributes:
        known_inputs: what later steps are called with, None in place of the next token and the cache; or None.
    """

    def __init__(self, model: nn.Module, region: Callable[..., Any], *, records: bool = True) -> None:
        self.model = model
        self.region = region
        self.records = records
        self._twin: nn.Module | None = None
        self._signature: Any = None
        self._recording: Recording | None = None
        self.known_inputs: dict[str, Any] | None = None

    def __call__(self, **inputs: Any) -> Any:
        """One step; outputs are the caller's own."""
        leaves, structure = tree_flatten(inputs, is_leaf=_is_cache)
        signature = [structure, *((u.shape, u.dtype, u.device) if isinstance(u, Tensor) else u for u in leaves)]
        if signature != self._signature:
            self._signature, self._recording, self.known_inputs = signature, None, None
            self._twin = twin(self.model, inputs[CACHE], self.region)
            return self._twin(**inputs)
        if self._recording is None and self.records:
            self._recording = self._record(leaves, structure)
            if self._recording is not None and inputs.keys() <= {*_CHANGING, *_CONSTANT}:
                known = {name: None if name in _CHANGING else u for name, u in inputs.items() if name != "return_dict"}
                if not any(isinstance(u, Tensor) for u in tree_flatten(known)[0]):
                    self.known_inputs = known
        if self._recording is None:
            return self._twin(**inputs)  # type: ignore[misc]
        return self._recording(leaves)

    def _record(self, leaves: list[Any], structure: Any) -> "Recording | None":
        try:
            return Recording(self._twin, leaves, structure)  # type: ignore[arg-type]
        except RuntimeError as error:  # of CUDA: an operation that waits for the GPU, for one
            warnings.warn(
                f"decoding runs without a CUDA graph, this model's step cannot be recorded: {error}", stacklevel=4
            )
            self.records = False
            return None


class Recording:
    """A recorded call of a function: replayed for new values of its tensor arguments."""

    def __init__(self, function: Callable[..., Any], leaves: list[Any], structure: Any) -> None:
        static = [u.clone() if isinstance(u, Tensor) else u for u in leaves]
        self._inputs = [u for u in static if isinstance(u, Tensor)]
        self._graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device_of(self._inputs[0]),
            torch.cuda.graph(self._graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
        ):
            self._outputs = function(**tree_unflatten(static, structure))
        if torch.version.cuda is not None:
            torch._C._cuda_clearCublasWorkspaces()  # that of the new stream belongs to the graph and ends with it

    def __call__(self, leaves: list[Any]) -> Any:
        """The outputs for these arguments, copied: the next replay overwrites the recorded ones."""
        for mine, new in zip(self._inputs, (u for u in leaves if isinstance(u, Tensor)), strict=True):
            mine.copy_(new)
        self._graph.replay()
        return tree_map_only(Tensor, torch.clone, self._outputs, is_leaf=_is_cache)


def can_record(cache: Any) -> bool:
    """Whether everything that this cache holds stays where it is, so that a step can be replayed."""
    return isinstance(cache, Cache) and bool(cache.layers) and all(type(u) is StaticMemoryLayer for u in cache.layers)


def _is_cache(u: Any) -> bool:
    return isinstance(u, Cache)
