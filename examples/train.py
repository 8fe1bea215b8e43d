"""Train the memory of a model by self-distillation, and write it as an adapter.

    python examples/train.py --text books/train --dev books/dev --output my_adapter
    python examples/train.py --dataset Salesforce/wikitext --config wikitext-103-raw-v1 --streaming --output my_adapter
    accelerate launch --multi_gpu examples/train.py --text books/train --output my_adapter            # several GPUs
    accelerate launch --config_file fsdp.yaml examples/train.py --text books/train --output my_adapter    # FSDP2

The base model is frozen. Ctrl-C finishes the step and writes a checkpoint; ``--resume`` goes on from the last one.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from _common import add_memory_options, count, find_adapter, give_memory, number, positive
from gap import Difference
from smollm2 import load_causal_lm, load_tokenizer
from texts import Crops, read_dataset, read_texts, stretches, tokenize
from torch import Tensor
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import ahn_layers
from ahn_layers import adapter_parameters, memory_report
from ahn_layers.distillation import (
    DistillationTrainer,
    align_layers,
    compile_layers,
    freeze_base,
    sample_window,
    use_window,
)

WINDOW, SINKS = 480, 32
"""The window of the adapter. Each training step draws its own."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure, write the adapter; returns what is written to ``training.json``."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    try:
        resume, adapter = last_checkpoint(options), find_adapter(options.start_from)
        train, dev = load_data(load_tokenizer(options.model), options)
        model, _ = load_causal_lm(options.model, dtype)
        torch.manual_seed(options.seed)
        give_memory(
            model,
            adapter,
            window=options.window,
            sinks=options.sinks,
            compressor=options.compressor,
            memory_positions=options.memory_positions,
            shared_state=options.shared_state or None,
            default=(WINDOW, SINKS),
        )
        check_dev_length(options, model.hippocampus.window.capacity)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"train: {error}") from None
    parameters = freeze_base(model)
    half = dtype in (torch.bfloat16, torch.float16)
    if (device == "cuda" and half) if options.compile is None else options.compile:
        compile_layers(model)
    print(memory_report(model).splitlines()[-1])

    trainer = make_trainer(model, train, dev, options, device)
    start = time.time()
    if options.align_steps and not options.resume:
        align(model.to(trainer.args.device), train, options)
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.time() - start
    with torch.compiler.set_stance("force_eager"):  # other shapes: compiling them takes longer than they do
        metrics = judge(trainer.evaluate(), len(dev)) if dev else {}

    for parameter in parameters if not trainer.is_fsdp_enabled else []:
        parameter.data = parameter.data.bfloat16()
    trainer.save_model(str(options.output))
    (options.output / "training_args.bin").unlink(missing_ok=True)
    report = describe(options, trainer, metrics, seconds)
    if trainer.is_world_process_zero():
        (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps({name: value for name, value in report.items() if name != "log"}, indent=2))
        print(f"adapter: {options.output}")
    return report


def load_data(tokenizer: Any, options: argparse.Namespace) -> tuple[Crops, list[dict[str, Tensor]]]:
    """Random crops to train on, and stretches to measure on (none without ``--dev``)."""
    held_out = read_texts(options.dev, options.column)
    if options.dataset:
        source = (options.dataset, options.config, options.split, options.column, options.streaming)
        texts: Iterable[str] = read_dataset(*source)
    else:
        texts = read_texts(options.text, options.column)
    count = options.steps * options.batch * options.accumulate * world_size()
    enough = count * options.length if options.streaming else float("inf")
    documents = tokenize(tokenizer, texts, "training text", enough)
    train = Crops(documents, options.length, count, copies=options.copies, seed=options.seed)
    if not options.dev:
        return train, []
    return train, stretches(tokenize(tokenizer, held_out, "held-out text"), options.dev_length, options.dev_count)


def last_checkpoint(options: argparse.Namespace) -> str | None:
    """Where ``--resume`` goes on, None without it."""
    if not options.resume:
        return None
    folder = options.output / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise FileNotFoundError(f"--resume: no checkpoint in {folder}. Leave --resume out to begin.")
    return str(found)


def check_dev_length(options: argparse.Namespace, capacity: int) -> None:
    """Raise unless the texts of ``--dev`` go on beyond the window."""
    if options.dev and options.dev_length < capacity + 2:
        raise ValueError(
            f"--dev-length {options.dev_length}: expected at least {capacity + 2}, since the window holds {capacity}."
        )


