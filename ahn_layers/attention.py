"""A decoder's attention block with its attention replaced by a memory store."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .calls import BlockCall
from .checks import check_kinds
from .memory import MemoryStore
from .ops.attention.attend import SoftmaxAttention
from .peft import running
from .state import MemoryState


class HippocampalAttention(nn.Module):
    """An attention block whose attention runs through a memory store.

    The block computes queries, keys and values as it always did and, where it called scaled dot-product attention,
    calls the ``attend`` that it is given: one changed line. This module takes the block's place in the model. It shares
    the block's parameters, buffers and children, so every base parameter keeps its name, and adds one child,
    ``memory``: all new keys lie below ``memory.``. Other attributes are looked up in the block.

    Args:
        block: a module whose ``forward(x, ..., attend)`` calls ``attend(q, k, v)`` exactly once, with shapes
            ``(B, H, T, D)``, ``(B, G, T, D)``, ``(B, G, T, E)``, and gets ``(B, H, T, E)``.
        store: the memory.

    Raises:
        TypeError: if ``block`` is no module, or ``store`` no ``MemoryStore``.
        ValueError: if the block is wrapped already, or has a child called ``memory``.

    Examples:
        >>> import torch
        >>> from ahn_layers import GatedDeltaNet, MemoryStore, Window
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        ...
        ...     def forward(self, x, attend):
        ...         q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        ...         return self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        >>> store = MemoryStore(Window(16, num_sinks=2), GatedDeltaNet(hidden_size=32, num_heads=4, head_dim=8))
        >>> layer = HippocampalAttention(Attention(), store)
        >>> y, state = layer(torch.randn(1, 100, 32))
        >>> y, state = layer(torch.randn(1, 1, 32), state)
        >>> y.shape, state.length
        (torch.Size([1, 1, 32]), 101)
    """

    memory: MemoryStore
    __call__: BlockCall

    def __init__(self, block: nn.Module, store: MemoryStore) -> None:
        check_kinds({"block": (block, nn.Module), "store": (store, MemoryStore)})
        if isinstance(block, HippocampalAttention):
            raise ValueError(f"{type(block.block).__name__} is a HippocampalAttention already: wrap the block once.")
        if "memory" in block._modules or "memory" in block._parameters or "memory" in block._buffers:
            raise ValueError(f"{type(block).__name__} has an attribute 'memory': rename it, the store takes that name.")
        super().__init__()
        self.training = block.training
        self.__dict__["block"] = block  # not a child: its parameters are ours, under their own names
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = block.__dict__[shared]
        self.memory = store

    def __getattr__(self, name: str) -> Any:
        """Whatever the wrapper lacks, the block has: ``layer_idx``, ``head_dim``, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "block" not in self.__dict__:
                raise
            return getattr(self.__dict__["block"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the block holds is set in the block, which reads it: ``scaling``, ``layer_idx``."""
        block = self.__dict__.get("block")
        if block is not None and name in block.__dict__ and not name.startswith("_") and name != "forward":
            setattr(block, name, value)
            if name not in self.__dict__:
                return
        super().__setattr__(name, value)

    @property
    def store(self) -> MemoryStore:
        """The memory that runs: ``memory``, or the copy of it that PEFT trains (``modules_to_save``)."""
        memory: nn.Module = self.memory
        return memory if isinstance(memory, MemoryStore) else running(memory)  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "HippocampalAttention":
        """Set training mode, in the block too."""
        self.block.training = mode
        return super().train(mode)

    def unwrap(self) -> nn.Module:
        """The block as it was, without the memory; this module must not be used afterwards."""
        del self._modules["memory"]
        return self.block

    def forward(
        self,
        x: Float[Tensor, "b t n"],
        state: MemoryState | None = None,
        *args: Any,
        valid: Bool[Tensor, "b t"] | None = None,
        use_memory: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, MemoryState]:
        """Run the block on new tokens.

        Args:
            x: hidden states that enter the block.
            state: what the last call returned, None to begin.
            *args: further positional arguments of the block.
            valid: False at padding.
            use_memory: False attends to sinks and window alone.
            **kwargs: further keyword arguments of the block.

        Returns:
            What the block returned, and the state after these tokens.

        Raises:
            RuntimeError: if the block did not call ``attend`` exactly once.
        """
        store = self.store if use_memory else self.store.without_memory()

        def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            nonlocal state
            out, state = store(q, k, v, x, state, valid=valid, **options)
            return out

        attend = Attend(type(self.block).__name__, run)
        out = self.block(x, *args, attend=attend, **kwargs)
        attend.check()
        assert state is not None
        return out, state


class Attend:
    """The ``attend`` that one call of one block is given: makes sure that it is called exactly once.

    Args:
        name: the block's name, for messages.
        run: the attention, ``(q, k, v, **options) -> out``.
    """

    def __init__(self, name: str, run: Callable[..., Tensor]) -> None:
        self.name, self.run = name, run
        self.called = False

    def __call__(
        self,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b g t d"],
        v: Float[Tensor, "b g t e"],
        *,
        scale: float | None = None,
        softcap: float | None = None,
        null_logits: Float[Tensor, " h"] | None = None,
        dense: Callable[..., Tensor] | None = None,
        ahead: Int[Tensor, "b t"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b h t e"]:
        """Attend through the store, as ``SoftmaxAttention`` with these arguments; other options are the store's.

        Raises:
            RuntimeError: at the second call.
        """
        if self.called:
            raise RuntimeError(
                f"{self.name} called attend twice in one forward: expected exactly once, since each call takes its "
                "tokens into the memory. Wrap each attention of the block on its own."
            )
        self.called = True
        attention = SoftmaxAttention(scale, softcap, dense, null_logits, ahead)
        return self.run(q, k, v, attention=attention, **options)

    def check(self) -> None:
        """Raise a RuntimeError if the block is done and never called."""
        if not self.called:
            raise RuntimeError(
                f"{self.name} did not call attend: expected attend(q, k, v) in its forward, in place of "
                "scaled_dot_product_attention."
            )
