"""How much a token deserves a slot: scores without training, and one that is learned.

Dimensions: b batch, g key/value heads, t tokens, d key size, n hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..layers import is_plain, narrower, project
from ..ops.decode.kept import ScoreWeights
from ..tokens import Leaving, Tokens, last, per_head

Score = Callable[[Tokens], Float[Tensor, "b g t"]]


def recent(tokens: Tokens) -> Float[Tensor, "b g t"]:
    """The same score for all tokens: with a ``rate`` above zero the slots are a longer window."""
    return torch.zeros_like(tokens.k[..., 0], dtype=torch.promote_types(tokens.k.dtype, torch.float32))


def key_norm(tokens: Tokens) -> Float[Tensor, "b g t"]:
    """Small keys first: they get more attention (arXiv 2406.11430)."""
    return -_precise(tokens.k).norm(dim=-1)


def value_norm(tokens: Tokens) -> Float[Tensor, "b g t"]:
    """Large values first: they move the output further (arXiv 2406.12335)."""
    return _precise(tokens.v).norm(dim=-1)


SCORES: dict[str, Score] = {"recent": recent, "key_norm": key_norm, "value_norm": value_norm}
"""Scores of a token that need no training, from the token alone."""
UNTRAINED = (*SCORES, "key_difference")
"""All scores that need no training."""


def key_difference(
    key_sum: Float[Tensor, "b g d"], leaving: Leaving
) -> tuple[Float[Tensor, "b g t"], Float[Tensor, "b g d"]]:
    """Keys unlike those before them first (KeyDiff, arXiv 2504.15364, made causal).

    ``-cos(k_j, u_S + ... + u_j)`` with the directions ``u`` of the keys that have left the window until then. KeyDiff
    compares with the mean of the whole prompt, which depends on where the prompt ends.

    Returns:
        The scores, and the sum after them.
    """
    direction = F.normalize(leaving.tokens.k.to(key_sum.dtype), dim=-1)
    if leaving.where is not None:
        direction = direction.masked_fill(~per_head(leaving.where, direction), 0)
    running = key_sum.unsqueeze(2) + direction.cumsum(dim=2)
    return -(direction * F.normalize(running, dim=-1)).sum(dim=-1), last(running)


class LearnedScore(nn.Module):
    """A small network from a token's hidden state and value to its score in each key/value head ``g``.

        score_g    = down_g . silu(up x + up_v v_g) + direct_g . x + bias_g      (x, v_g divided by their rms)
        priority_g = score_g + rate_g * rank

    Hidden state and value do not know the position, which a rotated key would tell. Untrained, all scores are zero and
    the rates one: the most recent tokens win, so the slots are a longer window.

    Args:
        hidden_size: width of the hidden states.
        num_kv_heads: key/value heads.
        value_dim: size of values.
        size: hidden units.
    """

    def __init__(self, hidden_size: int, num_kv_heads: int, value_dim: int, size: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, size)
        self.up_v = nn.Linear(value_dim, size, bias=False)
        self.down = nn.Parameter(torch.zeros(num_kv_heads, size))
        self.direct = nn.Linear(hidden_size, num_kv_heads)
        self.log_rate = nn.Parameter(torch.zeros(num_kv_heads))
        nn.init.zeros_(self.direct.weight)
        nn.init.zeros_(self.direct.bias)

    @property
    def rate(self) -> Float[Tensor, " g"]:
        """What each further token of the text is worth more than the one before it, in float32 at least."""
        return _precise(self.log_rate).exp()

    @property
    def is_trained(self) -> bool:
        """Whether it has learned anything: an untrained one gives all tokens the same score.

        Weights on the meta device, which have no values, have not.
        """
        return not self.down.is_meta and bool(self.down.any() or self.direct.weight.any())

    def forward(self, x: Float[Tensor, "b t n"], v: Float[Tensor, "b g t e"]) -> Float[Tensor, "b g t"]:
        """The scores, in float32 at least.

        Raises:
            ValueError: if the tokens have other sizes than it was made for.
        """
        made_for = (self.direct.in_features, len(self.down), self.up_v.in_features)
        given = (x.shape[-1], v.shape[1], v.shape[-1])
        for name, expected, found in zip(("hidden_size", "num_kv_heads", "value_dim"), made_for, given, strict=True):
            if expected != found:
                raise ValueError(
                    f"the score was made for {name}={expected}, the attention has {found}: make it with "
                    f"SalientSlots(...).for_layer({name}={found}, ...)."
                )
        x, v = (F.rms_norm(u, (u.shape[-1],)) for u in (x, v))
        inner = F.silu(linear(self.up, x).unsqueeze(1) + linear(self.up_v, v))
        return (_precise(inner) * _precise(self.down).unsqueeze(1)).sum(dim=-1) + project(self.direct, x)

    def weights(self) -> ScoreWeights | None:
        """As the kernels of a decode step take them; None where it is computed otherwise, by an adapter for one."""
        up, direct, overridden = self.up, self.direct, type(self).forward is not LearnedScore.forward
        replaced = not all(map(is_plain, (up, self.up_v, direct)))
        if overridden or replaced or up.weight.dtype != direct.weight.dtype:
            return None
        return ScoreWeights(up.weight, up.bias, self.up_v.weight, self.down, direct.weight, direct.bias)


def linear(layer: nn.Linear, u: Tensor) -> Tensor:
    """A linear layer in the narrower of the dtypes of its weight and what it is given; as it is unless it is plain."""
    if not is_plain(layer):
        return layer(u)  # type: ignore[no-any-return]
    u, weight = narrower(u, layer.weight)
    return F.linear(u, weight, None if layer.bias is None else layer.bias.to(u.dtype))


def _precise(u: Tensor) -> Tensor:
    return u.to(torch.promote_types(u.dtype, torch.float32))
