"""Linear attention: the simplest memory, a running sum."""

from jaxtyping import Bool, Float
from torch import Tensor

from ..compressor import Compressor, State
from ..layers import outer
from ..ops.decode import StepRule
from ..ops.linear_scan import gated_linear_scan
from ..ops.normalize import l2_normalize
from ..ops.scan import as_operand


class LinearAttention(Compressor):
    """``S <- S + k' v^T``, ``r = S^T q'``, with ``u' = u / |u|`` (arXiv 2006.16236).

    Nothing is ever forgotten or corrected, so it fills up; it is here to be read first. The reading passes through the
    default output: RMS norm (in place of the usual normaliser) and a matrix per head.

    Args:
        hidden_size: see ``ahn_layers.Compressor``, as for the other sizes and ``shared_state``.

    Examples:
        >>> import torch
        >>> memory = LinearAttention(hidden_size=64, num_heads=4, head_dim=16)
        >>> memory.fold(memory.init_state(1, torch.zeros(())), torch.ones(1, 4, 16), torch.ones(1, 4, 16))[0, 0, 0, 0]
        tensor(0.2500)
    """

    def fold(self, state: Tensor, k: Float[Tensor, "b s d"], v: Float[Tensor, "b s e"]) -> Tensor:
        """Add ``k' v^T``."""
        return state + outer(l2_normalize(k), v)

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """``S^T q'``."""
        return super().read(state, l2_normalize(q))

    def scan(
        self,
        state: State,
        q: Float[Tensor, "b h t d"],
        k: Float[Tensor, "b g t d"],
        v: Float[Tensor, "b g t e"],
        gates: dict[str, Tensor],
        mask: Bool[Tensor, "b t"] | Bool[Tensor, "b g t"] | None = None,
    ) -> tuple[Float[Tensor, "b h t e"], State]:
        """The same, chunk by chunk."""
        assert isinstance(state, Tensor)
        q, k = (l2_normalize(as_operand(u, state)) for u in (q, k))
        if mask is not None:
            k = k.masked_fill(~(mask if mask.ndim == 3 else mask.unsqueeze(1)).unsqueeze(3), 0)
        return gated_linear_scan(state, q, k, v)

    def rule(self, x: Float[Tensor, "b 1 n"]) -> StepRule:
        """The same, one token."""
        return StepRule(matrix=self.o_proj.weight)
