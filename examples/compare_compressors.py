"""Train every compressor alike and measure what it is worth: which one to take, on your model and your texts.

    python examples/compare_compressors.py --output results                      # small, on a CPU
    python examples/compare_compressors.py --device cuda --text books/train --dev books/dev --output results

The base model is frozen and read once with full attention: the teacher of all. Each compressor then sees the same
sequences in the same order, for the same number of steps, from the same seed. Writes a table, a JSON file, which grows
with every compressor, and a picture.

- *gap closed*: share of what sinks + window lose against full attention on held-out texts that the memory wins back;
  *by this text's memory*: what of it is lost when the memory of another text is read.
- *span*: by how much the memory lowers the loss on a span that comes again after it has left the window.
- *needle*: the same for the answer to a question about a fact that has left the window, and the share of right answers.
- *memory*: bytes per sequence in all layers beyond those of sinks + window: the state, and what stays with each token
  of the window.
- *training*: tokens per second of student passes; *decode*: milliseconds per token of ``generate``.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import transformers
from _common import Help, compressor_names, count, device, number, positive, user_errors
from comparison import Comparison
from comparison_table import plot, rows_of, title_of
from gap import SEGMENT
from gpu_measurements import Results
from measures import table

import ahn_layers
from ahn_layers import Compressor

COMPRESSORS = (
    "LinearAttention", "RetNet", "Mamba2", "GLA", "DeltaNet", "GatedDeltaNet", "KDA", "GatedDeltaProduct", "RWKV7",
    "Titans", "AveragePooling", "MaxPooling",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Results:
    """Compare; returns what is written to ``results.json``."""
    options = parse(arguments)
    with user_errors("compare_compressors"):
        find(options)
        options.output.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda" and not options.autotune:
        one_configuration()
    begin = time.perf_counter()
    with user_errors("compare_compressors"):
        comparison = Comparison(options)
    references, goals = comparison.references(), comparison.teach()
    results: Results = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "versions": {u.__name__: u.__version__ for u in (ahn_layers, torch, transformers)},
        "date": date.today().isoformat(),
        "options": {name: str(value) for name, value in vars(options).items()},
        "train_tokens": sum(u.numel() for u in comparison.batches),
        "references": {
            arm: {"loss": float(torch.stack(u["losses"]).mean()), "right": u["needles"]["right"],
                  "decode_ms": u["decode_ms"], "bytes": u["bytes"]}
            for arm, u in references.items()
        },
        "compressors": {}, "failed": {},
    }  # fmt: skip
    for name in options.compressors:
        started = time.perf_counter()
        try:
            result = comparison.compare(name, goals, references)
            results["compressors"][name] = result | {"seconds": time.perf_counter() - started}
        except Exception as error:  # of a kernel, or of memory: the others still give their numbers
            results["failed"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        results["seconds"] = time.perf_counter() - begin
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(title_of(results, comparison.options, len(comparison.texts)), rows_of(results))
    (options.output / "results.txt").write_text(text + "\n")
    plot(results, options.output / "results.png")
    print(f"\n{text}\n\n{options.output}/results.json, results.txt, results.png")
    if results["failed"]:
        raise SystemExit(f"compare_compressors: failed, see results.json: {', '.join(results['failed'])}")
    return results


def find(options: argparse.Namespace) -> None:
    """Import the modules that define compressors; stop if one is asked for that is not there."""
    sys.path.append("")
    for module in options.module:
        importlib.import_module(module.removesuffix(".py"))
    unknown = sorted(set(options.compressors) - set(Compressor.by_name))
    if unknown:
        raise ValueError(f"no compressor {', '.join(unknown)}; there are {compressor_names()}")


def one_configuration() -> None:
    """Kernels of flash-linear-attention without the minutes in which they look for their fastest form."""
    from ahn_layers.ops.recurrence.flash_linear import without_autotuning

    try:
        without_autotuning()
    except ImportError:
        print("flash-linear-attention is not installed: plain PyTorch in its place")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    add("--text", type=Path, nargs="*", default=[], help="texts to train on (default: the Python reference)")
    add("--dev", type=Path, nargs="*", default=[], help="held-out texts, with --text")
    add("--compressors", nargs="+", default=list(COMPRESSORS), metavar="NAME", help="default: those of the library")
    add("--module", nargs="*", default=[], help="Python modules that define further compressors")
    add("--device", type=device, default="cpu", help="where it runs: cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    add("--steps", type=positive, help="default: 48 on a GPU, 12 on a CPU")
    add("--batch", type=positive, help="sequences a step (default: 8; 2 on a CPU)")
    add("--micro", type=positive, help="sequences at once (default: 4; 1 on a CPU)")
    add("--length", type=positive, help="tokens in each sequence (default: 4,096; 1,024 on a CPU)")
    add("--window", type=positive, help="default: 480; 112 on a CPU")
    add("--sinks", type=count, help="default: 32; 16 on a CPU")
    add("--lr", type=number(10.0), default=2e-3, help="learning rate at its highest")
    add("--stretches", type=positive, help="held-out texts to measure on, an even number (default: 32; 8 on a CPU)")
    add("--spans", type=count, help="repeated spans (default: 32; 4 on a CPU)")
    add("--needles", type=count, help="prompts of each needle task (default: 8; 1 on a CPU)")
    add("--decode", type=count, default=32, help="tokens to time, 8 or more, 0 for none")
    add("--compiled-decode", action="store_true", help="time the compiled step, which takes a while to compile")
    add("--autotune", action="store_true", help="let kernels find their fastest form: minutes at their first call")
    add("--seed", type=count, default=0, help="of the random numbers")
    add("--output", type=Path, required=True, help="folder for results.json, results.txt and results.png")
    options = parser.parse_args(arguments)
    if bool(options.text) != bool(options.dev):
        parser.error("give both of --text and --dev, or neither")
    if 0 < options.decode < 8:
        parser.error(f"--decode {options.decode}: expected at least 8, since the first ones are not counted, or 0")
    large = options.device == "cuda"
    defaults = {
        "dtype": ("bfloat16", "float32"), "steps": (48, 12), "batch": (8, 2), "micro": (4, 1), "length": (4096, 1024),
        "window": (480, 112), "sinks": (32, 16), "stretches": (32, 8), "spans": (32, 4), "needles": (8, 1),
    }  # fmt: skip
    for name, (gpu, cpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, gpu if large else cpu)
    least = options.window + 2 * options.sinks + 2 * SEGMENT
    if options.length < least:
        parser.error(f"--length {options.length}: expected at least {least}, so that a span leaves the window")
    return options


if __name__ == "__main__":
    main()
