"""Trains whatever a form has made trainable, on packed records.

Knows: one optimiser step and everything around it: mixed precision, accumulation, schedules, clipping, the development
loss, the best checkpoint, early stop, checkpoints that survive being killed, the end at Ctrl-C, non-finite losses.
Built on ``transformers.Trainer``; only the loss (through the head on response positions alone), the checkpoints' content
(what trains, nothing else) and their atomicity are ours.
Does not know: which weights train, in which form, or how the records were made.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from selectune.data.packing import LikeLengths, stack
from selectune.errors import UserError, out_of_memory, unwritable
from selectune.meter import Meter
from selectune.models import Anatomy
from selectune.models.head import SplitModel
from selectune.parameters import Selection
from selectune.recipe import TrainingRecipe
from selectune.run import write_atomically
from selectune.training import processes
from selectune.training.acting import Acting
from selectune.training.allocator import keep_freed_memory
from selectune.training.loss import LossOfModel
from selectune.training.memory import gradients_and_states, held_at_once
from selectune.training.policies.policy import Policy, Stage
from selectune.training.prefix import PrefixCache, frozen_blocks
from selectune.training.processes import Interrupted
from selectune.training.progress import EndAtStep, ProgressAndMetrics
from selectune.training.steps import accumulation, intervals
from selectune.training.trainable import Trainable

WEIGHTS = "trained.safetensors"
_OPTIMISERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "adafactor": "adafactor", "lion": "lion_32bit",
               "lion_8bit": "lion_8bit", "sgd": "sgd"}  # fmt: skip
"""Ours -> transformers' name."""
COMPLETE = "complete"
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training run."""

    steps: int
    best_step: int | None
    dev_loss: float | None
    """Of the best checkpoint, where a run ends with it, else of the last evaluation."""
    skipped_tokens: int = 0
    """Tokens whose way through the frozen first blocks was known."""
    touched: Selection | None = None
    """Which weights may have changed, where a policy went beyond those that were chosen."""


class SelectiveTrainer(Trainer):
    """``transformers.Trainer`` that computes only what is used and saves only what trains."""

    model: LossOfModel

    def __init__(
        self, model: LossOfModel, learning_rate_hint: str, meter: Meter, step_in_backward: bool, acting: Acting, **kwargs: Any
    ) -> None:
        self._step_in_backward, self._acting = step_in_backward, acting
        acting.stage.decays = lambda: set(self.get_decay_parameter_names(self.model))
        super().__init__(model=model, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the response tokens of the whole batch
        self._meter, self._learning_rate_hint = meter, learning_rate_hint

    def keep_prefix(self, rows: int, folder: Path) -> None:
        """Compute the frozen beginning of the model once for each sequence, where there is one."""
        blocks, frozen = frozen_blocks(self.model.causal)
        lengths = set(self._lengths())
        if frozen and len(lengths) == 1:
            shared = folder / "prefix" if processes.count() > 1 else None
            if shared and processes.first():
                shutil.rmtree(shared, ignore_errors=True)
                shared.mkdir(parents=True)
            processes.wait()
            batch = self.args.per_device_train_batch_size
            self.model.prefix = PrefixCache(blocks, frozen, rows, batch, folder, shared=shared)

    def create_optimizer(self, model: Any = None) -> Any:
        made = super().create_optimizer(model)
        if self._step_in_backward:
            for value in self.model.parameters():
                if value.requires_grad:
                    value.register_post_accumulate_grad_hook(lambda value: _step_of_one(made, value))
        return made

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        policy = self._acting.policy
        if not policy.own_gradients:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            with torch.no_grad():
                loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        if self.accelerator.sync_gradients:
            with torch.no_grad():
                policy.gradients(self._acting.stage)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        count = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"][:, 1:] != -100).sum()
        self._acting.stage.tokens = count / self.accelerator.num_processes
        return self._acting.policy.loss(self._acting.stage, inputs, lambda other=inputs: self._loss(model, other, count))

    def _loss(self, model: nn.Module, inputs: Any, count: Any) -> Tensor:
        total: Tensor = model(**inputs)
        if not torch.isfinite(total):
            raise UserError(
                f"the loss became {total.item()} at step {self.state.global_step + 1}; {_diagnose(self.model.model)}",
                field="training.learning_rate",
                expected=f"a finite loss (the learning rate was {self._learning_rate_hint})",
                mend="halve the learning rate or lengthen the warm-up, then `selectune resume`; the last checkpoint is kept",
            )
        self._meter.count(forward=inputs["input_ids"].numel(), backward=inputs["input_ids"].numel() * total.requires_grad)
        return total / count * self.accelerator.num_processes  # whose gradients are averaged

    def _lengths(self) -> list[int]:
        rows: Any = self.train_dataset
        return [len(row["input_ids"]) for row in rows]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = self._lengths()
        if len(set(lengths)) > 1:
            return LikeLengths(lengths, self.args.per_device_train_batch_size, int(self.args.data_seed or 0))
        return super()._get_train_sampler(train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Every sequence once, each process its share."""
        rows: Any = self.eval_dataset
        share = rows[self.args.process_index :: self.args.world_size]
        return DataLoader(share, batch_size=self.args.per_device_eval_batch_size, collate_fn=stack)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Measure the development loss: the mean over all its response tokens."""
        total, count = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
                total += self.model(**inputs).item()
                count += int((inputs["labels"][:, 1:] != -100).sum())
                self._meter.count(forward=inputs["input_ids"].numel())
        found = self.accelerator.reduce(torch.tensor([total, count], dtype=torch.float64, device=self.args.device))
        return EvalLoopOutput(np.empty(0), None, {"eval_loss": float(found[0] / found[1].clamp(min=1))}, int(found[1]))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        tensors = trained_tensors(self.model.model)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS)
            self._acting.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if (folder / COMPLETE).exists():
            return
        try:
            super()._save_checkpoint(model, trial)
            processes.wait()
            if self.args.should_save:
                write_atomically(folder / COMPLETE, "")
            processes.wait()
        except Exception as error:
            if (why := unwritable(error)) is None:
                raise
            raise UserError(
                f"a checkpoint could not be written ({why})", file=folder,
                mend="free space, then `selectune resume`; the checkpoint before it is kept",
            ) from None  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._acting.load(Path(resume_from_checkpoint))
        load_trained_tensors(self.model.model, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        self._acting.load(folder)
        load_trained_tensors(self.model.model, folder / WEIGHTS)


def _step_of_one(optimiser: Any, value: Tensor) -> None:
    """Step a parameter as soon as its gradient is there, and free the gradient; no other has one at that moment."""
    optimiser.step()
    value.grad = None


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter that trains, by name; one that is spread over processes is put together."""
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {name: getattr(value, "full_tensor", lambda v=value: v)().contiguous() for name, value in trained.items()}


