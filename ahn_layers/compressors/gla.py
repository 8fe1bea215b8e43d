"""GLA: a sum in which every channel of a key decays at its own pace."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import LowRank, Scale
from ..recurrent import Recurrence, Recurrent
from .time_step import spread_decays


class GLA(Recurrent):
    """Gated linear attention (arXiv 2312.06635).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        g    = log(sigmoid(c U + b)) / 16  with  c = a_proj(x_j)  a vector of D log decays, made of 4 numbers
        S   <- diag(exp(g)) S + k' v^T
        r    = S^T q' / sqrt(D)
        out  = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    The paper makes all decays of a token of 16 numbers, here those of every state are made of 4 of its own: these stay
    beside the token in the window. The biases ``b`` start with decays spread like those of
    [`GatedDeltaNet`][ahn_layers.GatedDeltaNet].

    It takes the arguments of [`Compressor`][ahn_layers.Compressor].

    Examples:
        >>> import torch
        >>> GLA(hidden_size=64, num_heads=4, head_dim=16).gates(torch.zeros(1, 3, 64))["g"].shape
        torch.Size([1, 4, 3, 4])
    """

    rank: ClassVar[int] = 4
    """Numbers that the decays of a state are made of."""

    def build(self) -> None:
        """Decays, read gate, norm."""
        bias = -spread_decays(self.num_states, self.head_dim, factor=16.0)  # -log(sigmoid(-b)) = softplus(b)
        self.a_proj = LowRank(self.hidden_size, self.rank, bias)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t r"]]:
        """What the log decays are made of."""
        return {"g": self.a_proj(x)}

    def expand(self, gates: dict[str, Float[Tensor, "b s t *_"]]) -> dict[str, Float[Tensor, "b s t *_"]]:
        """The log decays ``g``."""
        return {"g": F.logsigmoid(self.a_proj.expand(gates["g"])) / 16}

    def recurrence(self) -> Recurrence:
        """Decay each channel by ``exp(g)``, then add ``k' v^T``."""
        return Recurrence(decay="g", read_scale=self.head_dim**-0.5)
