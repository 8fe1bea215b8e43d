"""Does a model with a long text fit on a card? Bytes by formula, and on a GPU measured under that limit.

    python examples/fit_on_a_card.py                          # Qwen2.5-3B, 200,000 tokens, 24 GB; needs no GPU
    python examples/fit_on_a_card.py --measure                # random weights of that shape, on a GPU
    python examples/fit_on_a_card.py --measure --bits 4       # the base in 4 bits, by bitsandbytes
    python examples/fit_on_a_card.py --shape tiny --tokens 600 --window 60 --sinks 4 --measure --device cpu

You will see what weights, cache and the activations of one piece of the prompt take, for full attention and with a
memory, how many caches of such texts there is room for, and how long one text may be. ``--measure`` reads a prompt of
random tokens while PyTorch may use no more than ``--card`` of the GPU, and prints the peak.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from _common import Help, compressor_names, count, device, number, positive, user_errors
from gpu_measurements import SHAPES
from peak_memory import PeakMemory
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from ahn_layers import Compressor, HippocampalCache, MemoryStore, Window, full_attention, retrofit
from ahn_layers.cost import Sizes

GB = 1e9
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: 4 bits, a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales."""


def weight_bytes(config: Any, bits: int) -> float:
    """Bytes of the base model: 16 bits, or its linear layers but the last in 4 and the rest in 16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return 2.0 * total if bits == 16 else 2.0 * (total - linear) + NF4 * linear


def memory_bytes(sizes: Sizes, args: argparse.Namespace) -> tuple[float, float]:
    """Bytes of the memory's weights in bfloat16, and of what it holds for one text once the window is full."""
    own = {"hidden_size": sizes.hidden_size, "num_heads": sizes.num_heads, "num_kv_heads": sizes.num_kv_heads}
    own |= {"head_dim": sizes.head_dim, "value_dim": sizes.head_dim}
    with torch.device("meta"):
        compressor = Compressor.by_name[args.compressor](**own)
    store = MemoryStore(Window(args.window, num_sinks=args.sinks), compressor)
    held = store.bytes_per_row(torch.empty((), dtype=torch.bfloat16, device="meta"), **own)
    return 2.0 * sizes.num_layers * sum(p.numel() for p in store.parameters()), float(sizes.num_layers * held)


