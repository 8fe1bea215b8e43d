"""Runs a few tokens through a model, with stand-ins for attention and masks that record each call."""

import dis
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config_view import base_name, configs_of, give_views, original
from .interface import BASES, base_attention, mask_kind

_NAME = "hippocampal:probe"


@dataclass
class AttentionCall:
    """One call of the attention function: whose it was, what it got, and what the base model made of it, if it did."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    dropout: float
    scaling: float | None
    kwargs: dict[str, Any]
    base: str | None
    out: Tensor | None


@dataclass
class MaskCall:
    """One call of the mask function.

    Attributes:
        kind: ``full``, ``sliding``, ``chunked`` or ``bidirectional``.
        size: tokens that a sliding window or a chunk holds, None for the other kinds.
        mask: what the base implementation made of it.
        config: the config from which it was called.
        maker: the innermost module that was running and holds this config, None if there was none.
        receivers: the modules that were called with the mask, and none of whose children were.
    """

    kind: str
    size: int | None
    mask: Tensor | None
    config: Any
    maker: nn.Module | None
    receivers: list[nn.Module] = field(default_factory=list)

    def is_given(self, mask: Any) -> bool:
        """Whether this is the mask that was made, or a view of all of it."""
        if not isinstance(mask, Tensor) or self.mask is None:
            return False
        return mask is self.mask or (mask._base is self.mask and mask.shape == self.mask.shape)


class Trial:
    """What a forward pass of a model does about attention.

    Args:
        model: the model.
        start: position of the first of three tokens.
        entry: what is called: the model, or a decoder in it.
        use_cache: whether a cache is asked for.

    Attributes:
        calls: of the attention function.
        masks: calls of the mask function.
        hidden: the hidden states that each module was called with.
        output: what was returned.
    """

    def __init__(self, model: Any, start: int = 0, entry: Any = None, use_cache: bool = False) -> None:
        entry = model if entry is None else entry
        self.calls: list[AttentionCall] = []
        self.masks: list[MaskCall] = []
        self.hidden: dict[nn.Module, Tensor] = {}
        self._running: list[nn.Module] = []
        self._takers = {m for m in model.modules() if "hidden_states" in inspect.signature(type(m).forward).parameters}
        tokens = torch.arange(3, device=_device(model)).unsqueeze(0)
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        arguments["use_cache"] = use_cache
        if getattr(entry.config.get_text_config(decoder=True), "output_attentions", False):
            arguments["output_attentions"] = False  # the stand-ins have none, and hooks would be installed
        if start:
            arguments["position_ids"] = tokens + start
        with torch.no_grad(), _evaluating(model), self._standing_in(model), self._watching(model):
            self.output = entry(**arguments)

    def attention_name(self, base: str | None) -> str:
        """The stand-ins, whatever the base."""
        return _NAME

    @contextmanager
    def _standing_in(self, model: nn.Module) -> Iterator[None]:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)
        before = [(module, configs_of(module)) for module in model.modules()]
        token = _trial.set(self)
        try:
            give_views(model.modules(), self, lambda config: True)
            yield
        finally:
            _trial.reset(token)
            for module, configs in before:
                vars(module).update(configs)

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self._takers:
            x = kwargs.get("hidden_states", args[0] if args else None)
            if isinstance(x, Tensor):
                self.hidden[module] = x
        leaves = tree_leaves((args, kwargs))
        for made in self.masks:
            if any(made.is_given(u) for u in leaves):
                made.receivers = [u for u in made.receivers if u not in self._running]
                made.receivers += [module] if _reads(module, args, kwargs, made) else []
        self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def make_mask(self, **kwargs: Any) -> Any:
        """The mask that the base implementation makes, never skipped."""
        config = original(kwargs["config"])
        held = ((module, original(u)) for module in reversed(self._running) for u in configs_of(module).values())
        maker = next((module for module, u in held if _contains(u, config)), None)
        whole = {name: False for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip") if name in kwargs}
        mask = ALL_MASK_ATTENTION_FUNCTIONS[base_name(config._attn_implementation)](**kwargs | whole)
        mask = mask.contiguous() if isinstance(mask, Tensor) else mask
        self.masks.append(MaskCall(*_kind(kwargs), mask, config, maker))
        return mask


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, dropout: float = 0.0, **kwargs: Any
) -> tuple[Tensor, None]:
    trial = _trial.get()
    assert trial is not None, "the probe's attention function was called outside the probe"
    base = next((base_name(original(config)._attn_implementation) for config in configs_of(module).values()), None)
    scaling, out = kwargs.pop("scaling", None), None
    if base in BASES:
        given = {"scaling": scaling, "dropout": dropout, **kwargs}
        out = base_attention(base, module)(module, q, k, v, attention_mask, **given)[0]
    trial.calls.append(AttentionCall(module, q, k, v, attention_mask, dropout, scaling, kwargs, base, out))
    if out is None:
        out = v.repeat_interleave(max(1, q.shape[1] // v.shape[1]), dim=1).transpose(1, 2).contiguous()
    return out, None


def _mask(**kwargs: Any) -> Any:
    trial = _trial.get()
    assert trial is not None, "the probe's mask function was called outside the probe"
    return trial.make_mask(**kwargs)


def _kind(call: dict[str, Any]) -> tuple[str, int | None]:
    if mask_kind(call) != "local":
        return mask_kind(call), None
    size = int(call["local_size"])
    first, query, key = (torch.tensor(i, device="cpu") for i in (0, size, 1))  # values, also on the meta device
    try:
        slides = bool(call["mask_function"](first, first, query, key))
    except IndexError:  # a function of these three tokens
        slides = "chunked_attention" not in (getattr(call["config"], "layer_types", None) or ())
    return ("sliding" if slides else "chunked"), size


def _reads(module: nn.Module, args: Any, kwargs: Any, made: MaskCall) -> bool:
    """Whether a module looks at a mask that it is given: not if its forward never loads that argument."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return True
    given = dict(zip(code.co_varnames[1 : code.co_argcount], args, strict=False)) | kwargs
    names = {name for name, value in given.items() if made.is_given(value)}
    known = names <= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    loaded = {u.argval for u in dis.get_instructions(code) if u.opname.startswith("LOAD") and isinstance(u.argval, str)}
    pairs = (u.argval for u in dis.get_instructions(code) if isinstance(u.argval, tuple))
    return not (names and known) or bool(names & loaded.union(*pairs))


def _contains(config: Any, other: Any) -> bool:
    parts = (u for u in vars(config).values() if isinstance(u, PreTrainedConfig))
    return config is other or any(_contains(original(part), other) for part in parts)


def _device(model: Any) -> Any:
    """Where the model takes its inputs: accelerate's hooks know it, if they hold weights elsewhere meanwhile."""
    hooks = [m._hf_hook for m in model.modules() if hasattr(m, "_hf_hook")]
    places = [getattr(hook, "execution_device", None) for one in hooks for hook in getattr(one, "hooks", [one])]
    known = [place for place in places if place is not None]
    return known[0] if model.device.type == "meta" and known else model.device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
