"""What every method of this axis has in common: it changes a trained model once more, as a whole, before it is measured.

Knows: what such a method is given and what it returns. Does not know: any method, or in which form the model was trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from selectune.catalogue import Method

if TYPE_CHECKING:
    from selectune.parameters.method import Context


class Finish(Method, ABC):
    """An answer to: what is kept of the training?"""

    axis: ClassVar[str] = "merging"

    @abstractmethod
    def finish(self, model: Any, context: Context) -> dict[str, Any]:
        """Change a trained model in place.

        Args:
            model: the specialist as a plain fp32 model, its adapter merged. context: the same as for choosing weights; its base is the run's, in
                fp32.

        Returns:
            What came of it, for the run folder and the report: words and their values, as JSON can hold them.
        """
