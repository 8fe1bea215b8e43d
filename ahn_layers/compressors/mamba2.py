"""Mamba2: a decaying sum whose write strength and decay share one time step."""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..compressor import Compressor, State, state_dtype
from ..layers import Scale, outer, project
from ..ops.decode import StepRule
from ..ops.linear_scan import gated_linear_scan
from ..ops.normalize import rms_normalize
from ..ops.scan import as_operand
from .time_step import decay_parameters


class Mamba2(Compressor):
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

    def fold(
        self, state: Tensor, k: Float[Tensor, "b s d"], v: Float[Tensor, "b s e"], dt: Float[Tensor, "b s"]
    ) -> Tensor:
        """Decay, then add ``k' (dt v)^T``."""
        decay = (-dt * self.A_log.to(dt.dtype).exp()).exp()[..., None, None]
        return decay * state + outer(F.normalize(k, dim=-1), dt.unsqueeze(-1) * v)

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """``S^T q'``."""
        return super().read(state, F.normalize(q, dim=-1))

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
        q, k = (F.normalize(u.to(state.dtype), dim=-1).to(as_operand(u, state).dtype) for u in (q, k))
        dt = gates["dt"].to(state.dtype)
        if mask is not None:
            dt = dt.masked_fill(~self.per_state(mask), 0)
        g = -dt * self.A_log.to(dt.dtype).exp().unsqueeze(-1)
        v = dt.unflatten(1, (v.shape[1], -1)).unsqueeze(-1) * v.unsqueeze(2)
        return gated_linear_scan(state, q, k, v.flatten(1, 2).to(k.dtype), g)

    def rule(self, x: Float[Tensor, "b 1 n"]) -> StepRule:
        """The same, one token."""
        return StepRule(decay="dt", rate=-self.A_log.to(state_dtype(self.A_log)).exp(), strength="dt", eps=1e-24)

    def output(self, r: Float[Tensor, "b h t e"], x: Float[Tensor, "b t n"]) -> Float[Tensor, "b h t e"]:
        """Read gate, RMS norm over all heads together, a matrix per head."""
        y = (r * F.silu(project(self.g_proj, x)).unsqueeze(-1)).transpose(1, 2)
        y = self.norm(rms_normalize(y.flatten(2))).unflatten(2, (self.num_heads, -1))
        return self.o_proj(y.transpose(1, 2))
