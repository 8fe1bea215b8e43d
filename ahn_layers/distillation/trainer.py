"""Self-distillation under transformers' Trainer: accelerate, FSDP2, DeepSpeed, progress bar, checkpoints."""

import inspect
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from ..adapter import load_adapter, save_adapter
from ..adapter_files import read
from ..description import take_free_options
from ..huggingface.call import PACKED
from ..record import find_retrofitted
from .passes import arm_losses, distillation_loss, freeze_base, gap_closed, least_capacity
from .retention import soft_slots
from .windows import SINKS, longer_windows, sample_window, use_window

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's distribution for 1, 2, ... degrees of freedom; the last one for more."""


class DistillationTrainer(Trainer):
    """A ``Trainer`` of transformers that teaches the memory to answer as full attention does (arXiv 2510.07318).

    Everything but the memory is frozen. Every step draws its own window; evaluation uses the model's. Checkpoints hold
    the memory's weights (an adapter), the optimiser and the position in the data; ``train(resume_from_checkpoint=...)``
    goes on exactly where they were written, with the slots that each layer had there. Ctrl-C or SIGTERM finishes the
    step, writes a checkpoint and returns.

    ``evaluate`` reports the loss of three arms on the tokens beyond the window (and the slots, if there are any):
    ``eval_full``, ``eval_window``, with as many tokens as window and slots together, ``eval_memory``; and
    ``eval_gap_error``, the standard error over the sequences of the gap ``eval_window - eval_full``. Where that gap is
    significant (at 95 %), it reports ``eval_gap_closed`` too (see
    [`gap_closed`][ahn_layers.distillation.gap_closed]): the share of nothing means nothing.

    Args:
        model: a retrofitted model.
        args: training arguments. ``remove_unused_columns`` is not used; examples are dictionaries with ``input_ids``,
            and with ``answers`` if tokens of answers count apart (see
            [`distillation_loss`][ahn_layers.distillation.distillation_loss]).
        kl_weight: factor of KL(teacher || student).
        ce_weight: factor of the cross-entropy on the text.
        layer_weight: factor of the error of each layer's attention output.
        answer_weight: factor of the divergence of the answers, where examples have them.
        answer_ce_weight: factor of their cross-entropy.
        random_windows: draw a window for every step, else train on the model's own.
        shortest: smallest capacity drawn, as a share of the length; see
            [`sample_window`][ahn_layers.distillation.sample_window].
        sinks: numbers of sinks drawn.
        slice_size: tokens whose logits exist at a time.
        temperature: trains the scores of slots too, by a soft choice of the kept tokens (see
            [`soft_slots`][ahn_layers.distillation.soft_slots]); None leaves the choice hard, without a gradient.
        **trainer_arguments: passed to ``Trainer``: datasets, collator, callbacks, ...

    Raises:
        ValueError: if the model has no memory to train, a temperature is given and it has no slots to train, or
            ``Trainer`` is asked for a loss, metrics or noise of its own; in training and evaluation, if a batch is
            padded or packed, or has other inputs of the model.
    """

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        layer_weight: float = 0.0,
        answer_weight: float = 1.0,
        answer_ce_weight: float = 0.0,
        random_windows: bool = True,
        shortest: float = 1 / 8,
        sinks: Sequence[int] = SINKS,
        slice_size: int = 1024,
        temperature: float | None = None,
        **trainer_arguments: Any,
    ) -> None:
        _refuse_ignored(args, trainer_arguments)
        freeze_base(model)
        if temperature is not None:
            with soft_slots(model, temperature):
                pass  # whether there are slots to train, and the temperature is one
        args.remove_unused_columns = False
        super().__init__(model, args, **trainer_arguments)
        self.weights: dict[str, Any] = {"kl_weight": kl_weight, "ce_weight": ce_weight, "layer_weight": layer_weight}
        self.weights |= {"answer_weight": answer_weight, "answer_ce_weight": answer_ce_weight}
        self.random_windows = random_windows
        self.shortest = shortest
        self.sinks = tuple(sinks)
        self.slice_size = slice_size
        self.temperature = temperature
        self.model_accepts_loss_kwargs = False  # our loss is a mean: Trainer divides it by the accumulation steps
        self.loss_is_scaled_for_ga = False
        self.add_callback(StopWhenAsked())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass, with a window that depends on the seed and the number of the step only."""
        length = inputs["input_ids"].shape[1]
        with ExitStack() as stack:
            if self.temperature is not None:
                stack.enter_context(soft_slots(model, self.temperature))
            if self.random_windows:
                step = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
                window = sample_window(length, step, shortest=self.shortest, sinks=self.sinks)
                stack.enter_context(use_window(model, *window))
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The distillation loss of a batch."""
        found = distillation_loss(
            model, texts_of(inputs, model), answers=inputs.get("answers"), slice_size=self.slice_size, **self.weights
        )
        return (found.loss, found) if return_outputs else found.loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses of the three arms, averaged over all tokens beyond the window's capacity.

        Of several datasets by name, each under its name, as in ``Trainer``.

        Raises:
            ValueError: if no sequence has a token beyond the capacity.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, dict):
            every = [self.evaluate(own, ignore_keys, f"{metric_key_prefix}_{n}") for n, own in datasets.items()]
            return {name: value for metrics in every for name, value in metrics.items()}
        was_training = self.model.training
        model = self.model_wrapped.eval()
        with longer_windows(model):
            start = least_capacity(model)
        rows = [torch.zeros(0, 4, dtype=torch.float64, device=self.args.device)]
        for batch in self.get_eval_dataloader(eval_dataset):
            ids = texts_of(batch, model).to(self.args.device)
            losses = dict.fromkeys(("full", "window", "memory"), torch.zeros(len(ids), 0, device=ids.device))
            if ids.shape[1] > start:
                how = {"start": start, "slice_size": self.slice_size}
                losses = arm_losses(model, ids, arms=["full", "memory"], **how)
                with longer_windows(model):
                    losses |= arm_losses(model, ids, arms=["window"], **how)
            sums = [losses[arm].double().sum(dim=1) for arm in ("full", "window", "memory")]
            sums.append(torch.full_like(sums[0], losses["full"].shape[1]))
            # of all processes, without the sequences that only make their numbers even
            rows.append(self.accelerator.gather_for_metrics(torch.stack(sums, dim=1)))
        model.train(was_training)
        sequences = torch.cat(rows)
        totals = sequences.sum(dim=0)
        if not totals[3]:
            raise ValueError(
                f"no sequence goes on for two tokens beyond the capacity of {start} tokens: there is nothing to "
                "compare. Evaluate on longer sequences, or retrofit with a smaller window."
            )
        full, window, memory = (totals[:3] / totals[3]).tolist()
        values = {"full": full, "window": window, "memory": memory, "gap_error": standard_error(sequences)}
        if is_significant(window - full, values["gap_error"], int((sequences[:, 3] > 0).sum())):
            values["gap_closed"] = gap_closed(full, window, memory)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in (values | {"loss": memory}).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the memory's weights as an adapter; the base is never written."""
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save or self.is_fsdp_enabled:  # sharded weights are gathered by all processes together
            save_adapter(self.model, folder)
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        load_adapter(model, resume_from_checkpoint)
        description = read(resume_from_checkpoint).description
        assert description is not None  # save_model has written it
        take_free_options(find_retrofitted(model)[0], description)

    def _load_best_model(self) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint or "")


