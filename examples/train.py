"""Train the memory of a model by self-distillation, and write it as an adapter.

    python examples/train.py --text books/train --dev books/dev --output my_adapter
    python examples/train.py --dataset Salesforce/wikitext --config wikitext-103-raw-v1 --streaming --output my_adapter
    accelerate launch --multi_gpu examples/train.py --text books/train --output my_adapter            # several GPUs
    accelerate launch --config_file fsdp.yaml examples/train.py --text books/train --output my_adapter    # FSDP2

The base model is frozen. With ``--slots`` the memory keeps evicted tokens, and learns which: ``--score-steps`` and
``--retrieval-steps`` are the first stages of ``learn_to_recall.py``, the steps the last one. Ctrl-C finishes the step
and writes a checkpoint; ``--resume`` goes on from the last one.
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
from typing import Any

import torch
import transformers
from _common import Refused, find_adapter, give_memory, user_errors
from arms import slots_of
from gap import Difference
from planting import PlantedCrops
from smollm2 import load_causal_lm, load_tokenizer
from stages import STAGE, answer_groups, find_heads, learn_attention, parameters_of, tensors
from texts import Crops, read_dataset, read_texts, stretches, tokenize
from torch import Tensor
from tqdm import tqdm
from train_options import SINKS, WINDOW, check_dev_length, parse
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import ahn_layers
from ahn_layers import SalientSlots, adapter_parameters, memory_report
from ahn_layers.distillation import (
    DistillationTrainer,
    align_layers,
    compile_layers,
    freeze_base,
    sample_window,
    set_rates,
    set_slots,
    settle_rates,
    use_window,
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure, write the adapter; returns what is written to ``training.json``."""
    options = parse(arguments, __doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    with user_errors("train"):
        resume, adapter = last_checkpoint(options), find_adapter(options.start_from, "--start-from")
        tokenizer = load_tokenizer(options.model)
        documents, dev = load_data(tokenizer, options)
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
            eviction=SalientSlots(options.slots) if options.slots else None,
            default=(WINDOW, SINKS),
        )
        options.slots = slots_of(model)
        check_stages(options)
        train = crops_of(documents, tokenizer, options)
        check_dev_length(options, max(u.capacity for u in model.hippocampus.windows.values()) + options.slots)
    parameters = freeze_base(model)
    half = dtype in (torch.bfloat16, torch.float16)
    if (device == "cuda" and half and not options.slots) if options.compile is None else options.compile:
        compile_layers(model)
    print(memory_report(model).splitlines()[-1])

    trainer = make_trainer(model, train, dev, options, device)
    start = time.time()
    if options.align_steps and not options.resume:
        align(model.to(trainer.args.device), train, options)
    if options.slots:
        prepare_slots(model.to(trainer.args.device), trainer, documents, tokenizer, options, resumed=resume is not None)
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.time() - start
    if options.slots and options.teach != "compressor":
        settle_rates(model)
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


def load_data(tokenizer: Any, options: argparse.Namespace) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Texts to train on, and stretches to measure on (none without ``--dev``)."""
    held_out = read_texts(options.dev, options.column)
    if options.dataset:
        source = (options.dataset, options.config, options.split, options.column, options.streaming)
        texts: Iterable[str] = read_dataset(*source)
    else:
        texts = read_texts(options.text, options.column)
    count = (options.steps * options.accumulate + options.score_steps) * options.batch * world_size()
    enough = count * options.length if options.streaming else float("inf")
    documents = tokenize(tokenizer, texts, "training text", enough)
    Crops(documents, options.length, 1)  # refuses texts that are too short, before the model is loaded
    if not options.dev:
        return documents, []
    held_out = tokenize(tokenizer, held_out, "held-out text")
    return documents, stretches(held_out, options.dev_length, options.dev_count, tokenizer("").input_ids)


def crops_of(
    documents: list[Tensor], tokenizer: Any, options: argparse.Namespace, steps: int | None = None, stage: int = 0
) -> Crops | PlantedCrops:
    """Random crops to train on, for memories with slots with facts in them; others for each stage.

    Args:
        documents: the texts.
        tokenizer: theirs.
        options: the command line.
        steps: how many they have to be enough for, those of the command line by default.
        stage: 0 for the steps of the trainer.
    """
    count = (options.steps * options.accumulate if steps is None else steps) * options.batch * world_size()
    if not options.slots:
        return Crops(documents, options.length, count, copies=options.copies, seed=options.seed)
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # noqa: E731
    facts, begin, seed = tuple(options.facts), tokenizer("").input_ids, 3 * options.seed + stage
    return PlantedCrops(documents, options.length, count, encode, facts=facts, begin=begin, seed=seed)


def prepare_slots(
    model: Any,
    trainer: DistillationTrainer,
    documents: list[Tensor],
    tokenizer: Any,
    options: argparse.Namespace,
    *,
    resumed: bool,
) -> None:
    """The first stages of a memory with slots, and what the trainer's steps change."""
    if not resumed:
        how: dict[str, Any] = {"batch": options.batch, "device": trainer.args.device}
        if options.retrieval_steps:
            crops = crops_of(documents, tokenizer, options, options.retrieval_steps, stage=2)
            found = find_heads(model, "where facts are looked up", crops, **how)
            if found is not None:
                set_rates(model, found, coverage=options.coverage)
                if options.slots_by_layer:
                    print(f"slots: {set_slots(model, found)}")
        if options.score_steps:
            crops = crops_of(documents, tokenizer, options, options.score_steps, stage=1)
            learn_attention(model, "attention to come", crops, folder=options.output / "checkpoints", **how)
    idle = {"both": (), "scores": ("others",), "compressor": ("scores", "rates")}[options.teach]
    for kind in idle:
        for parameter in parameters_of(model)[kind]:
            parameter.requires_grad_(False)
    groups = answer_groups(model, decay=0.01, lr=options.lr)
    if not groups:
        raise Refused(f"train: --teach {options.teach}: this memory has nothing of the kind.")
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups})


def last_checkpoint(options: argparse.Namespace) -> str | None:
    """Where ``--resume`` goes on, None without it."""
    if not options.resume:
        return None
    folder = options.output / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None and (folder / STAGE).exists():  # of a first stage, which goes on by itself
        return None
    if found is None:
        raise FileNotFoundError(f"--resume: no checkpoint in {folder}. Leave --resume out to begin.")
    return str(found)


def check_stages(options: argparse.Namespace) -> None:
    """Raise if there is a stage that this memory does not have."""
    if options.align_steps and options.slots:
        raise ValueError("--align-steps: not for memories with slots. Use --score-steps.")
    unused = options.without_slots if options.slots else options.for_slots
    if unused:
        kind = "with slots, which is trained on its own window" if options.slots else "without slots"
        raise ValueError(f"{', '.join(unused)}: not for a memory {kind}. Leave it out.")
    if (options.score_steps or options.retrieval_steps or options.teach != "both") and not options.slots:
        raise ValueError("--score-steps, --retrieval-steps, --teach: this memory has no slots. Give some by --slots.")


def world_size() -> int:
    """Number of processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_trainer(
    model: Any, train: Crops | PlantedCrops, dev: list[dict[str, Tensor]], options: argparse.Namespace, device: str
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
        answer_weight=1 - options.truth,
        answer_ce_weight=options.truth,
        layer_weight=options.layer_loss,
        shortest=options.shortest,
        sinks=options.draw_sinks,
        random_windows=not options.slots,
        temperature=options.temperature if options.slots and options.teach != "compressor" else None,
        data_collator=tensors,
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


if __name__ == "__main__":
    main()
