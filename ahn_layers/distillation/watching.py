"""What each memory would be given, from a pass of the model with full attention."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..attention import HippocampalAttention
from ..memory import MemoryStore
from ..ops.attention.attend import SoftmaxAttention
from ..retrofit import memory_attention
from ..undo import hooked
from .hidden_states import run_hidden
from .noise import evaluating, still
from .windows import refuse_sliding, use_window


class Attended(NamedTuple):
    """One layer's part of a pass with full attention.

    Attributes:
        layer: number of the layer among those with a memory.
        store: its memory.
        q: queries, rotated.
        k: keys, rotated.
        v: values.
        x: hidden states that enter the attention block.
        attention: how the model attends.
    """

    layer: int
    store: MemoryStore
    q: Float[Tensor, "b h t d"]
    k: Float[Tensor, "b g t d"]
    v: Float[Tensor, "b g t e"]
    x: Float[Tensor, "b t n"]
    attention: SoftmaxAttention

    def weights(self, start: int, stop: int) -> Float[Tensor, "b g r u c"]:
        """Attention of the queries ``start`` to ``stop`` to the keys before ``stop``, by key/value and query head."""
        q, k = self.q[:, :, start:stop], self.k[:, :, :stop]
        grouped = q.unflatten(1, (k.shape[1], -1))
        scale = q.shape[-1] ** -0.5 if self.attention.scale is None else self.attention.scale
        logits = (grouped @ k.unsqueeze(2).mT).float().mul_(scale)  # in place: on a CPU new memory takes longer
        if self.attention.softcap is not None:
            logits = self.attention.softcap * torch.tanh(logits / self.attention.softcap)
        place = torch.arange(start, stop, device=q.device)
        logits[..., start:].masked_fill_(place > place.unsqueeze(1), float("-inf"))
        if self.attention.null_logits is None:
            return logits.softmax(dim=-1)
        null = self.attention.null_logits.to(logits.dtype).view(1, *logits.shape[1:3], 1, 1)
        return torch.cat((logits, null.expand(*logits.shape[:4], 1)), dim=-1).softmax(dim=-1)[..., :-1]


@torch.no_grad()
def watch_full_attention(model: nn.Module, input_ids: Int[Tensor, "b t"], look: Callable[[Attended], None]) -> None:
    """Run a model with full attention and look at each layer in turn, without gradients.

    A window as long as the text is full attention: nothing leaves it.
    """
    blocks = [module for module in model.modules() if isinstance(module, HippocampalAttention)]
    refuse_sliding(blocks, input_ids.shape[1])
    stores, recomputed = [block.store for block in blocks], still(model)

    def hook(index: int) -> Callable[..., None]:
        def see(store: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            q, k, v, x = args[:4]
            look(Attended(index, store, q, k, v, x, kwargs.get("attention") or SoftmaxAttention()))

        return see

    hooks = hooked(store.register_forward_pre_hook(hook(i), with_kwargs=True) for i, store in enumerate(stores))
    eager = torch.compiler.set_stance("force_eager")
    with memory_attention(model), use_window(model, input_ids.shape[1]), hooks, evaluating(recomputed), eager:
        run_hidden(model, input_ids)
