"""FiRST's two stages: routers of blocks train first, then the low-rank adapters that mend what skipping has cost.

Knows: which of the two trains when. Does not know: how either works (``adapters/first.py``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from selectune.errors import UserError
from selectune.training.policies.policy import Policy, Stage


class FiRSTStages(Policy):
    """Routers first, adapters afterwards."""

    name: ClassVar[str] = "first"
    paper: ClassVar[str] = (
        "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, EMNLP Findings 2025, arXiv 2410.12513"
    )
    summary: ClassVar[str] = "For the form `first`: routers train in the first part of the run, low-rank adapters in the rest."
    keeps_last: ClassVar[bool] = True

    routers: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the run in which the routers train."""

    def begin(self, stage: Stage) -> None:
        from selectune.adapters.attached import attachments
        from selectune.adapters.first import BlockRouter

        routers = {
            f"{name}.beside.{key}"
            for name, one in attachments(stage.whole.causal).items()
            if isinstance(one, BlockRouter)
            for key, _ in one.named_parameters()
        }
        if not routers:
            raise UserError(
                "'first' acts on routers of the form 'first', and there are none", field="policy", expected="form: first"
            )
        stage.passing["routers"] = routers & stage.parameters.keys()

    def _idle(self, stage: Stage) -> set[str]:
        routers: set[str] = stage.passing["routers"]
        return stage.parameters.keys() - routers if stage.step < self.routers * stage.steps else routers

    def before_step(self, stage: Stage) -> None:
        stage.train_only(stage.parameters.keys() - self._idle(stage))

    def gradients(self, stage: Stage) -> None:
        stage.drop(self._idle(stage))

    def after_step(self, stage: Stage) -> None:
        stage.train_only()  # a checkpoint holds both
