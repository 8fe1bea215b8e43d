"""One forward of a retrofitted decoder: what its attention layers cannot see for themselves.

Hooks on the modules that make masks surround each call. They say which model a thread is running, so that the masks of
any other model stay its own; they compare the padding mask with what the cache has taken in, find packed texts, and
make sure that a call that breaks off leaves the cache as it was.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..fingerprint import identity_of
from .all_layers import refuse_uneven
from .cache import HippocampalCache, fill, self_attention
from .config_view import naming
from .joined import align_rows, count_from_first, refuse_unaligned
from .linear_padding import Resting, resting_rows
from .linear_rows import refuse_several
from .packing import find_texts, positions_of
from .reconcile import check_memory, length_of, note_memory, note_padding, reconcile
from .transaction import begin, complete, settle, settle_for_use
from .whole_call import WholeCallHook, hand_over

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What the cache is called in the forward of models and attention blocks."""
_BOUNDS = ("cu_seq_lens_q", "cu_seqlens")
PACKED = (*_BOUNDS, "cu_seq_lens_k", "seq_idx")
"""Arguments that say where packed texts begin."""


@dataclass(eq=False)
class Call:
    """A running call of a module that makes masks.

    Attributes:
        owner: the record of the retrofitted model.
        module: the module, None while masks are made ahead of a call.
        cache: the cache that it was given, None without.
        mask: the 2-D padding mask that it was given, None without.
        count: new tokens in each row, 0 if it is not known which are real (masks were made ahead of the call).
        real: False at padding among the new tokens, None if there is none.
        texts: the number of each token's text where rows hold several, else None.
        identity: of the memory weights, empty if they are not used or cannot be read.
        resting: rows whose convolutions and recurrences must stay as they are, None if there are none.
        outer: whether the call is not part of another one of the same model.
    """

    owner: Any
    module: nn.Module | None
    cache: Any = None
    mask: Tensor | None = None
    count: int = 0
    real: Bool[Tensor, "b t"] | None = None
    texts: Int[Tensor, "b t"] | None = None
    identity: str = ""
    resting: Resting | None = None
    outer: bool = False


class _Calls(threading.local):
    """What this thread is running, from the outermost call to the innermost."""

    def __init__(self) -> None:  # in every thread; a default of the class would confuse compilers
        self.stack: tuple[Call, ...] = ()


_CALLS = _Calls()


def is_running(config: Any) -> bool:
    """Whether this config is a view, and the model that it belongs to is what this thread is running."""
    owner = naming(config)
    return owner is not None and len(_CALLS.stack) > 0 and _CALLS.stack[-1].owner is owner


def texts_of_call() -> Int[Tensor, "b t"] | None:
    """The texts that are packed into the rows of the running call, None if each row is one."""
    return _CALLS.stack[-1].texts if len(_CALLS.stack) > 0 else None


def padding_mask() -> Tensor | None:
    """False at padding among all tokens of the running call, past and new; None if it was given no such mask."""
    mask = _CALLS.stack[-1].mask if _CALLS.stack else None
    return None if mask is None or bool(mask.all()) else mask.to(torch.bool)


@contextmanager
def running(owner: Any) -> Iterator[None]:
    """Within this context, the masks that are made are those of this model."""
    before = _CALLS.stack
    _CALLS.stack = (*before, Call(owner, None))
    try:
        yield
    finally:
        _CALLS.stack = before


