"""How far float32 rotations are off at a million positions: those of the library, and those of base models.

Run it from a clone, for instance

    python -m tests.hard.rotations --positions 1000000
"""

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ahn_layers import Rotary

SIZE = 64
"""Channels of a head."""
COUNT = 256
"""Tokens that are looked at: those before the position."""


def inverse_frequencies(theta: float) -> Tensor:
    """In float64, as float32 holds them: the model's own."""
    return (1.0 / theta ** (torch.arange(0, SIZE, 2, dtype=torch.int64).float() / SIZE)).double()


def rotated(u: Tensor, position: Tensor, theta: float) -> Tensor:
    """The rotation in float64."""
    angle = position.double()[:, None] * inverse_frequencies(theta)
    first, second = u.double().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def errors(position: int, theta: float) -> dict[str, float]:
    """Errors of vectors of length 1 (radians of the whole vector), and of logits of queries and keys of length 8.

    Args:
        position: of the last token.
        theta: base of the rotation.
    """
    torch.manual_seed(0)
    place = torch.arange(position - COUNT + 1, position + 1)
    q, k = (torch.nn.functional.normalize(torch.randn(1, 1, COUNT, SIZE), dim=-1) for _ in range(2))
    config = LlamaConfig(
        hidden_size=SIZE,
        num_attention_heads=1,
        head_dim=SIZE,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, place[None])
    base_q, base_k = apply_rotary_pos_emb(q, k, cos, sin)
    true_q, true_k = (rotated(u[0, 0], place, theta) for u in (q, k))
    distance = torch.tensor([position - COUNT])  # as far as the sinks are
    ours = Rotary(inverse_frequencies(theta), 1).turn_back(true_q.float()[None, None], distance.expand(COUNT))
    near = rotated(true_q, -distance.expand(COUNT), theta)
    content = Rotary(inverse_frequencies(theta), 1).turn_back(base_q, place)[0, 0]
    logits = 8 * (base_q[0, 0].double() @ base_k[0, 0].double().T)
    expected = 8 * (true_q @ true_k.T)
    return {
        "the library turns back": float((ours[0, 0].double() - near).norm(dim=-1).max()),
        "the base model rotates": float((base_q[0, 0].double() - true_q).norm(dim=-1).max()),
        "contents of the memory": float((content.double() - q[0, 0].double()).norm(dim=-1).max()),
        "logits in the window": float((logits - expected).abs().max()),
    }


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description="Float32 rotations against float64.")
    parser.add_argument("--positions", type=int, default=1_000_000, help="the largest position")
    options = parser.parse_args()
    names = list(errors(1000, 10_000.0))
    print(f"{'theta':>9} {'position':>10}  " + "  ".join(names))
    for theta in (10_000.0, 1_000_000.0):
        position = 1000
        while position <= options.positions:
            row = errors(position, theta)
            print(f"{theta:>9,.0f} {position:>10,}  " + "  ".join(f"{row[name]:>{len(name)}.1e}" for name in names))
            position *= 10


if __name__ == "__main__":
    main()
