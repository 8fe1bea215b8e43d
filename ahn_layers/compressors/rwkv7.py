"""RWKV7: every channel decays, is erased and is written to at its own pace."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..layers import LowRank, Scale
from ..ops.pointwise.normalize import l2_normalize
from ..rank_one import DiagonalPlusRankOne, Transition


class RWKV7(DiagonalPlusRankOne):
    """The generalised delta rule of RWKV-7 (arXiv 2503.14456).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        w    = -exp(-0.5) sigmoid(c U + b)  with  c = w_proj(x_j) a vector of D log decays, down to -0.61
        a    = sigmoid(d V + b')            with  d = a_proj(x_j) how much of each channel is replaced
        p    = (k' * k_erased)';  n = k' * (1 + (a - 1) * k_written)
        S   <- diag(exp(w)) S - (a * p) (S^T p)^T + n v^T
        r    = S^T q' / sqrt(D)
        out  = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    Each state's ``c`` and ``d``, 4 numbers each, stay beside the token while it is in the window. Keys, values and
    queries are those of the model's attention. The paper shifts them by a token, which is left out. Its bonus for the
    newest token is left out too: the window shows that token.

    It takes the arguments of [`Compressor`][ahn_layers.Compressor].

    Examples:
        >>> gates = RWKV7(hidden_size=64, num_heads=4, head_dim=16).gates(torch.zeros(1, 3, 64))
        >>> {name: tuple(gate.shape) for name, gate in gates.items()}
        {'w': (1, 4, 3, 4), 'a': (1, 4, 3, 4)}
    """

    rank: ClassVar[int] = 4
    """Numbers that each of the vectors of a state is made of."""

    def build(self) -> None:
        """Decays, replacement, the keys erased and written, read gate, norm."""
        states, size = self.num_states, self.head_dim
        bias = torch.zeros(states, size)
        self.w_proj = LowRank(self.hidden_size, self.rank, bias + torch.linspace(-6.5, -1.5, size, device=bias.device))
        self.a_proj = LowRank(self.hidden_size, self.rank, torch.zeros(states, size))
        self.k_erased, self.k_written = (nn.Parameter(torch.ones(states, 1, size)) for _ in range(2))
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t r"]]:
        """What the log decays ``w`` and the replacement ``a`` are made of."""
        return {"w": self.w_proj(x), "a": self.a_proj(x)}

    def transition(  # type: ignore[override]
        self, k: Float[Tensor, "b s t d"], v: Float[Tensor, "b s t e"], w: Tensor, a: Tensor
    ) -> Transition:
        """Decay by ``exp(w)``, erase under ``p``, write under ``n``."""
        w, a = -math.exp(-0.5) * self.w_proj.expand(w).sigmoid(), self.a_proj.expand(a).sigmoid()
        k = l2_normalize(k)
        erased = l2_normalize(k * self.k_erased.to(k.dtype))
        written = k * (1 + (a - 1) * self.k_written.to(k.dtype))
        return Transition(decay=w, erased=erased, along=-a * erased, key=written, value=v)

    def query(self, q: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """``q' / sqrt(D)``."""
        return l2_normalize(q, scale=self.head_dim**-0.5)
