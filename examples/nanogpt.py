"""A GPT with learned positions, as nanoGPT has them, gets a memory: trained from scratch, sampled at any length.

    python examples/nanogpt.py                          # about 17 minutes on one CPU core
    python examples/nanogpt.py --text shakespeare.txt --steps 3000 --tokens 2000

The model reads characters: LayerNorm, one matrix for queries, keys and values, GELU, tied embeddings, and a table of
positions that are learned, without rotation. Its attention blocks are wrapped with a window that is shorter than the
texts. Three models learn the same text with the same seed: full attention, the window alone, window and memory. You
will see their losses on text that they were not trained on, and then a sample that is longer than the table of
positions, written in constant memory.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from _common import Help, compressor_names, count, number, positive, user_errors
from quickstart import load_text

# isort: split
# --8<-- [start:imports]
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from ahn_layers import Compressor, HippocampalAttention, MemoryState, MemoryStore, Window

HIDDEN, HEADS, LAYERS, POSITIONS = 96, 3, 3, 128
WINDOW, SINKS = 28, 4
# --8<-- [end:imports]
BATCH = 16


# --8<-- [start:attention]
class CausalSelfAttention(nn.Module):
    """The block of nanoGPT; where it called scaled dot-product attention it calls ``attend``."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.c_proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, attend):
        """Attention of new tokens, ``(B, T, N)`` to ``(B, T, N)``."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = attend(q, k, v)  # was: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


# --8<-- [end:attention]
# --8<-- [start:model]
class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn = HippocampalAttention(CausalSelfAttention(), store)  # was: CausalSelfAttention()
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x, state):
        """The block's output, and its state after these tokens."""
        y, state = self.attn(self.ln_1(x), state)
        x = x + y
        return x + self.mlp(self.ln_2(x)), state


