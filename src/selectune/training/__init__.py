"""How does it run? The trainer, its plan, its progress bar and its checkpoints."""

from selectune.training.plan import Plan, flops, plan, plan_steps
from selectune.training.trainer import Interrupted, TrainingResult, train

__all__ = ["Interrupted", "Plan", "TrainingResult", "flops", "plan", "plan_steps", "train"]
