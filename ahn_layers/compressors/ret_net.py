"""RetNet: a sum that decays at a fixed pace, another one in each head."""

import torch
from torch import nn

from ..compressor import state_dtype
from ..layers import Scale
from ..recurrent import Recurrence, Recurrent


class RetNet(Recurrent):
    """Retention (arXiv 2307.08621).

    With ``x_t`` the hidden state of the query's token, ``u' = u / sqrt(|u|^2 + 1e-6)``, for state ``h`` from 0:

        gamma = 1 - 2^(-5 - h)
        S    <- gamma S + k' v^T
        r     = S^T q' / sqrt(D)
        out   = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    The decays are not trained and no write gate is computed: nothing but keys and values stays in the window. The
    paper's rotation is that of the model.

    It takes the arguments of [`Compressor`][ahn_layers.Compressor].

    Examples:
        >>> RetNet(hidden_size=64, num_heads=4, head_dim=16).recurrence().rate
        tensor([-0.0317, -0.0157, -0.0078, -0.0039])
    """

    turns_freely = True

    def build(self) -> None:
        """Read gate, norm."""
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def recurrence(self) -> Recurrence:
        """Decay by ``gamma``, then add ``k' v^T``."""
        weight = self.o_proj.weight
        first = 5 + self.first_state
        power = torch.arange(first, first + self.num_states, dtype=state_dtype(weight), device=weight.device)
        return Recurrence(rate=torch.log1p(-torch.exp2(-power)), read_scale=self.head_dim**-0.5)