@torch.no_grad()
def load_trained_tensors(model: nn.Module, file: Path) -> None:
    """Put saved tensors back into the parameters that train."""
    saved = load_file(file)
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.copy_(saved[name])


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; incomplete ones, left by a kill, are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            complete.append(path)
        elif processes.first():
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def train(
    made: Trainable,
    recipe: TrainingRecipe,
    *,
    steps: int,
    learning_rate: float,
    meter: Meter,
    run_name: str = "selectune",
    quiet: bool = False,
    watching: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train in place, resuming from the newest complete checkpoint in its folder.

    Args:
        made: the model and what it sees. recipe: with a number of ``micro_batch_sequences``; whoever plans a run decides ``auto``.
        steps: optimiser steps, see :func:`plan_steps`. watching: callbacks beside those of the trainer.

    Raises:
        UserError: the loss is not finite, memory or disk is too small.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    keep_freed_memory()
    model, policy, folder = made.model, made.policy, made.checkpoints
    recipe = policy.settings(recipe)
    _check_room(model, recipe, policy, folder)
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)
    micro = recipe.micro_batch_sequences
    assert micro != "auto"
    passes = accumulation(recipe, micro, processes.count())
    evaluate_every, save_every = intervals(recipe, steps, len(made.dev_rows))
    keep_best = bool(recipe.keep_best and evaluate_every)
    schedule, schedule_options = _SCHEDULES.get(recipe.schedule, recipe.schedule), {}
    if recipe.schedule == "warmup_stable_decay":
        schedule_options = {"num_decay_steps": max(1, round(steps * recipe.decay_fraction))}
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=run_name,
        seed=made.seed,
        data_seed=made.seed,
        use_cpu=next(model.parameters()).device.type == "cpu",
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=passes,
        optim=_OPTIMISERS[recipe.optimiser],
        learning_rate=learning_rate,
        adam_beta1=recipe.adam_betas[0],
        adam_beta2=recipe.adam_betas[1],
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip_norm or 0.0,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=round(steps * recipe.warmup_fraction),
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        activation_checkpointing=recipe.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=recipe.report_to or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=bool(any(block.experts for block in Anatomy.of(SplitModel(model).causal).blocks)),
        ddp_broadcast_buffers=False,
    )
    if arguments.n_gpu > 1:  # one process trains on one GPU; else every batch would be shared out among all
        arguments._n_gpu = 1
    numbered = [{**row, "row": torch.tensor(number)} for number, row in enumerate([*made.train_rows, *made.dev_rows])]
    step_tokens = made.tokens / len(made.train_rows) * recipe.batch_sequences
    bar = ProgressAndMetrics(made.folder / "metrics.jsonl", step_tokens, quiet, processes.first())
    callbacks: list[TrainerCallback] = [bar, *watching]
    if recipe.early_stop and keep_best:
        callbacks.append(EarlyStoppingCallback(recipe.early_stop))
    if recipe.save_minutes or recipe.save_steps:
        callbacks.append(_SaveEvery((recipe.save_minutes or 0) * 60, recipe.save_steps))
    trainer: Any = None
    try:
        with EndAtStep() as interruption:
            whole = LossOfModel(model, made.objective, made.bfloat16)
            stage = Stage(whole, made.seed, steps, meter, made.train_rows, made.context, recipe.batch_sequences)
            acting = Acting(policy, stage)
            trainer = SelectiveTrainer(
                whole,
                f"{learning_rate:g}",
                meter,
                recipe.step_in_backward,
                acting,
                args=arguments,
                train_dataset=numbered[: len(made.train_rows)],
                eval_dataset=numbered[len(made.train_rows) :] or None,
                data_collator=stack,
                callbacks=[*callbacks, acting, interruption],
            )
            trainer.remove_callback(PrinterCallback)
            if recipe.prefix_cache and not recipe.gradient_checkpointing:
                trainer.keep_prefix(len(numbered), folder)
            checkpoint = last_checkpoint(folder)
            processes.wait()
            with trainer.model.attending(made.train_rows):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise UserError(
                "out of memory while training",
                field="training.micro_batch_sequences",
                mend="halve it (the batch stays the same size), or lower data.max_length, then `selectune resume`",
            ) from None
        raise
    finally:
        bar.stop()
        prefix = trainer.model.prefix if trainer is not None else None
        if prefix is not None:
            prefix.close()
    state = trainer.state
    if interruption.asked and state.global_step < steps:
        raise Interrupted(state.global_step, steps)
    losses = [float(log["eval_loss"]) for log in state.log_history if "eval_loss" in log]
    best = state.best_global_step  # one of a finite loss
    dev_loss = float(state.best_metric) if best else losses[-1] if losses else None
    _check_alike(trainer.accelerator, model)
    skipped = _add_up(trainer.accelerator, meter, prefix.skipped_tokens if prefix else 0)
    touched = policy.touched(acting.stage)
    return TrainingResult(state.global_step, best, dev_loss, skipped, touched)


