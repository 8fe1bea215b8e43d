"""Reading a long prompt on a GPU: whole layers compiled, but for attention and memory, and no masks.

Between the matrix products of a layer lie dozens of small operations: norms, the rotation, the product in the MLP,
sums. For pieces of one size they are compiled, once for all layers, as soon as the model has read enough to be worth
it. To the compiler attention and memory together are a single operation that it does not look into: so no code depends
on the layer, on the piece or on where it begins.

This is for prompts that outgrow the window. They are never bit-identical to the base model, so their first
pieces, during which nothing leaves the window, need not go through its attention and its masks either.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...memory import MemoryStore
from ...ops.attention.attend import SoftmaxAttention
from ..cache_layers import LayerCache, MemoryLayer
from ..decoder import CACHE, DecoderAttention
from ..devices import only_device
from .region import compiled_region, run_plainly, twin

WORTH_COMPILING = 64
"""Full pieces that a model reads before its layers are compiled, which costs what it saves in some 140 to 220."""


class Reader:
    """Chooses what reads a prompt in pieces: the model as it is, or a twin of it that reads faster."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._region: Callable[..., Any] | None = None
        self._pieces = 0  # read or begun, of the prompts that compiled layers could have read

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As new."""
        self.__init__(**state)  # type: ignore[misc]

    def serves(self) -> bool:
        """Whether there is something to gain on the model's device: in half precision, on one CUDA GPU."""
        device = only_device(self.model)
        return (
            device is not None
            and device.type == "cuda"
            and self.model.dtype in (torch.bfloat16, torch.float16)
            and not torch.is_autocast_enabled("cuda")
        )

    def reading_model(self, length: int, size: int, inputs: dict[str, Any], options: Any) -> nn.Module:
        """The model that reads a prompt: its compiled twin, where that can read a prompt longer than the window."""
        cache, mask = inputs.get(CACHE), inputs.get("attention_mask")
        blocks = [module for module in self.model.modules() if isinstance(module, DecoderAttention)]
        if (
            length <= max(block.memory.window.capacity for block in blocks)
            or not isinstance(cache, Cache)
            or (mask is not None and mask.shape[1] != length)  # the new tokens alone were given
            or not self.serves()
            or not all(_is_suitable(block, cache) for block in blocks)
            or self.model.training
            or torch.is_grad_enabled()
            or options.output_hidden_states
            or options.output_attentions
            or (mask is not None and not bool(mask.all()))
        ):
            return self.model
        region, pieces = run_plainly, (length - int(cache.get_seq_length())) // size
        if pieces > 0 and not options.disable_compile and options.compile_config is None:
            self._pieces += pieces
            if self._pieces >= WORTH_COMPILING:
                self._region = self._region or compiled_region(dynamic=False, fullgraph=True)
                region = self._region
        return twin(self.model, cache, partial(_read_layer, region, size))


class OpaqueLayer(MemoryLayer):
    """Stands in for the cache of whatever layer is being read: attends through an operation that is not compiled.

    Args:
        reads: counts the pieces that layers have read, an integer on their device.
    """

    def __init__(self, reads: Tensor) -> None:
        super().__init__()
        self.reads = reads

    def run(
        self,
        store: MemoryStore,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        attention: SoftmaxAttention | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend with new tokens, none of them padding, and take them in."""
        assert valid is None and attention is not None
        return attend_to_piece(
            q, k, v, x, self.reads, attention.null_logits, attention.scale, attention.softcap
        ).transpose(1, 2)


class _Reading(threading.local):
    """The attention of the layer that this thread is reading."""

    attend: Callable[..., Tensor] | None = None
    reads: Tensor | None = None

    def count(self, device: torch.device) -> Tensor:
        """The number of pieces that layers on this device have read."""
        if self.reads is None or self.reads.device != device:
            self.reads = torch.zeros((), dtype=torch.long, device=device)
        return self.reads


_READING = _Reading()


@torch.library.custom_op("ahn_layers::attend_to_piece", mutates_args={"reads"})
def attend_to_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    reads: Tensor,
    null_logits: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention and memory of the layer that is being read, ``(B, T, H, E)``.

    The cache is no argument: the compiler would make new code for each layer. ``reads`` is declared as mutated, so that
    no call is dropped, repeated or reordered.
    """
    assert _READING.attend is not None
    reads += 1
    attention = SoftmaxAttention(scale, softcap, null_logits=null_logits)
    return _READING.attend(q, k, v, x, attention=attention).transpose(1, 2).contiguous()


@attend_to_piece.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, x: Tensor, reads: Tensor, *how: Tensor | float | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@contextmanager
def _attending(attend: Callable[..., Tensor]) -> Iterator[None]:
    before, _READING.attend = _READING.attend, attend
    try:
        yield
    finally:
        _READING.attend = before


def _read_layer(region: Callable[..., Any], size: int, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer on one piece: through ``region`` if the piece is a full one."""
    given = [*args, *kwargs.values()]
    block = next(u for u in module.children() if isinstance(u, DecoderAttention))
    layer = next(u.layer for u in given if isinstance(u, LayerCache))
    hidden = next(u for u in given if isinstance(u, Tensor))
    alike = partial(_without_traits, LayerCache(OpaqueLayer(_READING.count(hidden.device))))
    with _attending(partial(layer.run, block.attending, valid=None)):
        return (region if hidden.shape[1] == size else run_plainly)(
            module, *map(alike, args), **{name: alike(u) for name, u in kwargs.items()}
        )


def _without_traits(cache: LayerCache, u: Any) -> Any:
    """An argument of a layer, without what differs between layers and pieces."""
    if isinstance(u, LayerCache):
        return cache
    if isinstance(u, Tensor) and not u.is_floating_point():  # a slice of the positions of the whole prompt
        return u.clone(memory_format=torch.contiguous_format)
    return u


def _is_suitable(block: DecoderAttention, cache: Cache) -> bool:
    """Whether this block needs none of what compiled code does not do: masks, warnings, taking tokens back."""
    layer = block.cache_layer(cache)
    return (
        block.mode != "full"
        and block.owns_mask
        and not block.found.fixed_positions
        and layer is not None
        and not layer.record_past
    )
