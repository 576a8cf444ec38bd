"""NeuroAda: of every output neuron the k inputs with the largest weights train; no data is needed.

The paper adds zero-initialised bypasses to these weights and merges them afterwards, which is the same as training the weights in place.

Knows: the paper's score and defaults. Does not know: how the entries of a row are found (``per_neuron.py``).
"""

from __future__ import annotations

from typing import ClassVar

from selectune.parameters.per_neuron import PerNeuron


class NeuroAda(PerNeuron):
    """The k largest weights of every output neuron."""

    name: ClassVar[str] = "neuroada"
    paper: ClassVar[str] = "NeuroAda: Activating Each Neuron's Potential for PEFT, EMNLP 2025, arXiv 2510.18940"
    summary: ClassVar[str] = "Of every output neuron the k inputs with the largest weights."
    departs: ClassVar[str] = (
        "Trained in place, not as a bypass: weight decay pulls an entry to zero instead of to the base (the trainer's default is no decay)."
    )

    score: str = "magnitude"
    """``magnitude`` as in the paper; ``gradient`` and ``random`` are its variants."""
