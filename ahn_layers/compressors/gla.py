"""GLA: a sum in which every channel of a key decays at its own pace."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import LowRank, Scale
from ..recurrent import Recurrence, Recurrent
from .time_step import spread_decays


class GLA(Recurrent):
    """Gated linear attention (arXiv 2312.06635, equations 3 and 8).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        g    = log(sigmoid(a_proj(x_j))) / 16                     a vector of D log decays; a_proj of rank 16
        S   <- diag(exp(g)) S + k' v^T
        r    = S^T q' / sqrt(D)
        out  = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    ``g`` stays beside each token of the window: as many numbers as the keys of all states. The biases of ``a_proj``
    start with decays spread like those of [`GatedDeltaNet`][ahn_layers.GatedDeltaNet].

    It takes the arguments of [`Compressor`][ahn_layers.Compressor].

    Examples:
        >>> import torch
        >>> GLA(hidden_size=64, num_heads=4, head_dim=16).gates(torch.zeros(1, 3, 64))["g"].shape
        torch.Size([1, 4, 3, 16])
    """

    def build(self) -> None:
        """Decays, read gate, norm."""
        bias = -spread_decays(self.num_states, self.head_dim, factor=16.0)  # -log(sigmoid(-b)) = softplus(b)
        self.a_proj = LowRank(self.hidden_size, 16, bias)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t d"]]:
        """The log decays ``g``."""
        return {"g": F.logsigmoid(self.a_proj(x)) / 16}

    def recurrence(self) -> Recurrence:
        """Decay each channel by ``exp(g)``, then add ``k' v^T``."""
        return Recurrence(decay="g", read_scale=self.head_dim**-0.5)
