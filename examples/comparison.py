"""What ``compare_compressors.py`` does with each compressor: the same training, the same questions."""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from arms import arm_bytes, use_arm
from gap import SEGMENT, measure, measure_spans, swapped_memories
from gpu_measurements import Results, forget_peak, synchronize, time_tokens
from needles import make, score_all
from quickstart import load_text
from smollm2 import load_causal_lm, load_tokenizer
from texts import Crops, read_texts, stretches, tokenize
from torch import Tensor
from tqdm import tqdm

import ahn_layers
from ahn_layers import Compressor, adapter_parameters, restore, retrofit
from ahn_layers.distillation import arm_losses, freeze_base, output_head, sliced_loss

TASKS = ("RULER single", "RULER multi-key", "pass key")


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
        """Hidden states of the base model beyond the window, of each training batch."""
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