def _add_up(accelerator: Any, meter: Meter, skipped: int) -> int:
    """Put the costs of all processes into each one's account; return the tokens skipped by all."""
    if accelerator.num_processes == 1:
        return skipped
    meter.memory()
    cost = meter.cost
    mine = [cost.forward_tokens, cost.backward_tokens, cost.peak_memory_bytes, skipped]
    found = accelerator.reduce(torch.tensor(mine, device=accelerator.device))
    cost.forward_tokens, cost.backward_tokens, cost.peak_memory_bytes, skipped = (int(value) for value in found)
    return skipped


def _check_alike(accelerator: Any, model: nn.Module) -> None:
    """Refuse what several processes made of the weights where they have drifted apart: each has updated its own copy."""
    if not str(accelerator.distributed_type.value).startswith("MULTI_"):  # alone, or each holds a part
        return
    sums = [value.detach().double().sum() for value in model.parameters() if value.requires_grad]
    found = accelerator.gather(torch.stack(sums)[None])
    if not torch.equal(found, found[:1].expand_as(found)):
        raise UserError(
            "the processes' weights have drifted apart: each has updated its own copy otherwise than the others",
            field="training.processes",
            mend="train with one process, and report the policy and form that were used",
        )


class _SaveEvery(TrainerCallback):
    """Asks for a checkpoint every so many seconds or steps, beside those of the evaluations."""

    def __init__(self, seconds: float, steps: int | None) -> None:
        self._seconds, self._steps, self._last = seconds, steps, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        late = bool(self._seconds) and time.monotonic() - self._last >= self._seconds
        if late or (self._steps and state.global_step % self._steps == 0):
            self._last, control.should_save = time.monotonic(), True


def _diagnose(model: nn.Module) -> str:
    """Say where the first value that is not finite lies."""
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            return f"the weights of {name} are no longer finite"
    return "all weights are still finite, so the overflow is in the forward pass"


def _check_room(model: nn.Module, recipe: TrainingRecipe, policy: Policy, folder: Path) -> None:
    """Refuse to start when gradients, optimiser states and what the policy keeps, or two checkpoints, cannot fit."""
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    gradients, states = gradients_and_states(held_at_once(model, policy), policy.copies, recipe)
    memory, available = gradients + states, psutil.virtual_memory().available
    if memory > available and not torch.cuda.is_available():
        raise UserError(
            f"gradients and optimiser states need {memory / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free",
            field="form",
            mend="train fewer weights: a LoRA form, or fewer blocks",
        )
    folder.mkdir(parents=True, exist_ok=True)
    disk, free = (4 * trained + states) * 3, shutil.disk_usage(folder).free
    if disk > free:
        raise UserError(
            f"checkpoints need {disk / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free on the disk",
            file=folder,
            mend="free space or name another --output, then `selectune resume`",
        )
