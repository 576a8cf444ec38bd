"""What acts while a model trains? On losses, gradients, updates, and on what trains next. One file per policy."""

from selectune.training.policies.policy import Policy, Stage

__all__ = ["Policy", "Stage"]
