"""Everything may change: full fine-tuning, or an adapter on every linear layer."""

from __future__ import annotations

from typing import ClassVar

from selectune.parameters.method import Context, ParameterMethod
from selectune.parameters.selection import Selection


class All(ParameterMethod):
    """Every parameter, the embeddings included."""

    name: ClassVar[str] = "all"
    family: ClassVar[str] = "controls"
    usual_form: ClassVar[str] = "lora"
    summary: ClassVar[str] = "Every weight of the base."

    def select(self, context: Context) -> Selection:
        return Selection.all(context.base.model)