def account(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Bytes by arm and part, texts side by side, and the longest text, all from the shape."""
    config = SHAPES[args.shape]
    sizes, weights = Sizes.of(config), weight_bytes(config, args.bits)
    per_token = 2.0 * 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim  # keys and values in bfloat16
    memory, held = memory_bytes(sizes, args)
    held = min(held, held * args.tokens / (args.window + args.sinks))
    # of one piece: gate, up and their product in the MLP, and four tensors as wide as the model
    piece = 2.0 * min(args.piece, args.tokens) * (3 * sizes.intermediate_size + 4 * sizes.hidden_size)
    arms = {}
    for name, more, cache in (("full attention", 0.0, per_token * args.tokens), ("memory", memory, held)):
        fixed = weights + more + piece
        rest = args.card * GB - fixed
        arms[name] = {
            "weights": weights + more, "cache of a text": cache, "activations": piece, "together": fixed + cache,
            "texts": max(0.0, rest // cache),
            "longest": max(0.0, rest // per_token) if name == "full attention" or rest < cache else float("inf"),
        }  # fmt: skip
    return arms


def format_account(arms: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    """A table of gigabytes."""
    what = f"{args.shape}, base in {args.bits} bits, {args.tokens:,} tokens, window {args.window:,} + {args.sinks}"
    unit, size = ("GB", GB) if arms["full attention"]["together"] > GB / 10 else ("MB", GB / 1000)
    rows = [(what, *arms)]
    for part in ("weights", "cache of a text", "activations", "together"):
        rows.append((f"{part}, {unit}", *(f"{arm[part] / size:.2f}" for arm in arms.values())))
    rows.append((f"caches that fit on {args.card:g} GB", *(f"{arm['texts']:.0f}" for arm in arms.values())))
    longest = (f"{arm['longest']:,.0f}" if arm["longest"] < float("inf") else "any" for arm in arms.values())
    rows.append((f"longest text on {args.card:g} GB, tokens", *longest))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:{width}}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in rows)


def build(args: argparse.Namespace) -> Any:
    """A retrofitted model of the shape with random weights, in 4 bits if that was asked for."""
    config = SHAPES[args.shape]
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    if args.bits == 4:
        in_4_bits(model)
    return retrofit(
        model, Compressor.by_name[args.compressor], window_size=args.window, num_sinks=args.sinks
    ).requires_grad_(False)


def in_4_bits(model: nn.Module) -> None:
    """Put NF4 layers of bitsandbytes in place of all linear layers but the last, one by one; moving one packs it."""
    import bitsandbytes

    head = model.get_output_embeddings()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                packed = bitsandbytes.nn.Linear4bit(  # on the CPU
                    child.in_features, child.out_features, bias=child.bias is not None,
                    compute_dtype=torch.bfloat16, quant_type="nf4",
                )  # fmt: skip
                packed.load_state_dict(child.state_dict())
                setattr(parent, name, packed.to(child.weight.device))


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, tuple[int, int | None]]:
    """Bytes of the cache, and the most that was added while a prompt was read piece by piece, by arm.

    An arm that runs out of memory says after how many tokens; its figures are those until then.
    """
    place = torch.device(args.device)
    if place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
        share = args.card * GB / torch.cuda.get_device_properties(place).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), place)
    model = build(args)
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), device=place)
    found: dict[str, tuple[int, int | None]] = {}
    for name in ("memory", "full attention") if args.full else ("memory",):
        cache: Any = HippocampalCache() if name == "memory" else DynamicCache(config=model.config)
        bar = tqdm(total=args.tokens, desc=name, unit=" tokens")
        with PeakMemory(place) as peak, bar, full_attention(model) if name != "memory" else nullcontext():
            try:
                for part in ids.split(args.piece, dim=1):
                    model(part, cache=cache, use_cache=True, logits_to_keep=1)
                    bar.update(part.shape[1])
            except torch.OutOfMemoryError as error:  # an answer too
                bar.write(f"{name}: out of memory after {bar.n:,} tokens: {error}".partition(" If reserved")[0])
        held = cache.nbytes if name == "memory" else sum(u.keys.nbytes + u.values.nbytes for u in cache.layers)
        found[name] = (held, peak.nbytes)
        most = "unknown" if peak.nbytes is None else f"{peak.nbytes / 1e6:,.1f} MB ({peak.meaning})"
        print(f"measured, {name}: cache {held / 1e6:,.2f} MB, most added while reading {most}", flush=True)
    if place.type == "cuda":
        print(f"peak of the process: {torch.cuda.max_memory_allocated(place) / GB:.2f} GB of {args.card:g} GB")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compute, and measure if that was asked for.

    Returns:
        ``arms``, the bytes by formula; ``measured``, cache and peak by arm.
    """
    args = parse(argv)
    arms = account(args)
    print(format_account(arms, args))
    measured = {}
    if args.measure:
        with user_errors("fit_on_a_card"):  # out of memory is a RuntimeError, and an answer
            measured = measure(args)
    return {"arms": arms, "measured": measured}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--shape", default="qwen2.5-3b", choices=sorted(SHAPES), help="sizes of the model")
    add("--tokens", type=positive, default=200_000, help="length of the text (default: 200,000)")
    add("--card", type=number(1000), default=24, help="GB that may be used, of 10^9 bytes (default: 24)")
    add("--bits", type=int, default=16, choices=[16, 4], help="of the base model's linear layers (default: 16)")
    add("--compressor", default="GatedDeltaNet", choices=compressor_names(), help="the memory's recurrence")
    add("--window", type=positive, default=32_640, help="last tokens, kept without loss")
    add("--sinks", type=count, default=128, help="first tokens, always kept")
    add("--piece", type=positive, default=8192, help="tokens read at a time (default: 8,192)")
    add("--measure", action="store_true", help="run it with random weights")
    add("--full", action="store_true", help="with --measure: full attention too")
    add(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where it runs: cpu, cuda, cuda:1, ...",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
