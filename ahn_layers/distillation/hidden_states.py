"""The model as a pass to its last hidden states, and its output layer as a function of them."""

from contextlib import AbstractContextManager, nullcontext
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..attention import HippocampalAttention
from ..fingerprint import whole
from ..layers import is_plain
from ..peft import in_use
from ..record import find_retrofitted
from ..undo import hooked
from .loss import Head


def run_hidden(
    model: nn.Module, input_ids: Int[Tensor, "b t"], *, with_layers: bool = False
) -> tuple[Float[Tensor, "b t n"], list[Tensor]]:
    """The hidden states that enter the output layer, and on request the output of every retrofitted attention block.

    The model is called as a whole, so that wrappers around it do their work; its logits are computed for one token.
    Compiled layers whose blocks are asked for run uncompiled: the hooks on them would be compiled in, anew every time.
    """
    inner, _ = find_retrofitted(model)
    blocks = [m for m in inner.modules() if isinstance(m, HippocampalAttention)] if with_layers else []
    final, collecting = _collect(_decoder_of(inner))
    layers, collecting_layers = _collect(*blocks)
    with collecting, collecting_layers, torch.compiler.set_stance("force_eager") if with_layers else nullcontext():
        out = model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    if inner not in _CHECKED:
        _check_head(model, final[0][:, -1].detach(), out.logits[:, -1].detach())
        _CHECKED.add(inner)
    return final[0], layers


def _decoder_of(inner: nn.Module) -> nn.Module:
    """What makes the hidden states that enter the output layer; some models name themselves."""
    decoder: nn.Module = inner.get_decoder()  # type: ignore[operator]
    if decoder is not inner:
        return decoder
    return next((u for u in inner.children() if hasattr(u, "get_input_embeddings")), inner)


_CHECKED: WeakSet[nn.Module] = WeakSet()
"""Models whose logits are what ``output_head`` makes them."""


def _check_head(model: nn.Module, hidden: Tensor, logits: Tensor) -> None:
    found, expected = output_head(model)(hidden).float(), logits.float()
    if (found - expected).abs().max() > 0.05 * expected.abs().max():
        raise ValueError(
            f"{type(find_retrofitted(model)[0]).__name__} does more to its logits than output_head knows (a factor, a "
            "soft cap): its losses would be wrong. Compute them from the model's own logits."
        )


def _collect(*modules: nn.Module) -> tuple[list[Tensor], AbstractContextManager[None]]:
    """The (first) output of each module, in the order in which they run, and a context in which they are collected."""
    outputs: list[Tensor] = []
    return outputs, hooked(m.register_forward_hook(lambda _m, _a, out: outputs.append(out[0])) for m in modules)


def output_head(model: nn.Module) -> Head:
    """The output layer as a function of the decoder's last hidden states, with everything that follows it.

    A factor or a soft cap of the logits is read from the model's config; weights that are sharded are gathered. A layer
    that is adapted (LoRA) or quantized is called as it is.

    Args:
        model: a retrofitted transformers model, bare or wrapped.

    Returns:
        A function from hidden states ``(n, N)`` to logits ``(n, V)``; the weights get no gradient.
    """
    inner, _ = find_retrofitted(model)
    layer: nn.Module = inner.get_output_embeddings()  # type: ignore[operator]
    held = (getattr(layer, name, None) for name in ("weight", "bias"))
    weight, bias = (None if u is None else whole(u.detach()) for u in held)
    own = in_use(layer)
    adapted = not (is_plain(own) or hasattr(own.weight, "full_tensor"))
    config = inner.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def head(hidden: Tensor) -> Tensor:
        hidden = hidden.to(weight.dtype) if weight.is_floating_point() else hidden  # type: ignore[union-attr]
        logits = layer(hidden) if adapted else nn.functional.linear(hidden, weight, bias)  # type: ignore[arg-type]
        logits = logits if factor == 1.0 else logits * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head