class GPT(nn.Module):
    """A language model that carries one state per layer.

    Args:
        vocab_size: characters.
        window: the same for all layers; one that holds everything is full attention.
        compressor: the class of the memory; None forgets what leaves the window.
    """

    def __init__(self, vocab_size: int, window: Window, compressor: type[Compressor] | None) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "head_dim": HIDDEN // HEADS}
        self.wte, self.wpe = nn.Embedding(vocab_size, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)
        self.blocks = nn.ModuleList(
            Block(MemoryStore(window, None if compressor is None else compressor(**sizes))) for _ in range(LAYERS)
        )
        self.ln_f = nn.LayerNorm(HIDDEN)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and ".memory." not in name:  # as nanoGPT: what is added to x begins small
                adds = name.endswith(("c_proj.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * LAYERS) ** 0.5 if adds else 0.02)
        self.wpe.weight.data = 0.02 * waves(POSITIONS, HIDDEN)

    def forward(
        self, ids: Tensor, states: list[MemoryState] | None = None, first: Tensor | int = 0
    ) -> tuple[Tensor, list[MemoryState]]:
        """Logits of new tokens, and the states after them: what the next call goes on from.

        Args:
            ids: new tokens, shape (B, T).
            states: what the last call returned, None to begin.
            first: position of the first token of a text, a number or one for each row, (B, 1).
        """
        seen = 0 if states is None else states[0].length
        positions = (first + torch.arange(seen, seen + ids.shape[1])) % POSITIONS  # the table goes round
        x, after = self.wte(ids) + self.wpe(positions), []
        for block, state in zip(self.blocks, [None] * LAYERS if states is None else states, strict=True):
            x, state = block(x, state)
            after.append(state)
        return F.linear(self.ln_f(x), self.wte.weight), after


def waves(rows: int, size: int) -> Tensor:
    """Where learned positions begin: waves that fit into the table, so that its end meets its beginning."""
    angle = 2 * torch.pi / rows * torch.arange(rows)[:, None] * torch.arange(1, size // 2 + 1)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


# --8<-- [end:model]
# --8<-- [start:sample]
@torch.inference_mode()
def sample(model: GPT, ids: Tensor, tokens: int, *, temperature: float = 0.8, top_k: int = 20) -> Tensor:
    """Go on with a text, token by token; each step costs the same, however long the text has become.

    Args:
        model: trained.
        ids: the beginning, shape (1, T).
        tokens: how many to write.
        temperature: divides the logits.
        top_k: how many of the likeliest tokens are drawn from.

    Returns:
        The new tokens, shape (1, tokens).
    """
    logits, states = model(ids)
    written = []
    for _ in range(tokens):
        best, choices = (logits[:, -1] / temperature).topk(min(top_k, logits.shape[-1]))
        token = choices.gather(1, torch.multinomial(best.softmax(-1), 1))
        written.append(token)
        logits, states = model(token, states)
    return torch.cat(written, dim=1)


# --8<-- [end:sample]
def crops(data: Tensor, length: int, number: int) -> Tensor:
    """Random pieces of a text, shape (number, length + 1)."""
    starts = torch.randint(len(data) - length, (number,))
    return torch.stack([data[i : i + length + 1] for i in starts])


def train(model: GPT, data: Tensor, steps: int, length: int, name: str) -> None:
    """Next-character prediction. Texts begin anywhere in the table of positions, so that going round is nothing new."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1, pct_start=0.1)
    with trange(steps, desc=f"{name:14}", unit=" steps") as bar:
        for _ in bar:
            ids = crops(data, length, BATCH)
            logits, _ = model(ids[:, :-1], first=torch.randint(POSITIONS, (BATCH, 1)))
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.inference_mode()
def losses(model: GPT, data: Tensor, length: int, number: int = 64) -> Tensor:
    """Nats a character by place in the text, of random pieces, shape (length,)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the same pieces for every model
        ids = crops(data, length, number)
        logits, _ = model(ids[:, :-1], first=torch.randint(POSITIONS, (number, 1)))
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train three models, and let the one with the memory write.

    Returns:
        Of each: the losses inside and beyond the window, in nats a character.
    """
    args = parse(argv)
    with user_errors("nanogpt"):
        text = load_text(args.text)
        alphabet = sorted(set(text))
        data = torch.tensor([alphabet.index(u) for u in text[: 2 * 10**6]])
        held_out = len(data) // 10
        if held_out < args.length + 2:
            raise ValueError(f"--text {args.text}: {len(data)} characters, expected at least {10 * args.length + 20}.")
    arms = {
        "full attention": (Window(args.length), None),
        "window only": (Window(WINDOW, num_sinks=SINKS), None),
        "memory": (Window(WINDOW, num_sinks=SINKS), Compressor.by_name[args.compressor]),
    }
    results, start = {}, time.perf_counter()
    for name, (window, compressor) in arms.items():
        torch.manual_seed(args.seed)
        model = GPT(len(alphabet), window, compressor)
        train(model, data[:-held_out], args.steps, args.length, name)
        found = losses(model, data[-held_out:], args.length)
        results[name] = [found[: WINDOW + SINKS].mean().item(), found[WINDOW + SINKS :].mean().item()]

    print(f"\nNats a character, window {WINDOW} + {SINKS}, texts of {args.length} characters:")
    print(f"{'':16}{'inside the window':>20}{'beyond it':>12}")
    for name, (inside, beyond) in results.items():
        print(f"{name:16}{inside:>20.3f}{beyond:>12.3f}")
    print(f"{args.steps} steps each, {time.perf_counter() - start:.0f} s.\n")

    written = sample(model, data[-held_out:][None, : WINDOW // 2], args.tokens, temperature=args.temperature)[0]
    print(f"[{args.tokens:,} characters by the model with the memory]")
    print("".join(alphabet[i] for i in written))
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--text", type=Path, help="UTF-8 text file (default: the reference of the Python language)")
    add("--steps", type=positive, default=1000, help="training steps of each model (default: 1000)")
    add("--length", type=positive, default=128, help="characters of a training text (default: 128)")
    add("--tokens", type=positive, default=600, help="characters to write (default: 600)")
    add("--temperature", type=number(10.0), default=0.8, help="of the writing (default: 0.8)")
    add("--compressor", default="GatedDeltaNet", choices=compressor_names(), help="the memory's recurrence")
    add("--seed", type=count, default=0, help="of the random numbers")
    args = parser.parse_args(argv)
    if args.temperature == 0:
        parser.error("--temperature 0: expected a positive number")
    return args


if __name__ == "__main__":
    main()
