"""What ``gpu_benchmark.py`` measures: kernels, reading a long prompt, decoding, a cold start, a training step."""

import copy
import gc
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from ahn_layers import Compressor, adapter_parameters, full_attention, retrofit, window_only
from ahn_layers.distillation import compile_layers, distillation_loss, freeze_base
from ahn_layers.ops.decode.forms import fits_step
from ahn_layers.ops.decode.rule import StepRule
from ahn_layers.ops.decode.step import decode_step, slot_attention

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


def build(options: Namespace) -> Any:
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


def kernels(options: Namespace) -> Results:
    """Bandwidth of one decode step of one layer against that of a copy; inputs rotate, so that no cache holds them."""
    device = options.device
    copy = copy_rate(1 << (31 if device == "cuda" else 23), device, sets=1)
    results: Results = {"copy, TB/s": copy / 1e12}
    for dtype in (torch.bfloat16, torch.float16):
        for size, heads, group in ((64, 16, 8), (128, 16, 1), (128, 16, 8), (128, 32, 4), (256, 16, 8)):
            nbytes, rate = step_rate(options, dtype, size, heads, heads // group)
            such = copy_rate(nbytes, device)
            name = f"{str(dtype).removeprefix('torch.')}, D={size}, {heads}/{heads // group} heads"
            results[name] = {"TB/s": rate / 1e12, "share of copy": rate / copy, "of a copy of its size": rate / such}
    return results


def copy_rate(nbytes: int, device: str, sets: int = 8) -> float:
    """Bytes that a copy moves in a second: ``nbytes`` at a time, half of them read and half written; inputs rotate."""
    source = torch.randn(sets, nbytes // 8, device=device)
    target = torch.empty_like(source)
    return 2 * source[0].nbytes / timed(lambda i: target[i % sets].copy_(source[i % sets]), device)


def step_rate(options: Namespace, dtype: torch.dtype, size: int, heads: int, kv_heads: int) -> tuple[int, float]:
    """Bytes of one decode step of one layer with GatedDeltaNet (slots, state, output matrix), and those of a second."""
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
    recurrence = {"decay": "g", "strength": "beta", "delta": True, "read_scale": size**-0.5}
    rule = StepRule(**recurrence, weight=gate.new_ones(size), gate=gate, matrix=matrix)
    seen = torch.full((1,), slots * 3, device=device)

    def step(i: int) -> None:
        held = (k[i % sets], v[i % sets], {"g": g[i % sets], "beta": beta[i % sets]})
        if fits_step(q, [*held[:2], *held[2].values()], state[i % sets]):
            decode_step(q, token, held, seen, state[i % sets], rule, num_sinks=options.sinks, q_sinks=turned)
        else:  # on a CPU, to try the script
            slot_attention(q, *held[:2], seen, full=True, q_sinks=turned, num_sinks=options.sinks)

    nbytes = k[0].nbytes + v[0].nbytes + 2 * state[0].nbytes + matrix.nbytes
    return nbytes, nbytes / timed(step, device)


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


def prefill(options: Namespace) -> Results:
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


def decode(options: Namespace) -> Results:
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
    model: Any, options: Namespace, length: int, batch: int, implementation: str | None
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


def cold(options: Namespace) -> Results:
    """Seconds from the start of a process to its first compiled token, with no compiled code cached; and again."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_benchmark.py")), "--parts", "first"]
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


def first(options: Namespace) -> Results:
    """What ``cold`` starts: a short prompt and two tokens, the second one compiled."""
    start = time.perf_counter()
    model = build(options)
    synchronize(options.device)
    built = time.perf_counter() - start
    ids = torch.randint(0, model.config.vocab_size, (1, 64), device=options.device)
    seconds = measure(lambda: model.generate(ids, max_new_tokens=2, cache_implementation="static"), options.device)
    return {"model, s": built, "generate, s": seconds}


def training(options: Namespace) -> Results:
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


PARTS: dict[str, Callable[[Namespace], Results]] = {
    "kernels": kernels, "prefill": prefill, "decode": decode, "cold": cold, "first": first, "training": training
}  # fmt: skip
"""By name; ``first`` is what ``cold`` starts."""
