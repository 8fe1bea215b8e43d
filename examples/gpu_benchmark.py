"""Speed and memory on a GPU, beside the base model: kernels, prompts, batches, decoding, a conversation, training.

    python examples/gpu_benchmark.py --output results

A random model of the shape of Qwen2.5-3B (or another one, ``--shape``) reads a prompt and goes on, with full attention
and with a bounded memory. Every number of one run is from one process and one card; ratios are against the copy
bandwidth and the full attention of the same run. Writes a table, a JSON file and a picture.
"""

import argparse
import json
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import transformers
from _common import Help, add_device_options, compressor_names, count, positive
from gpu_measurements import PARTS, SHAPES, Results
from gpu_prompts import batches
from gpu_turns import kept
from looks import color
from matplotlib.figure import Figure

import ahn_layers
from ahn_layers import GatedDeltaNet

MEASURED = PARTS | {"batches": batches, "kept": kept}


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure what was asked for; returns what is written to ``results.json``."""
    options = parse(arguments)
    gpu = options.device == "cuda"
    results: Results = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "versions": {u.__name__: u.__version__ for u in (ahn_layers, torch, transformers)},
        "date": date.today().isoformat(),
        "options": {name: str(value) for name, value in vars(options).items()},
    }  # fmt: skip
    for name in options.parts:
        start = time.perf_counter()
        results[name] = MEASURED[name](options)
        results[name]["seconds"] = time.perf_counter() - start
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.output:
        plot(results, options.output / "results.png")
    print(table(results))
    return results


def table(results: Results) -> str:
    """Everything measured, one line each."""
    lines = [f"{results['device']}, {results['versions']}"]
    for part in MEASURED:
        for name, value in results.get(part, {}).items():
            cells = value if isinstance(value, dict) else {"": value}
            lines.append(f"{part:9} {name:38} " + "  ".join(f"{unit} {u:.3f}" for unit, u in cells.items()))
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Time to read the prompt, time a token, peak memory."""
    parts = [("prefill", "s"), ("decode", "ms"), ("prefill", "peak, GB")]
    parts = [(part, unit) for part, unit in parts if part in results]
    if not parts:
        return
    figure = Figure(figsize=(4.5 * len(parts), 3.5), layout="constrained")
    for ax, (part, unit) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        cells = {name: cell[unit] for name, cell in results[part].items() if isinstance(cell, dict)}
        ax.barh(list(cells), list(cells.values()), color=[color(name) for name in cells])
        ax.set(title=part, xlabel=unit)
        ax.invert_yaxis()
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--shape", default="qwen2.5-3b", choices=sorted(SHAPES), help="sizes of the model")
    add("--layers", type=count, default=0, help="fewer layers than the shape has")
    add("--compressor", default=GatedDeltaNet.__name__, choices=compressor_names(), help="the memory's recurrence")
    add("--window", type=positive, default=32_640, help="last tokens, kept without loss")
    add("--sinks", type=count, default=128, help="first tokens, always kept")
    add("--length", type=positive, default=131_072, help="tokens of the prompt")
    add("--lengths", type=positive, nargs="*", default=[1_048_576], help="further lengths, with the memory only")
    add("--batches", type=positive, nargs="*", default=[8, 32], help="batch sizes to read and to decode")
    add("--new-tokens", type=positive, default=128, help="tokens to decode")
    add("--train-length", type=positive, default=8192, help="tokens of a training sequence")
    add("--train-batch", type=positive, default=1, help="sequences of a training step")
    add(
        "--parts",
        nargs="+",
        default=[name for name in MEASURED if name != "first"],
        choices=MEASURED,
        help="what is measured",
    )
    add_device_options(parser)
    add("--output", type=Path, help="folder for results.json and results.png")
    options = parser.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype)
    return options


if __name__ == "__main__":
    main()
