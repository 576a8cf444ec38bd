"""What the stages of a run share: its methods, its base, its records, and how a stage is run or skipped.

Knows: how a recipe's choices become objects, and what makes a finished stage stale. Does not know: the stages, or their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from selectune import catalogue
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.recipe import Recipe
from selectune.run import DataSummary, Run


@dataclass
class Chain:
    """One run, and what its stages share; a stage is skipped when it has ended with the same inputs.

    Args:
        loaded: the recipe's base, where it is in memory already; the chain changes it. library: where signals of records are kept for
            several runs, see :class:`selectune.examples.Pool`. kept: what choices of weights measured, see :class:`selectune.parameters.Context`.
    """

    run: Run
    recipe: Recipe
    quiet: bool
    loaded: Any = None
    library: Path | None = None
    kept: Any = None
    rehearsal: Any = None
    """Counts what choosing records would ask a model, instead of asking it."""
    _prints: list[str] = field(default_factory=list)

    @cached_property
    def form(self) -> Any:
        return catalogue.create("adapters", self.recipe.form, "form")

    @cached_property
    def examples(self) -> Any:
        """The method; what nobody chose is settled when the data are prepared."""
        from selectune.examples.by_default import by_default

        asked = self.recipe.examples
        if asked is None:
            asked = by_default(self.run.read("data.json", DataSummary).splits["train"], bool(self.recipe.data.target))
        return catalogue.create("examples", asked)

    @cached_property
    def parameters(self) -> Any:
        return catalogue.create("parameters", self.recipe.parameters)

    @cached_property
    def objective(self) -> Any:
        return catalogue.create("objectives", self.recipe.objective, "objective")

    @cached_property
    def policy(self) -> Any:
        policy: Any = catalogue.create("policies", self.recipe.policy, "policy")
        return policy.for_run(self.recipe.parameters)

    @cached_property
    def other_records(self) -> dict[str, Any]:
        """The hashes of the files of records that the policy names beside the run's own; they can be read."""
        from selectune import data

        source = getattr(self.policy, "source", None)
        if not source:
            return {}
        hashes = data.hashes_of(source, "policy.source")
        data.read_pool(source, {}, "policy.source")
        return {"hashes": hashes}

    @cached_property
    def finishing(self) -> Any:
        from selectune.adapters.attached import AttachedForm

        finishing = catalogue.create("merging", self.recipe.finish, "finish")
        if finishing.name != "none" and isinstance(self.form, AttachedForm):
            raise UserError(f"the form '{self.form.name}' changes no weights of the base that could return", field="finish",
                            expected="a form whose change can be merged, such as full or lora", mend="leave `finish` out")  # fmt: skip
        return finishing

    @cached_property
    def training(self) -> Recipe:
        """The recipe with training as the policy and the form need it."""
        training = self.policy.settings(self.recipe.training)
        if self.form.keeps_last:
            training = training.model_copy(update={"keep_best": False})
        return self.recipe.model_copy(update={"training": training})

    @cached_property
    def bfloat16(self) -> bool:
        from selectune.models import bf16_is_fast

        return self.recipe.training.precision == "bfloat16" or (self.recipe.training.precision == "auto" and bf16_is_fast())

    def load_base(self, quantised: bool = True) -> Any:
        from selectune.models import load_base

        if self.loaded is not None and not (quantised and self.form.needs_quantised_base):
            return self.loaded
        return load_base(
            self.recipe.base,
            dtype="auto" if self.bfloat16 else "float32",
            trust_remote_code=self.recipe.trust_remote_code,
            quantised=quantised and self.form.needs_quantised_base,
        )

    @cached_property
    def base(self) -> Any:
        return self.load_base()

    def encoder(self, tokenizer: Any) -> Any:
        from selectune.data import Encoder

        return Encoder(tokenizer, self.recipe.data.max_length, self.recipe.data.long_records, self.recipe.data.system)

    def records(self, split: str) -> list[Any]:
        """Return the records of a split; of the training split those that were chosen."""
        from selectune.data import records_from_file

        return records_from_file(self.run.records(split))

    def clean(self, records: list[Any]) -> list[Any]:
        """Return the records that overlap with nothing that the run is measured by; all of them, unless the recipe removes such records."""
        from selectune import data, evaluation

        if self.recipe.data.contamination != "remove":
            return records
        settings = self.recipe.evaluation
        texts = evaluation.benchmark_texts(settings.benchmarks, settings.data_root, settings.items)
        return data.without_overlap(records, texts | {"target": [record.question for record in self.records("test")]})

    def context(self, base: Any, meter: Meter) -> Any:
        """Return what a method of choosing may ask for."""
        import torch

        from selectune.parameters import Context

        return Context(
            base=base,
            encoder=self.encoder(base.tokenizer),
            train=self.records("train"),
            dev=self.records("dev"),
            generator=torch.Generator().manual_seed(self.recipe.seed),
            meter=meter,
            bfloat16=self.bfloat16,
            quiet=self.quiet,
            kept=self.kept,
        )

    def stage(self, name: str, inputs: dict[str, Any], work: Any) -> bool:
        """Run a stage unless it is finished; its inputs include those of the stages that it builds on.

        Of several processes the first runs it and the others wait; all of them train.
        """
        from selectune.run import Stage
        from selectune.training import processes

        given, ran = {"inputs": inputs, "before": list(self._prints)}, False
        if processes.first():
            ran = self.run.stage(name, given, work)
        elif name == "train" and not self.run.ended(name, given):
            work(Meter(name))
        processes.wait()
        self._prints.append(self.run.read(f"stages/{name}.json", Stage).fingerprint)
        return ran
