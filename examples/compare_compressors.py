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
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from _common import compressor_names, count, device, number, positive, user_errors
from arms import arm_bytes, use_arm
from gap import SEGMENT, measure, measure_spans, swapped_memories
from gpu_measurements import forget_peak, synchronize, time_tokens
from matplotlib.figure import Figure
from measures import table
from needles import make, score_all
from quickstart import load_text
from smollm2 import load_causal_lm, load_tokenizer
from texts import Crops, read_texts, stretches, tokenize
from torch import Tensor
from tqdm import tqdm

import ahn_layers
from ahn_layers import Compressor, adapter_parameters, restore, retrofit
from ahn_layers.distillation import arm_losses, freeze_base, output_head, sliced_loss

COMPRESSORS = (
    "LinearAttention", "RetNet", "Mamba2", "GLA", "DeltaNet", "GatedDeltaNet", "KDA", "GatedDeltaProduct", "RWKV7",
    "Titans", "AveragePooling", "MaxPooling",
)  # fmt: skip
TASKS = ("RULER single", "RULER multi-key", "pass key")
Results = dict[str, Any]


class Comparison:
    """A model, the data that every compressor trains on, and what it is measured on.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.window = options, (options.window, options.sinks)
        self.start = options.window + options.sinks
        train, dev = load_texts(load_tokenizer(options.model), options)  # before the model is loaded
        self.model, self.tokenizer = load_causal_lm(options.model, getattr(torch, options.dtype), options.device)
        self.model.requires_grad_(False)
        crops = Crops(train, options.length, options.steps * options.batch, copies=0.5, seed=options.seed)
        self.batches = [
            torch.stack([crops[i]["input_ids"] for i in range(at, at + options.batch)])
            for at in range(0, len(crops), options.batch)
        ]
        self.texts = torch.stack([u["input_ids"] for u in stretches(dev, options.length, options.stretches)])
        rng, longest = random.Random(options.seed), max(dev, key=len)
        self.spans = [self._span(longest, rng) for _ in range(options.spans)]
        self.needles = [self._needle(longest.tolist(), task, rng) for _ in range(options.needles) for task in TASKS]

    def _span(self, text: Tensor, rng: random.Random) -> Tensor:
        """A stretch that ends with a span of its own, which every window has lost by then."""
        kept = self.options.length - SEGMENT
        begin = rng.randrange(len(text) - self.options.length + 1)
        place = begin + rng.randint(self.options.sinks, kept - SEGMENT - self.start)
        return torch.cat((text[begin : begin + kept], text[place : place + SEGMENT])).long()

    def _needle(self, text: list[int], task: str, rng: random.Random) -> Any:
        """A prompt whose needle has left the window."""
        begin, length = rng.randrange(max(1, len(text) - self.options.length)), self.options.length

        def encode(words: str) -> list[int]:
            return list(self.tokenizer(words, add_special_tokens=False).input_ids)

        while True:
            example = make(task, encode, text[begin:] + text[:begin], length, rng.random(), rng)
            if all(u.place(length, *self.window).startswith("evicted") for u in example.needles):
                return example

    def teach(self) -> list[Tensor]:
        """Hidden states of the base model beyond the window, for every training batch."""
        decoder = self.model.get_decoder()
        with torch.no_grad():
            return [
                torch.cat([decoder(input_ids=ids, use_cache=False)[0][:, self.start :] for ids in self._parts(batch)])
                for batch in tqdm(self.batches, desc="teacher", unit=" batches")
            ]

    def _parts(self, batch: Tensor) -> Iterator[Tensor]:
        """What fits into memory at once."""
        yield from batch.to(self.options.device).split(self.options.micro)

    def train(self, goals: list[Tensor], name: str) -> Results:
        """Train the memory that the model has; the divergence of its steps, and speed and memory of them."""
        options, device = self.options, self.options.device
        parameters, head = freeze_base(self.model), output_head(self.model)
        optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps + 1, pct_start=0.1)
        losses, seconds, decoder = [], [], self.model.get_decoder()
        bar = tqdm(zip(self.batches, goals, strict=True), total=options.steps, desc=name, unit=" steps")
        for batch, goal in bar:
            synchronize(device)
            begin, total = time.perf_counter(), 0.0
            for ids, hidden in zip(self._parts(batch), goal.split(options.micro), strict=True):
                student = decoder(input_ids=ids, use_cache=False)[0][:, self.start :].flatten(0, 1)
                loss = sliced_loss(student, head, teacher=hidden.flatten(0, 1))[0] * len(ids) / len(batch)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
            losses.append(total)
            bar.set_postfix(divergence=f"{total:.4f}")
        steady = seconds[len(seconds) // 4 :]
        return {
            "divergence": losses,
            "train_tokens_per_second": self.batches[0].numel() / statistics.median(steady),
            "train_seconds": sum(seconds),
            "train_first_step_seconds": seconds[0],
            "train_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }

    def losses(self, arm: str) -> list[Tensor]:
        """Loss of each token of the held-out texts beyond the window."""
        return self._each(self.texts, lambda ids: arm_losses(self.model, ids, start=self.start, arms=[arm])[arm])

    def span_losses(self, arm: str) -> list[Tensor]:
        """Loss of each token but the first of the spans that come again."""
        kept = self.options.length - SEGMENT
        spans = torch.stack(self.spans) if self.spans else torch.empty(0, 1, dtype=torch.long)
        return self._each(spans, lambda ids: arm_losses(self.model, ids, start=kept, arms=[arm])[arm])

    def _each(self, rows: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [row.double().cpu() for ids in self._parts(rows) for row in run(ids)] if len(rows) else []

    def asked(self, arm: str) -> Results:
        """Needles: loss on the answer, and the share of right ones."""
        with use_arm(self.model, arm, self.window):
            rows = [self.needles[i : i + self.options.micro] for i in range(0, len(self.needles), self.options.micro)]
            bar = tqdm(rows, desc=f"needles, {arm}")
            found = [u for some in bar for one in score_all(self.model, some, self.options.length) for u in one]
        return {"loss": [u.loss for u in found], "right": sum(u.correct for u in found) / max(1, len(found))}

    def references(self) -> Results:
        """What does not depend on the compressor: full attention, and the window alone."""
        retrofit(self.model, None, window_size=self.window[0], num_sinks=self.window[1])
        results: Results = {}
        for arm in ("full", "window"):
            results[arm] = {"losses": self.losses(arm), "spans": self.span_losses(arm), "needles": self.asked(arm)}
            with use_arm(self.model, arm, self.window):
                results[arm]["decode_ms"] = self.decode_ms()
            results[arm]["bytes"] = arm_bytes(self.model, arm, self.window, self.options.length)
        restore(self.model)
        return results

    def decode_ms(self) -> float | None:
        """Milliseconds per token of ``generate``, with its window full."""
        options = self.options
        if not options.decode:
            return None
        settings = argparse.Namespace(device=options.device, new_tokens=options.decode)
        implementation = "static" if options.compiled_decode else None
        return time_tokens(self.model, settings, self.start + 64, 1, implementation)["median, ms"]

    def compare(self, name: str, goals: list[Tensor], references: Results) -> Results:
        """One compressor from its retrofit to its numbers."""
        torch.manual_seed(self.options.seed)
        forget_peak(self.options.device)
        retrofit(self.model, Compressor.by_name[name], window_size=self.window[0], num_sinks=self.window[1])
        try:
            result = {"parameters": sum(p.numel() for _, p in adapter_parameters(self.model))}
            held = arm_bytes(self.model, "memory", self.window, self.options.length)
            state, window = state_bytes(self.model), references["window"]["bytes"]
            result |= {"memory_bytes": held - window, "state_bytes": state, "gate_bytes": held - window - state}
            result |= self.train(goals, name)
            self.model.requires_grad_(False)
            return result | self.judge(references)
        finally:
            restore(self.model)
            self.model.requires_grad_(False)

    def judge(self, references: Results) -> Results:
        """What the trained memory is worth."""
        arms = {arm: references[arm]["losses"] for arm in ("full", "window")} | {"memory": self.losses("memory")}
        if len(self.texts) > 1 and len(self.texts) % 2 == 0:
            with swapped_memories(self.model):
                arms["another_text"] = self.swapped()
        cell = measure([dict(zip(arms, text, strict=True)) for text in zip(*arms.values(), strict=True)])
        result: Results = {"gap": cell}
        if self.spans:
            spans = {arm: references[arm]["spans"] for arm in ("full", "window")} | {
                "memory": self.span_losses("memory")
            }
            result["spans"] = measure_spans(
                [dict(zip(spans, u, strict=True)) for u in zip(*spans.values(), strict=True)]
            )
        if self.needles:
            found, without = self.asked("memory"), references["window"]["needles"]
            gains = [a - b for a, b in zip(without["loss"], found["loss"], strict=True)]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
            result["needles"] = {"gain": statistics.fmean(gains), "gain_error": error, "right": found["right"]}
        result["decode_ms"] = self.decode_ms()
        return result

    def swapped(self) -> list[Tensor]:
        """Losses of each text that reads the memory of the one half the list away, in pairs."""
        half = len(self.texts) // 2
        pairs = torch.stack((self.texts[:half], self.texts[half:]), dim=1)
        found = [
            arm_losses(self.model, pair.to(self.options.device), start=self.start, arms=["memory"])["memory"]
            for pair in pairs
        ]
        return [row.double().cpu() for i in (0, 1) for row in (pair[i] for pair in found)]


def state_bytes(model: Any) -> int:
    """Bytes of the compressors' states for one sequence, float32."""
    stores = [m.store for m in model.modules() if isinstance(m, ahn_layers.HippocampalAttention)]
    states = [store.compressor.init_state(1, torch.zeros((), device="meta")) for store in stores]
    return sum(u.nbytes for state in states for u in ([state] if isinstance(state, Tensor) else state.values()))


