"""Speed and memory on a GPU, beside the base model: kernels, reading a long prompt, decoding, a training step.

    python examples/gpu_benchmark.py --output results

A random model of the shape of Qwen2.5-3B (or another one, ``--shape``) reads a prompt and goes on, with full attention
and with a bounded memory. Every number of one run is from one process and one card; ratios are against the copy
bandwidth and the full attention of the same run. Writes a table, a JSON file and a picture.
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import ahn_layers
from ahn_layers import Compressor, GatedDeltaNet, adapter_parameters, full_attention, retrofit, window_only
from ahn_layers.distillation import compile_layers, distillation_loss, freeze_base
from ahn_layers.ops.decode import StepRule, decode_step

SHAPES = {
    "qwen2.5-3b": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True, eos_token_id=None,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None,
    ),
    "tiny": LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None,
    ),
}  # fmt: skip
Results = dict[str, Any]


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
    parts: dict[str, Callable[[argparse.Namespace], Results]] = {
        "kernels": kernels, "prefill": prefill, "decode": decode, "cold": cold, "first": first, "training": training
    }  # fmt: skip
    for name in options.parts:
        start = time.perf_counter()
        results[name] = parts[name](options)
        results[name]["seconds"] = time.perf_counter() - start
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if options.output:
        plot(results, options.output / "results.png")
    print(table(results))
    return results


def build(options: argparse.Namespace) -> Any:
    """A random model of the shape, retrofitted, its memory weights random too."""
    config = copy.deepcopy(SHAPES[options.shape])
    if options.layers:
        config.num_hidden_layers = options.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: options.layers]
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=options.dtype).eval()
    retrofit(model, Compressor.by_name[options.compressor], window_size=options.window, num_sinks=options.sinks)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def measure(function: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds, the median of several calls."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float:
    """Peak GPU memory in GB since ``forget_peak``."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")


def forget_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def kernels(options: argparse.Namespace) -> Results:
    """Bandwidth of one decode step of one layer against that of a copy; inputs rotate, so that no cache holds them."""
    device = options.device
    big = torch.randn(1 << (28 if device == "cuda" else 20), device=device, dtype=torch.float32)
    other = torch.empty_like(big)
    copy = 2 * big.nbytes / timed(lambda _: other.copy_(big), device)
    results: Results = {"copy, TB/s": copy / 1e12}
    for dtype in (torch.bfloat16, torch.float16):
        for size, heads, group in ((64, 16, 8), (128, 16, 1), (128, 16, 8), (128, 32, 4), (256, 16, 8)):
            rate = step_rate(options, dtype, size, heads, heads // group)
            name = f"{str(dtype).removeprefix('torch.')}, D={size}, {heads}/{heads // group} heads"
            results[name] = {"TB/s": rate / 1e12, "share of copy": rate / copy}
    return results


def step_rate(options: argparse.Namespace, dtype: torch.dtype, size: int, heads: int, kv_heads: int) -> float:
    """Bytes that one decode step of one layer with GatedDeltaNet moves in a second: slots, state, output matrix."""
    sets, slots, device = 4, options.window + options.sinks, options.device
    k, v = torch.randn(2, sets, 1, kv_heads, slots, size, device=device, dtype=dtype)
    g, beta = torch.rand(2, sets, 1, heads, slots, device=device, dtype=dtype)
    g.neg_()
    q, turned = torch.randn(2, 1, heads, 1, size, device=device, dtype=dtype)
    state = torch.randn(sets, 1, heads, size, size, device=device)
    token = (
        k[0, :, :, :1].clone(),
        v[0, :, :, :1].clone(),
        {"g": g[0, ..., :1].clone(), "beta": beta[0, ..., :1].clone()},
    )
    matrix, gate = torch.randn(heads, size, size, device=device, dtype=dtype), torch.randn(1, heads, device=device)
    rule = StepRule("g", None, "beta", True, size**-0.5, weight=gate.new_ones(size), gate=gate, matrix=matrix)
    seen = torch.full((1,), slots * 3, device=device)

    def step(i: int) -> None:
        held = (k[i % sets], v[i % sets], {"g": g[i % sets], "beta": beta[i % sets]})
        decode_step(q, token, held, seen, state[i % sets], rule, num_sinks=options.sinks, q_sinks=turned)

    return (k[0].nbytes + v[0].nbytes + 2 * state[0].nbytes + matrix.nbytes) / timed(step, device)


def timed(step: Callable[[int], Any], device: str, count: int = 20) -> float:
    """Seconds a call; on a GPU from replays of a CUDA graph, which leave launch costs out."""
    for i in range(4):
        step(i)
    if device != "cuda":
        return measure(lambda: step(0), device, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            step(i)
    return measure(graph.replay, device, 7) / count


def prefill(options: argparse.Namespace) -> Results:
    """Seconds and peak memory of ``generate`` for the prompt and one token, after a shorter prompt to warm up."""
    model, device = build(options), options.device
    results: Results = {"weights, GB": sum(p.nbytes for p in model.parameters()) / 1e9}
    for arm, mode, lengths in (
        ("memory", None, [options.length, *options.lengths]),
        ("full", full_attention, [options.length]),
    ):
        for length in lengths:
            ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)

            def run(ids: Tensor = ids) -> None:
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)

            with mode(model) if mode else torch.no_grad():
                warm = ids[:, : options.window + 3 * 4096]
                model.generate(warm, attention_mask=torch.ones_like(warm), max_new_tokens=1, do_sample=False)
                forget_peak(device)
                seconds = measure(run, device)
            results[f"{arm}, {length:,}"] = {"s": seconds, "peak, GB": peak(device)}
            print(f"prefill, {arm}, {length:,} tokens: {seconds:.2f} s, peak {peak(device):.2f} GB", flush=True)
    return results


