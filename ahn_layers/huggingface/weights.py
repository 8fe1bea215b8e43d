"""Attention weights, where the caller asks for them: as the base model's, as long as every token is in the window.

transformers collects the outputs of modules of a certain class with forward hooks, which it installs when they are
first needed. A retrofitted block takes the place of such a module and is of another class: the hooks go on the block
inside.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing
from transformers.utils.output_capturing import OutputRecorder

from ..state import MemoryState
from ..tokens import take
from ..window import Window

_INSTALLED = "_output_capturing_hooks_installed"
"""What transformers sets on a model whose modules have its hooks."""
_LOCK = threading.Lock()


class Recorded:
    """The outputs of one block that transformers collects."""

    def __init__(self, model: nn.Module, name: str, block: nn.Module) -> None:
        parts = name.split(".")
        parents = (model.get_submodule(".".join(parts[:i])) for i in reversed(range(len(parts))))
        owner: Any = next(u for u in parents if isinstance(u, PreTrainedModel))
        outputs = [] if are_installed(owner) else _recorders(owner, f".{name}", block)
        self.missing = [(key, recorder.index) for key, recorder in outputs]

    def install(self, block: nn.Module) -> None:
        """Put the hooks of transformers on the block, unless it has them."""
        with _LOCK:
            for key, index in self.missing:
                output_capturing.install_output_capuring_hook(block, key, index)
            self.missing = []


class Weights:
    """The attention weights of one call of one layer.

    Args:
        weigh: the base model's attention, ``(q, k, v, real) -> weights``, for all keys and the mask of real ones.
    """

    def __init__(self, weigh: Callable[..., Tensor | None]) -> None:
        self.weigh = weigh
        self.value: Tensor | None = None

    def check(
        self,
        window: Window,
        state: MemoryState | None,
        count: int,
        valid: Bool[Tensor, "b t"] | None,
        texts: Tensor | None = None,
    ) -> None:
        """Raise if tokens will have left the window, before any is taken in, or if rows hold several texts."""
        if texts is not None:
            raise ValueError(
                "output_attentions was asked for on packed texts: each is attended to alone. Leave output_attentions "
                "off, or pass one text a row."
            )
        new: Any = count if valid is None else valid.sum(dim=1)
        total = new if state is None else state.seen.to(getattr(new, "device", None)) + new
        longest = int(total.max()) if isinstance(total, Tensor) else total
        if longest > window.capacity:
            raise ValueError(
                f"output_attentions was asked for on texts of {longest} tokens, whose sinks and window hold "
                f"{window.capacity}: attention weights over tokens that were folded do not exist. Leave "
                "output_attentions off, in the call and in the config, or use a larger window."
            )

    def find(
        self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState | None, length: int, real: Bool[Tensor, "b c"] | None
    ) -> None:
        """Weigh all tokens, in the order in which they came.

        Args:
            q: queries of the new tokens.
            k: all keys if there is no state, else ignored.
            v: all values, likewise.
            state: the state after the new tokens, None if they are all there is.
            length: columns of all tokens, past and new.
            real: False at padding among all tokens, past and new; None if there is none.

        Raises:
            ValueError: if the past has padding and ``real`` does not say where.
        """
        if state is not None:
            if real is None and not bool((state.seen == length).all()):
                raise ValueError(
                    "output_attentions was asked for on padded rows without the mask that says where their padding is: "
                    "pass the 2-D attention_mask of all tokens, past and new."
                )
            if real is None:
                ranks = torch.arange(length, device=k.device)
            else:
                ranks = (real.long().cumsum(dim=1) - 1).clamp(min=0)
            k, v = take(state.slots.k, ranks), take(state.slots.v, ranks)
        self.value = self.weigh(q, k, v, real)


def are_installed(model: nn.Module) -> bool:
    """Whether the modules of this model have the hooks of transformers, so that it will not install them again."""
    return bool(getattr(model, _INSTALLED, False))


def are_collected() -> bool:
    """Whether transformers is collecting outputs of modules."""
    return not torch.compiler.is_compiling() and bool(output_capturing._active_collector.get())


def are_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for attention weights.

    Raises:
        ValueError: in compiled code, in which they are not collected.
    """
    asked = bool(kwargs.get("output_attentions"))
    if torch.compiler.is_compiling():
        if asked:
            raise ValueError("output_attentions in compiled code: weights are collected from uncompiled models only.")
        return False
    return asked or "attentions" in (output_capturing._active_collector.get() or ())


def _recorders(owner: Any, name: str, block: nn.Module) -> list[tuple[str, OutputRecorder]]:
    """What transformers would collect from this block, as ``output_capturing`` finds it."""
    found = []
    for key, given in (getattr(owner, "_can_record_outputs", None) or {}).items():
        for one in given if isinstance(given, list) else [given]:
            recorder = one
            if not isinstance(one, OutputRecorder):
                target, suffix = (None, one) if isinstance(one, str) else (one, None)
                recorder = OutputRecorder(target, index=0 if "hidden_states" in key else 1, class_name=suffix)
            matches = recorder.target_class is not None and isinstance(block, recorder.target_class)
            matches = matches or (recorder.class_name is not None and name.endswith(recorder.class_name))
            if matches and (recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f"{name}."):
                found.append((key, recorder))
    return found
