"""What calls of modules take and return, for type checkers: to them every call of a plain module returns ``Any``."""

from typing import Any, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from .ops.attention.attend import SoftmaxAttention
from .state import MemoryState


class StoreCall(Protocol):
    """How a ``MemoryStore`` is called: as its ``forward``."""

    def __call__(
        self,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b g t d"],
        v: Float[Tensor, "b g t e"],
        x: Float[Tensor, "b t n"] | None = None,
        state: MemoryState | None = None,
        *,
        valid: Bool[Tensor, "b t"] | None = None,
        attention: SoftmaxAttention | None = None,
    ) -> tuple[Float[Tensor, "b h t e"], MemoryState]:
        """Attend with new tokens and take them in."""
        ...


class BlockCall(Protocol):
    """How a ``HippocampalAttention`` is called: as its ``forward``."""

    def __call__(
        self,
        x: Float[Tensor, "b t n"],
        state: MemoryState | None = None,
        *args: Any,
        valid: Bool[Tensor, "b t"] | None = None,
        use_memory: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, MemoryState]:
        """Run the block on new tokens."""
        ...
