"""How does it run? The trainer, its schedules, its progress bar and its checkpoints."""

from selectune.training.trainer import TrainingResult, train

__all__ = ["TrainingResult", "train"]