def decode(options: argparse.Namespace) -> Results:
    """Milliseconds a token in steady state; and what it costs to get there, compilation included."""
    model = build(options)
    results: Results = {}
    for batch in (1, *options.batches):
        for length in (options.length, *options.lengths) if batch == 1 else (options.window + options.sinks,):
            name = f"memory, compiled, {length:,}, batch {batch}"
            results[name] = time_tokens(model, options, length, batch, "static")
    for arm, mode in (("memory", nullcontext), ("full", full_attention)):
        with mode(model) if mode is full_attention else mode():
            results[f"{arm}, eager, {options.length:,}"] = time_tokens(model, options, options.length, 1, None)
    return results


def time_tokens(
    model: Any, options: argparse.Namespace, length: int, batch: int, implementation: str | None
) -> dict[str, float]:
    """Time of a token of ``generate`` in steady state, without waiting for it; compilation is on a short prompt."""
    device, clock = options.device, Clock()
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)

    def run(prompt: Tensor, count: int) -> list[float]:
        synchronize(device)
        clock.stamps = [time.perf_counter()]
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, cache_implementation=implementation, logits_processor=[clock],
        )  # fmt: skip
        return clock.stamps

    start, *_, end = run(ids[:, :64], 16)
    forget_peak(device)
    # generate itself waits for every token, so the host runs ahead by one at most
    stamps = run(ids, options.new_tokens)
    steady = stamps[4:]
    found = {
        "ms": 1e3 * (steady[-1] - steady[0]) / (len(steady) - 1),
        "median, ms": 1e3 * median(b - a for a, b in pairwise(steady)),
        "prompt, s": stamps[2] - stamps[0], "compile, s": end - start, "peak, GB": peak(device),
    }  # fmt: skip
    print(f"decode, {length:,} tokens, batch {batch}, {implementation or 'eager'}: {found}", flush=True)
    return found


class Clock(transformers.LogitsProcessor):
    """Notes when each token's logits are asked for."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, unchanged."""
        self.stamps.append(time.perf_counter())
        return scores


