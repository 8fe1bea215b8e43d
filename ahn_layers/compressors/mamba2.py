"""Mamba2: a decaying sum whose write strength and decay share one time step."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..compressor import state_dtype
from ..layers import Scale, project
from ..ops.pointwise.normalize import rms_normalize
from ..recurrent import Recurrence, Recurrent
from .time_step import decay_parameters


class Mamba2(Recurrent):
    """State space duality (arXiv 2405.21060), as in Artificial Hippocampus Networks (arXiv 2510.07318).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / max(|u|, 1e-12)``:

        dt = softplus(dt_proj(x_j) + dt_bias)
        S <- exp(-dt exp(A_log)) S + k' (dt v)^T
        r  = S^T q'
        out = o_proj( rms over all heads of (r * silu(g_proj(x_t))) * norm.weight )

    It takes the arguments of [`Compressor`][ahn_layers.Compressor]; with ``shared_state`` there is one ``dt`` per
    key/value head too.

    Examples:
        >>> list(Mamba2(hidden_size=64, num_heads=4, head_dim=16).state_dict())[:3]
        ['A_log', 'dt_bias', 'o_proj.weight']
    """

    turns_freely = True

    def build(self) -> None:
        """Decay, time step, read gate, norm."""
        self.A_log, self.dt_bias = decay_parameters(self.num_states)
        self.dt_proj = nn.Linear(self.hidden_size, self.num_states)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads)
        self.norm = Scale(self.num_heads * self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t"]]:
        """The time step ``dt``."""
        dt = project(self.dt_proj, x)
        return {"dt": F.softplus(dt + self.dt_bias.to(dt.dtype).unsqueeze(-1))}

    def recurrence(self) -> Recurrence:
        """Decay by ``exp(-dt exp(A_log))``, then add ``k' (dt v)^T``."""
        return Recurrence(decay="dt", rate=-self.A_log.to(state_dtype(self.A_log)).exp(), strength="dt", eps=1e-24)

    def output(self, r: Float[Tensor, "b h t e"], x: Float[Tensor, "b t n"]) -> Float[Tensor, "b h t e"]:
        """Read gate, RMS norm over all heads together, a matrix per head."""
        y = (r * F.silu(project(self.g_proj, x)).unsqueeze(-1)).transpose(1, 2)
        y = self.norm(rms_normalize(y.flatten(2))).unflatten(2, (self.num_heads, -1))
        return self.o_proj(y.transpose(1, 2))
