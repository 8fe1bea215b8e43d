"""GatedDeltaNet: the delta rule with forgetting."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import Scale, project
from ..recurrent import Recurrence, Recurrent
from .time_step import decay_parameters


class GatedDeltaNet(Recurrent):
    """The gated delta rule (arXiv 2412.06464), as in Artificial Hippocampus Networks (arXiv 2510.07318).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        g    = -exp(A_log) softplus(a_proj(x_j) + dt_bias)
        beta = sigmoid(b_proj(x_j))
        S   <- exp(g) S;  S <- S + k' (beta (v - S^T k'))^T
        r    = S^T q' / sqrt(D)
        out  = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    It takes the arguments of [`Compressor`][ahn_layers.Compressor]; with ``shared_state`` there is one ``g`` and one
    ``beta`` per key/value head too.

    Examples:
        >>> import torch
        >>> sorted(GatedDeltaNet(hidden_size=64, num_heads=4, head_dim=16).gates(torch.zeros(1, 3, 64)))
        ['beta', 'g']
    """

    turns_freely = True

    unused_parameters = ("D",)

    def build(self) -> None:
        """Decay, write gate, read gate, norm."""
        self.A_log, self.dt_bias = decay_parameters(self.num_states)
        self.a_proj = nn.Linear(self.hidden_size, self.num_states, bias=False)
        self.b_proj = nn.Linear(self.hidden_size, self.num_states, bias=False)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t"]]:
        """The log decay ``g`` and the write strength ``beta``."""
        a = project(self.a_proj, x)
        rate, bias = self.A_log.to(a.dtype).exp().unsqueeze(-1), self.dt_bias.to(a.dtype).unsqueeze(-1)
        return {"g": -rate * F.softplus(a + bias), "beta": project(self.b_proj, x).sigmoid()}

    def recurrence(self) -> Recurrence:
        """Decay by ``exp(g)``, then move what is stored under ``k'`` a step of ``beta`` towards ``v``."""
        return Recurrence(decay="g", strength="beta", delta=True, read_scale=self.head_dim**-0.5)