def cold(options: argparse.Namespace) -> Results:
    """Seconds from the start of a process to its first compiled token, with no compiled code cached; and again."""
    command = [sys.executable, __file__, "--parts", "first"]
    for name in ("shape", "layers", "compressor", "window", "sinks", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    results: Results = {}
    with TemporaryDirectory() as folder:
        caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), folder)
        for name in ("nothing compiled", "warm caches"):
            start = time.perf_counter()
            found = Path(folder) / name
            subprocess.run([*command, "--output", found], env=os.environ | caches, check=True, capture_output=True)
            seconds = time.perf_counter() - start
            inside = json.loads((found / "results.json").read_text())["first"]
            results[name] = {
                "process, s": seconds,
                "model, s": inside["model, s"],
                "generate, s": inside["generate, s"],
            }
    return results


def first(options: argparse.Namespace) -> Results:
    """What ``cold`` starts: a short prompt and two tokens, the second one compiled."""
    start = time.perf_counter()
    model = build(options)
    synchronize(options.device)
    built = time.perf_counter() - start
    ids = torch.randint(0, model.config.vocab_size, (1, 64), device=options.device)
    seconds = measure(lambda: model.generate(ids, max_new_tokens=2, cache_implementation="static"), options.device)
    return {"model, s": built, "generate, s": seconds}


def training(options: argparse.Namespace) -> Results:
    """Seconds of a student's forward and backward pass, with the memory and with the window alone; and distillation."""
    model, device = build(options), options.device
    freeze_base(model)
    model.train()
    if device == "cuda":
        compile_layers(model)
    ids = torch.randint(0, model.config.vocab_size, (options.train_batch, options.train_length), device=device)
    scale = torch.ones((), device=device, requires_grad=True)
    embed = model.get_input_embeddings()
    results: Results = {}

    def step() -> None:
        model.zero_grad()
        hidden = model.base_model(inputs_embeds=embed(ids) * scale, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()

    def distil() -> None:
        model.zero_grad()
        distillation_loss(model, ids).loss.backward()

    for arm, mode, function in (("memory", None, step), ("window", window_only, step), ("distillation", None, distil)):
        with mode(model) if mode else torch.enable_grad():
            for _ in range(2):  # the second: what was compiled for the first is used
                function()
            forget_peak(device)
            function()  # takes memory anew
            seconds = measure(function, device, 5)
        results[arm] = {"s": seconds, "tokens/s": ids.numel() / seconds, "peak, GB": peak(device)}
        print(f"training, {arm}: {results[arm]}", flush=True)
    results["memory / window"] = results["memory"]["s"] / results["window"]["s"]
    return results


def table(results: Results) -> str:
    """Everything measured, one line each."""
    lines = [f"{results['device']}, {results['versions']}"]
    for part in ("kernels", "prefill", "decode", "cold", "first", "training"):
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
        ax.barh(list(cells), list(cells.values()))
        ax.set(title=part, xlabel=unit)
        ax.invert_yaxis()
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="qwen2.5-3b", choices=sorted(SHAPES))
    add("--layers", type=int, default=0, help="fewer layers than the shape has")
    add("--compressor", default=GatedDeltaNet.__name__, choices=sorted(Compressor.by_name))
    add("--window", type=int, default=32_640)
    add("--sinks", type=int, default=128)
    add("--length", type=int, default=131_072, help="tokens of the prompt")
    add("--lengths", type=int, nargs="*", default=[1_048_576], help="further lengths, with the memory only")
    add("--batches", type=int, nargs="*", default=[8, 32], help="batch sizes to decode")
    add("--new-tokens", type=int, default=128)
    add("--train-length", type=int, default=8192)
    add("--train-batch", type=int, default=1)
    parts = ["kernels", "prefill", "decode", "cold", "training"]
    add("--parts", nargs="+", default=parts, choices=[*parts, "first"])
    add("--device", default="cuda" if gpu else "cpu")
    add("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16 if gpu else torch.float32)
    add("--output", type=Path, help="folder for results.json and results.png")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
