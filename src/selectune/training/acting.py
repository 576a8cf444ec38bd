"""The moments of a policy in a training.

Knows: which call of the trainer is which moment, and the file of what a policy remembers in a checkpoint. Does not know: any policy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from selectune.training.policies.policy import Policy, Stage

REMEMBERED = "policy.safetensors"


class Acting(TrainerCallback):
    """Calls a policy's hooks around a step, and keeps what it remembers in checkpoints."""

    def __init__(self, policy: Policy, stage: Stage) -> None:
        self.policy, self.stage = policy, stage
        policy.begin(stage)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stage.optimiser = kwargs["optimizer"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stage.step, self.stage.epoch = state.global_step, int(state.epoch or 0)
        self.stage.learning_rate = float(self.stage.optimiser.param_groups[0]["lr"])
        self.policy.before_step(self.stage)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.policy.after_step(self.stage)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self.policy.done(self.stage):
            control.should_training_stop = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"

    def save(self, folder: Path) -> None:
        """Write what the policy remembers, if it does."""
        tensors, numbers = self.policy.state(self.stage)
        if tensors or numbers:
            kept = {name: value.contiguous() for name, value in tensors.items()}
            save_file(kept, folder / REMEMBERED, metadata={"numbers": json.dumps(numbers)})

    def load(self, folder: Path) -> None:
        """Take up what :meth:`save` wrote."""
        if (folder / REMEMBERED).is_file():
            with safe_open(folder / REMEMBERED, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.policy.restore(self.stage, tensors, json.loads(file.metadata()["numbers"]))