def load_texts(tokenizer: Any, options: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids to train on and held-out ones; without ``--text``, of the reference of the Python language."""
    if options.text:
        return tuple(tokenize(tokenizer, read_texts(u), n) for u, n in ((options.text, "train"), (options.dev, "dev")))
    text = load_text(None)
    cut = len(text) * 4 // 5
    return tokenize(tokenizer, [text[:cut]], "train"), tokenize(tokenizer, [text[cut:]], "dev")


def rows_of(results: Results) -> list[tuple[str, ...]]:
    """The table, the heading first."""
    rows: list[tuple[str, ...]] = [
        ("compressor", "gap closed", "by this text's memory", "span, nats", "needle, nats", "right", "memory, bytes",
         "of it with the window", "parameters", "training, tokens/s", "decode, ms"),
    ]  # fmt: skip
    for arm in ("full", "window"):
        u = results["references"][arm]
        rows.append((f"({arm})", *["-"] * 4, f"{100 * u['right']:.0f} %", *["-"] * 4, optional(u["decode_ms"], ".1f")))
    for name, u in results["compressors"].items():
        gap, spans, needles = u["gap"], u.get("spans"), u.get("needles")
        rows.append((
            name,
            *(optional(gap[key], ".1f", " %", 100, error) for key, error in
              (("gap_closed", gap["standard_error"]), ("by_own_memory", None))),
            "-" if spans is None else optional(spans["memory"]["gain"], ".3f", "", 1, spans["memory"]["gain_error"]),
            "-" if needles is None else optional(needles["gain"], ".3f", "", 1, needles["gain_error"]),
            "-" if needles is None else f"{100 * needles['right']:.0f} %",
            f"{u['memory_bytes']:,}", f"{u['gate_bytes']:,}", f"{u['parameters']:,}",
            f"{u['train_tokens_per_second']:,.0f}", optional(u["decode_ms"], ".1f"),
        ))  # fmt: skip
    return rows


def optional(value: float | None, digits: str, unit: str = "", factor: float = 1, error: float | None = None) -> str:
    """A number that may be missing, with its standard error where there is one."""
    if value is None:
        return "-"
    return f"{factor * value:{digits}}{unit}" + ("" if error is None else f" +- {factor * error:{digits}}")


def plot(results: Results, path: Path) -> None:
    """Share of the gap and gain on spans over the bytes of the memory."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for ax, (title, value) in zip(
        figure.subplots(1, 2),
        {
            "share of the gap closed, %": lambda u: 100 * (u["gap"]["gap_closed"] or 0),
            "gain on repeated spans, nats": lambda u: u["spans"]["memory"]["gain"] if "spans" in u else 0,
        }.items(),
        strict=True,
    ):
        for name, u in results["compressors"].items():
            ax.plot(u["memory_bytes"] / 2**20, value(u), "o")
            ax.annotate(f" {name}", (u["memory_bytes"] / 2**20, value(u)), fontsize=8)
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.set(title=title, xlabel="memory of one sequence beyond its window, MiB", xscale="log")
    figure.savefig(path, dpi=120)


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
        except Exception as error:  # of a kernel, or of memory: the others are worth their numbers all the same
            results["failed"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        results["seconds"] = time.perf_counter() - begin
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(title_of(results, comparison), rows_of(results))
    (options.output / "results.txt").write_text(text + "\n")
    plot(results, options.output / "results.png")
    print(f"\n{text}\n\n{options.output}/results.json, results.txt, results.png")
    if results["failed"]:
        raise SystemExit(f"compare_compressors: failed, see results.json: {', '.join(results['failed'])}")
    return results


def title_of(results: Results, comparison: Comparison) -> str:
    """What the table is of."""
    options, losses = comparison.options, results["references"]
    return (
        f"{options.steps} steps of {options.batch} x {options.length:,} tokens; window {options.window}, sinks "
        f"{options.sinks}; held out {len(comparison.texts)} texts of {options.length:,} tokens, loss "
        f"{losses['full']['loss']:.4f} with full attention, {losses['window']['loss']:.4f} with the window; "
        f"{results['device']}, {options.dtype}, {results['date']}; {results['seconds']:.0f} s; +- standard error"
    )


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    add("--text", type=Path, nargs="*", default=[], help="texts to train on (default: the Python reference)")
    add("--dev", type=Path, nargs="*", default=[], help="held-out texts, with --text")
    add("--compressors", nargs="+", default=list(COMPRESSORS), metavar="NAME", help="default: those of the library")
    add("--module", nargs="*", default=[], help="Python modules that define further compressors")
    add("--device", type=device, default="cpu")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    add("--steps", type=positive, help="default: 48 on a GPU, 12 on a CPU")
    add("--batch", type=positive, help="sequences a step (default: 8; 2 on a CPU)")
    add("--micro", type=positive, help="sequences at once (default: 4; 1 on a CPU)")
    add("--length", type=positive, help="tokens in each sequence (default: 4,096; 1,024 on a CPU)")
    add("--window", type=positive, help="default: 480; 112 on a CPU")
    add("--sinks", type=count, help="default: 32; 16 on a CPU")
    add("--lr", type=number(10.0), default=2e-3)
    add("--stretches", type=positive, help="held-out texts to measure on, an even number (default: 32; 8 on a CPU)")
    add("--spans", type=count, help="repeated spans (default: 32; 4 on a CPU)")
    add("--needles", type=count, help="prompts of each needle task (default: 8; 1 on a CPU)")
    add("--decode", type=count, default=32, help="tokens to time, 8 or more, 0 for none")
    add("--compiled-decode", action="store_true", help="time the compiled step, which takes a while to compile")
    add("--autotune", action="store_true", help="let kernels find their fastest form: minutes at their first call")
    add("--seed", type=count, default=0)
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