class ForwardHook:
    """Hooks of a module that makes masks: they surround each of its calls.

    An object and not functions, so that the model can still be pickled and copied.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def register(self, module: nn.Module) -> None:
        """Hook into the calls of a module."""
        module.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module is called. A call of the same module that is still here was interrupted.

        Raises:
            ValueError: if mask, cache and tokens contradict each other, or packed texts cannot be kept apart.
        """
        stack = _CALLS.stack
        still_here = [i for i, call in enumerate(stack) if call.module is module]
        stack = stack[: still_here[0]] if still_here else stack
        _CALLS.stack = stack
        call = Call(self.owner, module)
        if torch.compiler.is_compiling():
            _assert_one_text(kwargs)
            refuse_unaligned(kwargs)
        elif self.owner.mode == "full" or _is_recording():  # nothing of ours, or nothing but the model's own operations
            _fill(next((u for u in (kwargs.get(name) for name in CACHE_NAMES) if u is not None), None), module)
        elif stack and stack[-1].owner is self.owner and stack[-1].module is not None:
            call.mask, call.texts = stack[-1].mask, stack[-1].texts
        else:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            self._open(call, kwargs, module)
            _CALLS.stack = (*stack, call)
            return (), kwargs
        _CALLS.stack = (*stack, call)
        return None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over, or failed, perhaps before it was announced."""
        if not _CALLS.stack or _CALLS.stack[-1].module is not module:
            return
        call, _CALLS.stack = _CALLS.stack[-1], _CALLS.stack[:-1]
        if not call.outer:
            return
        if output is None:
            settle(call.cache)
            return
        cache = call.cache if call.cache is not None else _cache_in(output)
        if isinstance(cache, Cache):
            note_memory(cache, call.identity)
            if call.resting is not None:
                call.resting.put_back(cache)
            if call.count:
                note_padding(cache, call.real, call.count, taken_in=True)
            hand_over(cache, complete(cache))

    def _open(self, call: Call, kwargs: dict[str, Any], module: nn.Module) -> None:
        """Look at the arguments of an outermost call, and change them where packed texts need it."""
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            return
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        cache = self_attention(cache)
        _fill(cache, module)
        settle_for_use(cache)
        refuse_uneven(cache)
        if not self.owner.goes_on:
            refuse_several(length_of(cache), tokens.shape[1])
        kept = cache is not None or (kwargs.get("use_cache") is not False and not torch.is_grad_enabled())
        if kept and self.owner.mode == "memory":
            call.identity = identity_of(module, self.owner)
            check_memory(cache, call.identity)
        mask = align_rows(cache, kwargs, tokens, module)
        call.outer, call.cache, call.mask = True, cache, mask if isinstance(mask, Tensor) and mask.ndim != 4 else None
        call.count = tokens.shape[1] if mask is None or call.mask is not None else 0
        call.real = reconcile(cache, call.mask, *tokens.shape[:2])
        call.texts = self._find_texts(call, kwargs, tokens)
        if self.owner.tells_positions and self.owner.mode == "memory" and call.texts is None:
            count_from_first(cache, call.real, kwargs, tokens, module)
        if isinstance(cache, Cache):
            call.resting = resting_rows(cache, call.real)
            begin(cache, tokens.shape[1])

    def _find_texts(self, call: Call, kwargs: dict[str, Any], tokens: Tensor) -> Tensor | None:
        """Find packed texts, and arrange the arguments so that layers that are not retrofitted keep them apart too."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            positions = None  # generate has made the masks already: what is padding cannot be told from a text
        texts = find_texts(
            *tokens.shape[:2], position_ids=positions, real=call.real, seq_idx=kwargs.get("seq_idx"),
            cu_seq_lens=next((kwargs[name] for name in _BOUNDS if kwargs.get(name) is not None), None),
            gaps_separate=mask is None and call.cache is None and not kwargs.get("use_cache"),
        )  # fmt: skip
        if texts is None:
            for name in PACKED:
                kwargs.pop(name, None)  # they name the only text there is
            return None
        if call.cache is not None or kwargs.get("use_cache"):
            raise ValueError(
                "packed texts with a cache: several texts in one row (position_ids that begin again, cu_seq_lens or "
                "seq_idx) cannot be continued as one. Pass use_cache=False, or one text a row."
            )
        kwargs["use_cache"] = False  # a cache would hold texts that must not be mixed
        if self.owner.recurs and kwargs.get("seq_idx") is None:
            raise ValueError(
                "packed texts in a model with convolutions or recurrences, which go on from one text into the next, "
                "also without a retrofit: position_ids and cu_seq_lens alone do not stop them. Pass seq_idx too "
                "(DataCollatorWithFlattening(return_seq_idx=True)), or one text a row."
            )
        if self.owner.skipped and call.real is not None:
            raise ValueError(
                "packed texts with padding, in a model of which some attention layers are not retrofitted: these would "
                "mix the texts. Leave the padding out, or pad the texts row by row."
            )
        if call.real is None:
            kwargs["attention_mask"] = None  # it says nothing, and with it transformers does not look for texts
        if positions is None:
            kwargs["position_ids"] = positions_of(texts)
        return texts


def remove_hooks(model: nn.Module) -> None:
    """Take all of our hooks out of a model."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
            (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
        ):
            ours = (ForwardHook, WholeCallHook)
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), ours)]:
                del hooks[key]
                for flag in flags:
                    flag.pop(key, None)


def _fill(cache: Any, module: nn.Module) -> None:
    """Give a cache of ours that is empty the layers that this module expects."""
    if isinstance(cache, HippocampalCache):
        fill(cache, module.config.get_text_config(decoder=True))  # type: ignore[union-attr,operator]


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _assert_one_text(kwargs: dict[str, Any]) -> None:
    """In compiled code packed texts are not kept apart: assert that there are none."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] > 1:
        hidden = kwargs.get("attention_mask")
        step = positions.diff(dim=-1) > 0
        if isinstance(hidden, Tensor) and hidden.ndim == 2:
            real = hidden[:, -positions.shape[1] :].to(torch.bool)
            step = step | ~real[:, 1:] | (real[:, :-1].cumsum(dim=1) == 0)  # the positions of pads mean nothing
        torch._assert_async(step.all(), "position_ids begin again within a row: packed texts need an uncompiled model")


def _cache_in(output: Any) -> Any:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return self_attention(next((u for u in values if isinstance(u, Cache)), None))
