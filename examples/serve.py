"""Serve a retrofitted model behind OpenAI's API: many conversations at once, each in memory of fixed size.

    python examples/serve.py --adapter examples/adapters/smollm2-135m-instruct-gdn    # SmolLM2-135M-Instruct
    python examples/serve.py --model meta-llama/Llama-3.2-1B-Instruct --window 8064 --rows 32
    python examples/serve.py --random-weights --port 8001                    # no network; random replies

You will see the address; any client of OpenAI's API can be pointed at it. Ctrl-C finishes the replies that have begun,
saves the conversations and ends.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from _chat import SMALL, random_model
from _common import (
    Help,
    add_memory_options,
    count,
    device,
    find_adapter,
    give_memory,
    positive,
    refuse_model,
    user_errors,
)
from serving.answer import Service
from serving.app import create_app
from serving.conversations import Conversations
from serving.engine import Engine
from serving.prompts import Prompts
from smollm2 import load_causal_lm
from transformers import LlamaConfig


def parser() -> argparse.ArgumentParser:
    """The command line."""
    gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = made.add_argument
    add("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    add("--random-weights", action="store_true", help="a tiny model with random weights: no network")
    add("--adapter", help="trained memory: folder, file or hub id (default: none)")
    add_memory_options(made)
    add("--name", help="what the API calls the model (default: the last part of --model)")
    add("--host", default="127.0.0.1", help="address to listen at")
    add("--port", type=count, default=8000, help="port to listen at")
    add("--rows", type=positive, default=16, help="requests that are answered at the same time (default: 16)")
    add("--waiting", type=count, default=64, help="requests that may wait for a row; others get 429 (default: 64)")
    add("--piece", type=positive, default=2048 if gpu else 256, help="tokens of a prompt read between two steps")
    add("--stepwise", type=count, default=0, help="when at most so many tokens of a prompt are left, read them in "
        "the steps of the batch, one in each, and not in a call of their own (default: 0, never)")  # fmt: skip
    add("--fixed-rows", action=argparse.BooleanOptionalAction, default=gpu,
        help="always compute all rows, at fixed addresses: for CUDA graphs; no bit of a reply then depends on other "
        "requests (default: on a GPU)")  # fmt: skip
    add("--prefixes", type=count, default=8, help="shared beginnings (system prompts) that are kept (default: 8)")
    add("--conversations", type=Path, help="folder for conversations that leave memory (default: they are dropped)")
    add("--in-memory", type=count, default=64, help="conversations kept in memory (default: 64)")
    add("--on-disk", type=count, default=10_000, help="conversations kept in the folder (default: 10000)")
    add("--max-tokens", type=positive, default=1024, help="tokens of a reply, at most and by default (default: 1024)")
    add("--max-prompt", type=positive, default=1_000_000, help="tokens of a prompt at most (default: 1000000)")
    add("--grace", type=count, default=20, help="seconds that replies have to finish at the end (default: 20)")
    add("--device", type=device, default="cuda" if gpu else "cpu", help="where it runs: cpu, cuda, cuda:1, ...")
    add(
        "--dtype",
        default="bfloat16" if gpu else "float32",
        choices=["float64", "float32", "bfloat16", "float16"],
        help="precision of the model",
    )
    return made


def build(args: argparse.Namespace) -> Service:
    """Model, engine and conversations, as the command line says.

    Raises:
        OSError: if there is no such model or adapter.
        ValueError: if they do not fit.
    """
    adapter = find_adapter(args.adapter)
    model, tokenizer = _load(args)
    give_memory(model, adapter, window=args.window, sinks=args.sinks, compressor=args.compressor)
    engine = Engine(
        model, rows=args.rows, waiting=args.waiting, piece=args.piece, stepwise=args.stepwise, fixed=args.fixed_rows,
        prefixes=args.prefixes,
    )  # fmt: skip
    kept = Conversations(args.conversations, args.in_memory, args.on_disk, model.device, engine.metrics)
    ends = model.generation_config.eos_token_id
    ends = frozenset([*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]) - {None}
    name = args.name or ("random" if args.random_weights else Path(args.model or "SmolLM2-135M-Instruct").name)
    return Service(name, engine, Prompts(tokenizer), kept, ends, args.max_tokens, args.max_prompt, float(args.grace))


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    dtype = getattr(torch, args.dtype)
    if args.random_weights:
        refuse_model(args.model)
        model, tokenizer = random_model(LlamaConfig(**SMALL, num_key_value_heads=2))
        return model.to(args.device, dtype), tokenizer
    model, tokenizer = load_causal_lm(args.model, dtype, args.device)
    if tokenizer.chat_template is None:
        raise ValueError(f"{args.model}: its tokenizer has no chat template. Name a chat model by --model.")
    return model, tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is told to end."""
    args = parser().parse_args(argv)
    with user_errors("serve"):
        service = build(args)
    if not args.adapter:
        print("No --adapter: the memory is untrained and adds nothing. What has left the window is forgotten.")
    window = service.engine.model.hippocampus.window
    print(f"{service.name}, {window.capacity:,} tokens kept exactly: http://{args.host}:{args.port}/v1", flush=True)
    uvicorn.run(create_app(service), host=args.host, port=args.port, timeout_graceful_shutdown=args.grace)


if __name__ == "__main__":
    main()
