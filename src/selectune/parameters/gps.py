"""GPS: of every output neuron the K inputs with the largest gradient train.

Knows: the paper's score and defaults. Does not know: how the entries of a row are found (``per_neuron.py``).
"""

from __future__ import annotations

from typing import ClassVar

from selectune.parameters.per_neuron import PerNeuron


class GPS(PerNeuron):
    """The K inputs of every output neuron whose gradient, added up over the examples, is largest."""

    name: ClassVar[str] = "gps"
    paper: ClassVar[str] = "Gradient-based Parameter Selection for Efficient Fine-Tuning, CVPR 2024, arXiv 2312.10136"
    summary: ClassVar[str] = "Of every output neuron the K inputs with the largest summed gradient."
    departs: ClassVar[str] = (
        "The loss is that of the response tokens: there is no new head whose gradient a contrastive loss would have to avoid, and so no "
        "head that trains whole. A subset of the training records is scored. Biases stay frozen."
    )

    score: str = "gradient"
    """How an entry is scored; the sum over examples orders entries as their mean does."""