def _refuse_ignored(args: TrainingArguments, others: Mapping[str, Any]) -> None:
    """Raise a ValueError for what ``Trainer`` knows and the distillation has no use for."""
    options = ("label_smoothing_factor", "neftune_noise_alpha", "bf16_full_eval", "fp16_full_eval")
    asked = {name: getattr(args, name, None) for name in options}
    functions = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
    asked |= {name: others.get(name) for name in functions}
    for name, value in asked.items():
        if value:
            raise ValueError(
                f"{name}={value!r}: the loss is the distance to full attention, and evaluate() reports losses, so this "
                "would be ignored, or would give teacher and student different noise. Leave it out, or write a loop "
                "with distillation_loss(...)."
            )


def texts_of(batch: Mapping[str, Any], model: nn.Module) -> Int[Tensor, "b t"]:
    """The texts of a batch. Whatever else a collator puts into it for the model has to say nothing.

    Raises:
        ValueError: if something in it would change what the model computes, or what is learned.
    """
    ids = batch["input_ids"]
    plain = {"attention_mask": torch.ones_like(ids), "labels": ids, "position_ids": torch.arange(ids.shape[1])}
    heeded = {*inspect.signature(type(find_retrofitted(model)[0]).forward).parameters, *PACKED} - {"input_ids"}
    for name, u in batch.items():
        if name not in heeded or not isinstance(u, Tensor):
            continue
        if name in plain and u.shape[-1:] == ids.shape[-1:] and bool((u == plain[name].to(u.device)).all()):
            continue
        raise ValueError(
            f"the batch holds {name} {tuple(u.shape)}, which the distillation would ignore: expected input_ids alone, "
            "each row one text without padding, and answers (a boolean mask) where some tokens count more. Cut the "
            "texts to one length, and leave padding, packing and labels of your own out of the collator."
        )
    return ids  # type: ignore[no-any-return]


def standard_error(sequences: Tensor) -> float:
    """Of the mean gap between window and full attention; infinite for a single sequence.

    Args:
        sequences: sums of the losses of full attention, window and memory, and the number of tokens, shape (n, 4).
    """
    counted = sequences[sequences[:, 3] > 0]
    if len(counted) < 2:
        return float("inf")
    gaps = (counted[:, 1] - counted[:, 0]) / counted[:, 3]
    return float(gaps.std() / len(counted) ** 0.5)


def is_significant(gap: float, error: float, count: int) -> bool:
    """Whether a gap is positive at the 95 % level, by Student's distribution."""
    return count > 1 and gap > _STUDENT[min(count - 1, len(_STUDENT)) - 1] * error


class StopWhenAsked(TrainerCallback):
    """At the first SIGINT or SIGTERM: finish the step, write a checkpoint, stop. At the second: as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Listen, if this is the main thread."""
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._before[name] = signal.signal(name, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        print("\nfinishing the step and writing a checkpoint; once more to stop at once", flush=True)
        self.asked = True
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop all processes if one of them was asked to."""
        asked = self.asked
        if args.world_size > 1:
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            asked = bool(flag)
        if asked:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Listen no longer."""
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
