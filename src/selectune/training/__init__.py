"""How does it run? The trainer, its plan, its progress bar and its checkpoints, and what all of it will take."""

from selectune.training.plan import Passes, Plan, flops, plan_steps
from selectune.training.predict import Calibration, Prediction, calibrate, plan
from selectune.training.trainer import Interrupted, TrainingResult, train

__all__ = [
    "Calibration",
    "Interrupted",
    "Passes",
    "Plan",
    "Prediction",
    "TrainingResult",
    "calibrate",
    "flops",
    "plan",
    "plan_steps",
    "train",
]
