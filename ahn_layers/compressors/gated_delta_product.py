"""GatedDeltaProduct: several steps of the delta rule for each token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import Scale, project
from ..recurrent import Recurrence, Recurrent
from .time_step import decay_parameters


class GatedDeltaProduct(Recurrent):
    """The gated delta product with two Householder steps a token (arXiv 2502.10297).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        g      = -exp(A_log) softplus(a_proj(x_j) + dt_bias)
        beta_i = 2 sigmoid(b_proj_i(x_j))                         up to 2: a state may be mirrored
        k_1, v_1 = k, v;  k_2, v_2 = k more_keys, v more_values   matrices per state
        S     <- exp(g) S;  S <- S + k_i' (beta_i (v_i - S^T k_i'))^T  for i = 1, 2
        r      = S^T q' / sqrt(D)
        out    = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    The paper projects every key and value from the hidden state. Here a token has the key and the value of the model's
    attention, and the second ones are made of them when it is folded, so the window holds no more than the gates.

    It takes the arguments of [`Compressor`][ahn_layers.Compressor].

    Examples:
        >>> import torch
        >>> memory = GatedDeltaProduct(hidden_size=64, num_heads=4, head_dim=16)
        >>> memory.gates(torch.zeros(1, 3, 64))["beta"].shape
        torch.Size([1, 4, 3, 2])
    """

    def build(self) -> None:
        """Decay, write gates, further keys and values, read gate, norm."""
        self.A_log, self.dt_bias = decay_parameters(self.num_states)
        self.a_proj = nn.Linear(self.hidden_size, self.num_states, bias=False)
        self.b_proj = nn.Linear(self.hidden_size, self.num_states * 2, bias=False)
        self.more_keys = nn.Parameter(torch.randn(self.num_states, 1, self.head_dim, self.head_dim))
        self.more_values = nn.Parameter(torch.randn(self.num_states, 1, self.value_dim, self.value_dim))
        with torch.no_grad():
            for matrices in (self.more_keys, self.more_values):
                matrices.mul_(matrices.shape[-1] ** -0.5)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t *_"]]:
        """The log decay ``g`` and the write strengths ``beta``."""
        a, b = project(self.a_proj, x), project(self.b_proj, x).unflatten(1, (self.num_states, 2))
        rate, bias = self.A_log.to(a.dtype).exp().unsqueeze(-1), self.dt_bias.to(a.dtype).unsqueeze(-1)
        return {"g": -rate * F.softplus(a + bias), "beta": 2 * b.transpose(2, 3).sigmoid()}

    def recurrence(self) -> Recurrence:
        """Decay by ``exp(g)``, then move what is stored under each ``k_i'`` a step of ``beta_i`` towards ``v_i``."""
        return Recurrence(
            decay="g",
            strength="beta",
            delta=True,
            more_keys=self.more_keys,
            more_values=self.more_values,
            read_scale=self.head_dim**-0.5,
        )
