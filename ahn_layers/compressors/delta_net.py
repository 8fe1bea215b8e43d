"""DeltaNet: a memory that corrects what it already holds under a key."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..compressor import Compressor, State
from ..layers import Scale, project
from ..ops.decode import StepRule, delta_step
from ..ops.delta_scan import gated_delta_scan
from ..ops.normalize import gated_rms_norm, l2_normalize
from ..ops.scan import as_operand


class DeltaNet(Compressor):
    """The delta rule (arXiv 2406.06484), as in Artificial Hippocampus Networks (arXiv 2510.07318).

    With ``x_j`` the hidden state of the evicted token, ``x_t`` that of the query's, ``u' = u / sqrt(|u|^2 + 1e-6)``:

        beta = sigmoid(b_proj(x_j))
        S   <- S + k' (beta (v - S^T k'))^T
        r    = S^T q' / sqrt(D)
        out  = o_proj( rms(r) * o_norm.weight * silu(g_proj(x_t)) )

    It takes the arguments of [`Compressor`][ahn_layers.Compressor]; with ``shared_state`` there is one ``beta`` per
    key/value head too.

    Examples:
        >>> import torch
        >>> DeltaNet(hidden_size=64, num_heads=4, head_dim=16).gates(torch.zeros(1, 3, 64))["beta"].shape
        torch.Size([1, 4, 3])
    """

    def build(self) -> None:
        """Write gate, read gate, norm."""
        self.b_proj = nn.Linear(self.hidden_size, self.num_states, bias=False)
        self.g_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)
        self.o_norm = Scale(self.value_dim)

    def gates(self, x: Float[Tensor, "b t n"]) -> dict[str, Float[Tensor, "b s t"]]:
        """The write strength ``beta``."""
        return {"beta": project(self.b_proj, x).sigmoid()}

    def fold(
        self, state: Tensor, k: Float[Tensor, "b s d"], v: Float[Tensor, "b s e"], beta: Float[Tensor, "b s"]
    ) -> Tensor:
        """Move what is stored under ``k'`` a step of ``beta`` towards ``v``."""
        return delta_step(state, l2_normalize(k), v, beta)

    def read(self, state: State, q: Float[Tensor, "b h d"]) -> Float[Tensor, "b h e"]:
        """``S^T q' / sqrt(D)``."""
        return super().read(state, l2_normalize(q, scale=self.head_dim**-0.5))

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
        q = l2_normalize(as_operand(q, state), scale=self.head_dim**-0.5)
        k = l2_normalize(as_operand(k, state))
        beta = gates["beta"] if mask is None else gates["beta"].masked_fill(~self.per_state(mask), 0)
        return gated_delta_scan(state, q, k, v, beta)

    def rule(self, x: Float[Tensor, "b 1 n"]) -> StepRule:
        """The same, one token."""
        return StepRule(
            strength="beta", delta=True, read_scale=self.head_dim**-0.5, weight=self.o_norm.weight,
            gate=project(self.g_proj, x, widen=False).squeeze(2), matrix=self.o_proj.weight,
        )  # fmt: skip

    def output(self, r: Float[Tensor, "b h t e"], x: Float[Tensor, "b t n"]) -> Float[Tensor, "b h t e"]:
        """RMS norm, read gate, a matrix per head."""
        return self.o_proj(gated_rms_norm(r, self.o_norm.weight, project(self.g_proj, x)))
