"""Train the memory of a model by self-distillation, and write it as an adapter.

    python examples/train.py --text books/train --dev books/dev --output my_adapter
    accelerate launch examples/train.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset wikitext ...   # several GPUs
    accelerate launch --config_file fsdp.yaml examples/train.py ...                             # sharded with FSDP2

The base model is frozen. Ctrl-C finishes the step and writes a checkpoint; ``--resume`` goes on from the last one.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from smollm2 import load_causal_lm
from texts import Crops, read_dataset, read_texts, stretches, tokenize
from torch import Tensor
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import ahn_layers
from ahn_layers import Compressor, adapter_parameters, load_adapter, memory_report, retrofit
from ahn_layers.distillation import (
    DistillationTrainer,
    align_layers,
    compile_layers,
    freeze_base,
    sample_window,
    use_window,
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure, write the adapter; returns what is written to ``training.json``."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    model, tokenizer = load_causal_lm(options.model, dtype)
    torch.manual_seed(options.seed)
    extra: dict[str, Any] = {"shared_state": True} if options.shared_state else {}
    extra |= {"window_size": options.window, "num_sinks": options.sinks}
    retrofit(model, Compressor.by_name[options.compressor], memory_positions=options.memory_positions, **extra)
    if options.start_from:
        load_adapter(model, options.start_from)
    parameters = freeze_base(model)
    half = dtype in (torch.bfloat16, torch.float16)
    if (device == "cuda" and half) if options.compile is None else options.compile:
        compile_layers(model)
    print(memory_report(model).splitlines()[-1])

    train, dev = load_data(tokenizer, options)
    trainer = make_trainer(model, train, dev, options, device)
    start = time.time()
    if options.align_steps and not options.resume:
        align(model.to(trainer.args.device), train, options)
    resume = get_last_checkpoint(str(options.output / "checkpoints")) if options.resume else None
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.time() - start
    with torch.compiler.set_stance("force_eager"):  # other shapes: compiling them takes longer than they do
        metrics = trainer.evaluate() if dev else {}

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
    texts = (
        read_dataset(options.dataset, options.split, options.column) if options.dataset else read_texts(options.text)
    )
    documents = tokenize(tokenizer, texts, "training text")
    world = int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else world_size()
    count = options.steps * options.batch * options.accumulate * world
    train = Crops(documents, options.length, count, copies=options.copies, seed=options.seed)
    if not options.dev:
        return train, []
    held_out = tokenize(tokenizer, read_texts(options.dev), "held-out text")
    return train, stretches(held_out, options.dev_length, options.dev_count)


def world_size() -> int:
    """Number of processes that a launcher has started."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def make_trainer(
    model: Any, train: Crops, dev: list[dict[str, Tensor]], options: argparse.Namespace, device: str
) -> DistillationTrainer:
    """The trainer with the paper's optimiser: AdamW, 10 % warm-up, cosine, weight decay 0.1."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
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
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        use_cpu=device == "cpu",
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


def describe(
    options: argparse.Namespace, trainer: DistillationTrainer, metrics: dict[str, float], seconds: float
) -> dict[str, Any]:
    """What a model card needs: data, steps, tokens, losses, hardware, command, date."""
    sequences = trainer.state.global_step * options.batch * options.accumulate * trainer.args.world_size
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "model": options.model or "SmolLM2-135M-Instruct",
        "command": shlex.join(["python", "examples/train.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
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
    add("--text", type=Path, nargs="+", default=[], help="text files, or folders of them, to train on")
    add("--dataset", help="a name for datasets.load_dataset, instead of --text")
    add("--split", default="train", help="split of the dataset")
    add("--column", default="text", help="column of the dataset")
    add("--dev", type=Path, nargs="+", default=[], help="text files, or folders of them, to measure on")
    add("--dev-length", type=int, default=8192)
    add("--dev-count", type=int, default=8, help="stretches to measure on")
    add("--compressor", choices=sorted(Compressor.by_name), default="GatedDeltaNet")
    add("--shared-state", action="store_true", help="one state per key/value head")
    add(
        "--memory-positions",
        choices=["absolute", "none"],
        default="absolute",
        help="rotated keys in the memory, or not",
    )
    add("--start-from", type=Path, help="adapter to go on from, with a new schedule, instead of an empty memory")
    add("--window", type=int, default=480, help="window size of the adapter; training draws its own")
    add("--sinks", type=int, default=32)
    add("--steps", type=int, default=200)
    add("--align-steps", type=int, default=0, help="steps of the cheap first stage, layer by layer")
    add("--length", type=int, default=4096, help="tokens in each training sequence")
    add("--batch", type=int, default=8, help="sequences a step and process")
    add("--accumulate", type=int, default=1, help="batches a step")
    add("--lr", type=float, default=2e-3)
    add("--ce", type=float, default=0.0, help="weight of the cross-entropy")
    add("--layer-loss", type=float, default=0.0, help="weight of the error of each layer's attention output")
    add("--shortest", type=float, default=0.0, help="smallest capacity drawn, as a share of the length")
    add("--draw-sinks", type=int, nargs="+", default=[4, 16, 32, 64, 128], help="numbers of sinks to draw from")
    add("--copies", type=float, default=0.5, help="share of sequences with repeated spans")
    add("--gradient-checkpointing", action="store_true")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the layers; default: in half precision on a GPU",
    )
    add("--dtype", help="of the base; default: bfloat16 on a GPU, float32 on a CPU")
    add("--eval-every", type=int, default=0)
    add("--save-every", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--output", type=Path, required=True, help="folder for the adapter and its checkpoints")
    options = parser.parse_args(arguments)
    if not options.text and not options.dataset:
        parser.error("give --text or --dataset")
    return options


if __name__ == "__main__":
    main()
