"""A decoder written from scratch gets a memory, and learns to recall what has left its window.

    python examples/custom_architecture.py              # a minute or two on one CPU core
    python examples/custom_architecture.py --compressor Mamba2 --steps 2000

Each text tells four keys with their values, goes on with noise that is longer than the window, then asks for every key.
Two decoders learn the task from scratch, with the same sizes, seeds and texts: one has the window alone, the other a
memory too. You will see the first one stay at chance, since no answer is in its window, and the second one answer
nearly every question, and most of them even after four times the noise that it was trained on.
"""

import argparse
import time
from collections.abc import Sequence

from _common import Help, compressor_names, count, positive

# isort: split
# --8<-- [start:imports]
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from ahn_layers import Compressor, HippocampalAttention, MemoryState, MemoryStore, Window

KEYS, VALUES, NOISE, PAIRS = 32, 32, 16, 4
VOCABULARY = KEYS + VALUES + NOISE
HIDDEN, HEADS, LAYERS, WINDOW = 64, 2, 2, 16
# --8<-- [end:imports]
GAP, LONG_GAP = 24, 96
"""Tokens of noise in training, and in the longest test."""


# --8<-- [start:attention]
class Attention(nn.Module):
    """Self-attention with rotary positions; where it would call scaled dot-product attention it calls ``attend``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x, cos, sin, attend):
        """Attention of new tokens, ``(B, T, N)`` to ``(B, T, N)``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attend(q, k, v)  # was: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864)."""
    first, second = u.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# --8<-- [end:attention]
# --8<-- [start:decoder]
class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.attention = HippocampalAttention(Attention(HIDDEN, HEADS), store)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))

    def forward(self, x, state, cos, sin):
        """The layer's output, and its state after these tokens."""
        y, state = self.attention(self.norms[0](x), state, cos, sin)
        x = x + y
        return x + self.mlp(self.norms[1](x)), state


class Decoder(nn.Module):
    """A small language model that carries one memory state per layer."""

    def __init__(self, compressor: type[Compressor] | None) -> None:
        super().__init__()
        size = HIDDEN // HEADS
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList(
            Layer(MemoryStore(Window(WINDOW), None if compressor is None else compressor(HIDDEN, HEADS, size)))
            for _ in range(LAYERS)
        )
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.register_buffer("frequencies", 10_000.0 ** (-torch.arange(0, size, 2) / size), persistent=False)

    def forward(self, ids: Tensor, states: list[MemoryState] | None = None) -> tuple[Tensor, list[MemoryState]]:
        """Logits of new tokens, and the states after them: what the next call goes on from."""
        begun = [None] * LAYERS if states is None else states
        start = 0 if states is None else states[0].length
        angle = torch.arange(start, start + ids.shape[1], device=ids.device)[:, None] * self.frequencies
        x, after = self.embedding(ids), []
        for layer, state in zip(self.layers, begun, strict=True):
            x, state = layer(x, state, angle.cos(), angle.sin())
            after.append(state)
        return self.head(self.norm(x)), after


# --8<-- [end:decoder]
def texts(count: int, gap: int) -> Tensor:
    """Four ``key value`` pairs, ``gap`` tokens of noise, then the same pairs in another order, as questions."""
    keys = torch.rand(count, KEYS).argsort(dim=1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, keys.shape)
    noise = KEYS + VALUES + torch.randint(NOISE, (count, gap))
    order = torch.rand(keys.shape).argsort(dim=1)
    told = torch.stack((keys, values), dim=2)
    asked = told.gather(1, order[..., None].expand_as(told))
    return torch.cat((told.flatten(1), noise, asked.flatten(1)), dim=1)


def answers(u: Tensor) -> tuple[slice, Tensor]:
    """Where the questions stand in a text, and the values that they ask for."""
    return slice(-2 * PAIRS, None, 2), u[:, -2 * PAIRS + 1 :: 2]


@torch.no_grad()
def accuracy(model: Decoder, gap: int, count: int = 256, piece: int = 7) -> float:
    """Share of right answers. The texts come in pieces: how they are cut makes no difference to the model."""
    ids, states, logits = texts(count, gap), None, []
    for part in ids.split(piece, dim=1):
        out, states = model(part, states)
        logits.append(out)
    asked, values = answers(ids)
    return (torch.cat(logits, dim=1)[:, asked].argmax(-1) == values).float().mean().item()


def train(model: Decoder, steps: int, name: str) -> None:
    """Minimise the loss of the answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    with trange(steps, desc=f"{name:15}", unit=" steps") as bar:
        for _ in bar:
            ids = texts(32, GAP)
            asked, values = answers(ids)
            loss = F.cross_entropy(model(ids)[0][:, asked].flatten(0, 1), values.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warm_up.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train and test both decoders.

    Returns:
        Accuracies by decoder: ``before``, ``after``, ``long`` (after training, with the longest noise).
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--steps", type=positive, default=800, help="training steps of each decoder (default: 800)")
    parser.add_argument(
        "--compressor", default="GatedDeltaNet", choices=compressor_names(), help="the memory's recurrence"
    )
    parser.add_argument("--seed", type=count, default=0, help="of the random numbers")
    args = parser.parse_args(argv)

    results, seconds = {}, time.perf_counter()
    for name, compressor in (("window only", None), (args.compressor, Compressor.by_name[args.compressor])):
        torch.manual_seed(args.seed)
        model = Decoder(compressor)
        before = accuracy(model, GAP)
        train(model, args.steps, name)
        results[name] = {"before": before, "after": accuracy(model, GAP), "long": accuracy(model, LONG_GAP)}

    print(f"\nRight answers, {GAP} tokens of noise (window {WINDOW}); chance is {1 / VALUES:.0%}.")
    print(f"{'':15}{'before':>10}{'after':>10}{f'{LONG_GAP} of noise':>16}")
    for name, r in results.items():
        print(f"{name:15}{r['before']:>10.1%}{r['after']:>10.1%}{r['long']:>16.1%}")
    print(f"{args.steps} steps each, {time.perf_counter() - seconds:.0f} s.")
    return results


if __name__ == "__main__":
    main()