def world_size() -> int:
    """Number of processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_trainer(
    model: Any, train: Crops, dev: list[dict[str, Tensor]], options: argparse.Namespace, device: str
) -> DistillationTrainer:
    """The trainer with the paper's optimiser: AdamW, 10 % warm-up, cosine, weight decay 0.1."""
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # renamed in 5.24
    checkpointing = {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        weight_decay=0.1,
        logging_steps=max(1, min(10, options.steps // 20)),
        eval_strategy="steps" if dev and options.eval_every else "no",
        eval_steps=options.eval_every or None,
        save_steps=options.save_every,
        save_total_limit=2,
        ddp_find_unused_parameters=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        seed=options.seed,
        report_to="none",
        **(checkpointing if options.gradient_checkpointing else {}),
    )
    return DistillationTrainer(
        model,
        arguments,
        ce_weight=options.ce,
        layer_weight=options.layer_loss,
        shortest=options.shortest,
        sinks=options.draw_sinks,
        train_dataset=train,
        eval_dataset=dev or None,
    )


def align(model: Any, train: Crops, options: argparse.Namespace) -> None:
    """The first stage: each layer on its own, on the teacher's hidden states. One process, or the same in each."""
    parameters = [p for _, p in adapter_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.align_steps, pct_start=0.1)
    crops = Crops(
        train.documents,
        options.length,
        options.align_steps * options.batch,
        copies=train.copies,
        seed=-1 - options.seed,
    )
    device = parameters[0].device
    bar = tqdm(range(options.align_steps), desc="alignment", unit=" steps")
    for step in bar:
        ids = torch.stack([crops[step * options.batch + i]["input_ids"] for i in range(options.batch)]).to(device)
        generator = torch.Generator().manual_seed(options.seed * 7919 + step)
        with use_window(
            model, *sample_window(options.length, generator, shortest=options.shortest, sinks=options.draw_sinks)
        ):
            errors = align_layers(model, ids)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(error=f"{errors.mean():.4f}")


def judge(metrics: dict[str, float], texts: int) -> dict[str, Any]:
    """The metrics, without a share of a gap that is not significant."""
    gap = Difference(metrics["eval_window"] - metrics["eval_full"], metrics["eval_gap_error"], texts)
    share = metrics.get("eval_gap_closed") if gap.sign > 0 else None
    error = gap.error if math.isfinite(gap.error) else None
    return {**metrics, "eval_gap_closed": share, "eval_gap_error": error, "eval_gap": gap.verdict}


def describe(
    options: argparse.Namespace, trainer: DistillationTrainer, metrics: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What a model card needs: data, steps, tokens, losses, hardware, command, date."""
    sequences = trainer.state.global_step * options.batch * options.accumulate * trainer.args.world_size
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "model": options.model or "SmolLM2-135M-Instruct",
        "command": shlex.join(["python", "examples/train.py", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": f"{trainer.args.world_size} x {gpu}"
        if gpu
        else f"{torch.get_num_threads()} threads of {platform.machine()}",
        "versions": {
            "ahn_layers": ahn_layers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "steps": trainer.state.global_step,
        "tokens": sequences * options.length,
        "seconds": round(seconds, 1),
        "metrics": metrics,
        "log": trainer.state.log_history,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    add("--text", type=Path, nargs="+", default=[], help="files (.txt, .md, .jsonl) or folders of them, to train on")
    add("--dataset", help="hub id, folder or file (.jsonl, .json, .csv, .parquet) for datasets, instead of --text")
    add("--config", help="configuration of the dataset, if it has several")
    add("--split", default="train", help="split of the dataset")
    add("--column", default="text", help="column of the dataset, or field of .jsonl files, that holds the text")
    add("--streaming", action="store_true", help="read no more of the dataset than the steps need")
    add("--dev", type=Path, nargs="+", default=[], help="files or folders, as for --text, to measure on")
    add("--dev-length", type=positive, default=8192)
    add("--dev-count", type=positive, default=8, help="stretches to measure on")
    add_memory_options(parser, WINDOW, SINKS)
    add("--shared-state", action="store_true", help="one state per key/value head")
    add("--memory-positions", choices=["absolute", "none"], help="rotated keys in the memory (default), or not")
    add("--start-from", help="adapter to go on from, with a new schedule, instead of an empty memory")
    add("--steps", type=positive, default=200)
    add("--align-steps", type=count, default=0, help="steps of the cheap first stage, layer by layer")
    add("--length", type=positive, default=4096, help="tokens in each training sequence")
    add("--batch", type=positive, default=8, help="sequences a step and process")
    add("--accumulate", type=positive, default=1, help="batches a step")
    add("--lr", type=number(10.0), default=2e-3)
    add("--ce", type=number(1000.0), default=0.0, help="weight of the cross-entropy")
    add("--layer-loss", type=number(1000.0), default=0.0, help="weight of the error of each layer's attention output")
    add("--shortest", type=number(0.99), default=0.0, help="smallest capacity drawn, as a share of the length")
    add("--draw-sinks", type=count, nargs="+", default=[4, 16, 32, 64, 128], help="numbers of sinks to draw from")
    add("--copies", type=number(1.0), default=0.5, help="share of sequences with repeated spans")
    add("--gradient-checkpointing", action="store_true")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the layers; default: in half precision on a GPU",
    )
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--eval-every", type=count, default=0)
    add("--save-every", type=positive, default=100)
    add("--seed", type=count, default=0)
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--output", type=Path, required=True, help="folder for the adapter and its checkpoints")
    options = parser.parse_args(arguments)
    if bool(options.text) == bool(options.dataset):
        parser.error("give one of --text and --dataset")
    if not options.dataset and (options.config or options.streaming or options.split != "train"):
        parser.error("--config, --split and --streaming are for --dataset")
    if options.eval_every and not options.dev:
        parser.error("--eval-every: give texts to measure on, by --dev")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output}: a file, expected a folder")
    try:
        sinks = SINKS if options.sinks is None else options.sinks
        check_dev_length(options, 1 if options.start_from else (options.window or WINDOW) + sinks)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    main()
