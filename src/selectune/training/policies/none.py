"""Nothing acts: plain training."""

from __future__ import annotations

from typing import ClassVar

from selectune.training.policies.policy import Policy


class Nothing(Policy):
    """Losses, gradients and updates are what they are."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "Plain training."
    acts: ClassVar[bool] = False
