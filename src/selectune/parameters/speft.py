"""SPEFT: which of eight saliency scores chooses the best sparse change? The winner: the gradient, anywhere, chosen once.

Knows: the study's winner as the default. Does not know: the scores (``factors/scores.py``, ``factors/flow.py``), or how a choice is renewed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from selectune.parameters.factors.allocation import Allocation
from selectune.parameters.scored import Scored


class SPEFT(Scored):
    """The entries with the highest saliency anywhere, or the same share of each matrix."""

    name: ClassVar[str] = "speft"
    family: ClassVar[str] = "elements"
    paper: ClassVar[str] = "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models, ACL 2025, arXiv 2412.13488"
    summary: ClassVar[str] = (
        "The best entries by one of the study's eight saliencies; by the mean gradient's size, anywhere, unless said."
    )
    departs: ClassVar[str] = (
        "Trained in place, which equals a sparse change added to the weight. SynFlow's norms divide by a constant instead of doing nothing. Fisher "
        "information is of the summed log-likelihood, so long responses weigh more."
    )

    score: Literal["gradient", "random", "magnitude", "snip", "force", "taylor", "fisher", "synflow", "grasp"] = "gradient"
    """The saliency: ``gradient`` |g|, ``magnitude`` |w|, ``snip`` |wg|, ``force`` -wg (signed), ``taylor`` (wg)^2, ``fisher``, ``synflow``,
    ``grasp``, ``random``."""
    allocation: Allocation = "global"
    """``global``: the best anywhere; ``matrix``: the same share of each."""
