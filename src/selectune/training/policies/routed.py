"""Neurons that only some groups of records need learn from those records alone (LANDeRMT), general ones and all other weights from every record.

Knows: which group each record is of; that the records of one group make the gradient of an entry, or do not; that an entry none of whose groups is in
a step's batch stays as it was, bit for bit. Does not know: which neurons are whose (``parameters/language_neurons.py``).

A micro-batch is packed anew, group by group: each token is still computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from selectune import catalogue
from selectune.data.packing import Spans, record_spans, repacked
from selectune.errors import UserError
from selectune.parameters.factors.neurons import neurons
from selectune.parameters.language_neurons import LanguageNeurons
from selectune.recipe import MethodChoice
from selectune.training import processes
from selectune.training.policies.masked import Masked
from selectune.training.policies.policy import Batch, Policy, Stage


class Routed(Masked):
    """Routes each record's gradient to general neurons and to those of its own group."""

    name: ClassVar[str] = "routed"
    paper: ClassVar[str] = (
        "LANDeRMT: Detecting and Routing Language-Aware Neurons for Selectively Finetuning LLMs to Machine Translation, ACL 2024, arXiv 2409.19523"
    )
    summary: ClassVar[str] = "A neuron that only some files of the training data need learns from their records alone."
    departs: ClassVar[str] = (
        "A batch may hold records of several groups, each of which then moves what is its own. Awareness is measured once more before the first "
        "step. The paper's gate, which weighs general against specific neurons token by token, is not there (see `language_neurons`)."
    )

    mask: Literal["gradient", "update"] = "update"
    """What is held back of an entry none of whose groups is in the batch: its gradient (momentum and decay still move it), or the update."""
    parameters: MethodChoice | None = None
    """The choice of neurons that says whose each is, a `language_neurons`; left out: the run's, or its defaults where the run chooses otherwise."""

    def for_run(self, parameters: str | dict[str, Any]) -> Policy:
        known = isinstance(catalogue.create("parameters", parameters), LanguageNeurons)
        return self if self.parameters is not None or not known else self.model_copy(update={"parameters": parameters})

    def begin(self, stage: Stage) -> None:
        if hasattr(stage.whole.model, "disable_adapter"):
            raise UserError("adapters have no neurons to route to", field="policy", expected="form: full")
        if processes.count() > 1:
            raise UserError("gradients cannot be routed among several processes", field="policy", expected="processes: 1")
        assert stage.context is not None, "groups are those of the records"
        stage.passing["heard"], stage.passing["hearing"] = set(), ""
        stage.passing["group of"] = self._groups_of_records(stage)
        stage.passing["hears"] = self._masks(stage) if len(set(stage.passing["group of"].values())) > 1 else {}
        for name in {name for masks in stage.passing["hears"].values() for name in masks}:
            stage.parameters[name].register_hook(partial(self._routed, stage, name))

    def before_step(self, stage: Stage) -> None:
        stage.passing["heard"] = set()

    def loss(self, stage: Stage, batch: Batch, plain: Callable[..., Tensor]) -> Tensor:
        if not stage.passing["hears"]:
            return plain()
        grouped: dict[str, Spans] = {}
        ids = batch["input_ids"].reshape(-1).tolist()
        for first, end in record_spans(batch["position_ids"], batch["labels"]):
            group = stage.passing["group of"].get(hash(tuple(ids[first:end])), "")  # of nobody's: it may move everything
            grouped.setdefault(group, []).append((first, end))
        *others, last = sorted(grouped) or [""]
        if not others:  # as it is packed
            self._hear(stage, last)
            return plain()
        total = 0.0
        for group in others:
            self._hear(stage, group)
            part = plain(repacked(batch, grouped[group]))
            part.backward()  # type: ignore[no-untyped-call]
            total += float(part.detach())
        self._hear(stage, last)
        return plain(repacked(batch, grouped[last])) + total

    def factors(self, stage: Stage) -> dict[str, Tensor]:
        """Return 0 for the entries none of whose groups was in the batch."""
        heard = [stage.passing["hears"].get(group, {}) for group in sorted(stage.passing["heard"])]
        names = set.intersection(*map(set, heard)) if heard else set()
        return {name: torch.stack([masks[name] for masks in heard]).any(0).float() for name in sorted(names)}

    def _hear(self, stage: Stage, group: str) -> None:
        """Let the gradients that come be those of a group's records."""
        stage.passing["hearing"] = group
        stage.passing["heard"].add(group)

    def _routed(self, stage: Stage, name: str, gradient: Tensor) -> Tensor:
        """Keep of the gradient of one group's records what they may move."""
        mask = stage.passing["hears"].get(stage.passing["hearing"], {}).get(name)
        return gradient if mask is None else gradient * mask

    def _groups_of_records(self, stage: Stage) -> dict[int, str]:
        """Return the group of each training record, by its tokens; of a record that two groups have, the first in the order of their names."""
        assert stage.context is not None
        found: dict[int, str] = {}
        for group, records in sorted(self._neurons(stage).groups(stage.context).items()):
            for piece in (piece for record in records for piece in stage.context.encoder.encode(record)):
                found.setdefault(hash(tuple(piece.input_ids)), group)
        return found

    def _neurons(self, stage: Stage) -> LanguageNeurons:
        given: Any = catalogue.create("parameters", self.parameters or "language_neurons", "policy.parameters")
        if not isinstance(given, LanguageNeurons):
            raise UserError(
                f"'{given.name}' does not say whose neurons are", field="policy.parameters", expected="language_neurons"
            )
        return given.model_copy(update={"k": min(given.k, len(stage.anatomy.blocks))})

    def _masks(self, stage: Stage) -> dict[str, dict[str, Tensor]]:
        """Return, for each group of the training data, which entries of what trains its records may move, where not all: bool by name."""
        assert stage.context is not None
        method = self._neurons(stage)
        training = stage.whole.training
        stage.whole.eval()
        blocks, roles = method.roles(stage.context)
        stage.whole.train(training)
        stage.clear()
        groups = set(stage.passing["group of"].values())
        specific = torch.stack([mask for name, mask in roles.items() if name]).any(0)
        found: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
        for group in groups:
            closed = specific & ~roles[group]
            apart = neurons(stage.context.base, {block: closed[block].nonzero().squeeze(-1) for block in blocks})
            for name, part in apart.parts.items():
                if name in stage.parameters:
                    found[group][name] = ~stage.taken(name, part.mask()).to(stage.device)
        names = {name for masks in found.values() for name in masks}
        return {group: {name: masks.get(name, _open(stage, name)) for name in names} for group, masks in found.items()}


def _open(stage: Stage, name: str) -> Tensor:
    return torch.ones_like(stage.parameters[name], dtype=torch.bool)
