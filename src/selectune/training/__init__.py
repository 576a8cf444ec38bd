"""How does it run? The trainer, its plan, its progress bar and its checkpoints, and what all of it will take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selectune.lazily import imported

if TYPE_CHECKING:
    from selectune.training.predict import Calibration as Calibration
    from selectune.training.predict import Prediction as Prediction
    from selectune.training.predict import calibrate as calibrate
    from selectune.training.predict import plan as plan
    from selectune.training.steps import Passes as Passes
    from selectune.training.steps import Plan as Plan
    from selectune.training.steps import flops as flops
    from selectune.training.steps import plan_steps as plan_steps
    from selectune.training.trainable import Trainable as Trainable
    from selectune.training.trainer import Interrupted as Interrupted
    from selectune.training.trainer import TrainingResult as TrainingResult
    from selectune.training.trainer import train as train

__getattr__ = imported(__name__, {  # policies lie within, and a list of them needs no trainer
    "predict": ("Calibration", "Prediction", "calibrate", "plan"),
    "steps": ("Passes", "Plan", "flops", "plan_steps"),
    "trainable": ("Trainable",),
    "trainer": ("Interrupted", "TrainingResult", "train"),
})  # fmt: skip
