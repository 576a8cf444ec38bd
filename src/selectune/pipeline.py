"""The chain: prepare, measure base, choose, train, finish, measure specialist, judge, report.

Knows: the order of the stages, what each reads and writes, and what makes a finished stage stale.
Does not know: how any stage does its work; every folder of the package answers its own question.

Three doors lead here: :func:`specialize` from Python, ``selectune specialize`` and a recipe file. :func:`plan` goes through the same
chain as far as training, and tells what it would take.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectune import __version__, catalogue
from selectune import recipe as recipes
from selectune.errors import UserError
from selectune.meter import Cost, Meter
from selectune.recipe import Recipe
from selectune.run import (
    BlockScore,
    DataSummary,
    Evaluation,
    Run,
    Sample,
    Scores,
    Verdict,
    fingerprint,
    folder_atomically,
    write_atomically,
)

if TYPE_CHECKING:
    from selectune.training import Prediction, Trainable


def specialize(
    train: str | Path | list[str] | None = None,
    *,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    folder: str | Path | None = None,
    quiet: bool = False,
    **values: Any,
) -> Run:
    """Turn a base model into a specialist, and prove what was kept.

    Args:
        train: a file, folder, glob or hub id of training records (``data.train`` of the recipe).
        recipe: a recipe file, a :class:`Recipe` or its values; ``values`` override its keys.
        folder: the run folder; left out, a new one in the recipe's ``output``.
        quiet: show no progress.
        values: recipe keys, such as ``form="lora"`` or ``training={"epochs": 5}``.

    Returns:
        The finished run; ``run.read("verdict.json", Verdict)`` is the result, ``run.path("specialist")`` the model.

    Raises:
        UserError: a mistake in the input. Interrupted: Ctrl-C during training; go on with :func:`resume`.
    """
    from selectune.training import processes

    resolved = _resolve(train, recipe, values)
    place = processes.agree(str(folder or free_folder(resolved)))
    if processes.first():
        Run.create(place, resolved)
    processes.wait()
    return execute(Run.open(place), quiet)


def plan(
    train: str | Path | list[str] | None = None,
    *,
    recipe: str | Path | Recipe | dict[str, Any] | None = None,
    quiet: bool = False,
    **values: Any,
) -> Prediction:
    """Say what a run would train and take on this machine, after preparing its data and about ten seconds of real steps.

    Args:
        train, recipe, values: as in :func:`specialize`. quiet: show nothing of the data.

    Returns:
        Counts, floating-point operations, memory and time of the training, and under ``problems`` why they exceed the budget, if
        they do. No run is left behind. Measuring base and specialist is not part of it.

    Raises:
        UserError: a mistake in the input.
    """
    resolved = _resolve(train, recipe, values)
    output = Path(resolved.output).absolute()
    place = next(folder for folder in (output, *output.parents) if folder.is_dir())  # the disk that the run will write to
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".plan-") as folder:
            return Chain(Run.create(folder, resolved), resolved, quiet).predict()
    except PermissionError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=place, mend="name another --output") from None


def _resolve(train: Any, recipe: str | Path | Recipe | dict[str, Any] | None, values: dict[str, Any]) -> Recipe:
    """Return the recipe that some values on top of a given one make."""
    if isinstance(recipe, Recipe | dict):
        given = recipe.model_dump() if isinstance(recipe, Recipe) else recipe
    else:
        given = recipes.read_values(recipe) if recipe else {}
    given = merge(given, values)
    if train is not None:
        given = merge(given, {"data": {"train": [str(item) for item in train] if isinstance(train, list) else str(train)}})
    resolved = recipes.parse(given, recipe if isinstance(recipe, str | Path) else None)
    if resolved.data.train is None:
        raise UserError("no training data", field="data.train", expected="a file, folder, glob or hub id")
    return resolved


def resume(folder: str | Path, quiet: bool = False) -> Run:
    """Take up a run where it was left; finished stages are skipped, training goes on from its last checkpoint."""
    return execute(Run.open(folder), quiet)


def execute(run: Run, quiet: bool = False) -> Run:
    """Run every stage that is not finished."""
    from selectune.training import processes

    chain = Chain(run, run.recipe, quiet or not processes.first())
    chain.prepare()
    chain.measure_base()
    chain.choose_examples()
    chain.choose()
    chain.train()
    chain.finish()
    chain.measure_specialist()
    chain.judge()
    chain.report()
    return run


def train_together(run: Run, quiet: bool = False) -> None:
    """Be one of several processes that :mod:`selectune.training.processes` started to train a run."""
    from selectune.training import processes

    chain = Chain(run, run.recipe, quiet or not processes.first())
    with Meter("train") as meter:
        chain.train_here(meter)
    if processes.first():
        run.write(_TOGETHER, meter.cost)


def merge(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``over`` put on top, section by section."""
    merged = dict(values)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and "method" not in value
        merged[key] = merge(merged[key], value) if both else value
    return merged


def free_folder(recipe: Recipe) -> Path:
    """Return the folder for a recipe's run: an unfinished run of the same recipe, or a new one."""
    if recipe.name:
        return Path(recipe.output) / recipe.name
    first = recipe.data.train if isinstance(recipe.data.train, str) else (recipe.data.train or ["run"])[0]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(first).name.split(".")[0]).strip("-").lower() or "run"
    parts = [stem, *(c if isinstance(c, str) else str(c["method"]) for c in (recipe.form, recipe.parameters))]
    name = "-".join(part.split(":")[0] for part in parts if part != "all")
    for number in range(1, 10_000):
        folder = Path(recipe.output) / (name if number == 1 else f"{name}-{number}")
        run = Run(folder)
        if not folder.exists() or (run.has("recipe.yaml") and run.recipe == recipe and not run.finished("report")):
            return folder
    raise UserError("10,000 runs of this name exist", file=recipe.output, mend="give the run a name with --name")


@dataclass
class Chain:
    """The stages of one run; each is skipped when it has ended with the same inputs.

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

    # -- what several stages use -------------------------------------------------------------------------------------

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

    # -- the stages --------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        from selectune import data, evaluation, models
        from selectune.reporting.terminal import show_data

        settings = self.recipe.evaluation

        def work(meter: Meter) -> None:
            catalogue_of_choices = (
                self.recipe.examples is None or self.examples,
                self.form,
                self.parameters,
                self.objective,
                self.policy,
                self.finishing,
            )  # a wrong choice, or a file that it names and that is not there, is told before any work
            assert all(catalogue_of_choices) and self.other_records is not None
            self.run.write("environment.json", models.environment())
            texts = evaluation.benchmark_texts(settings.benchmarks, settings.data_root, settings.items)
            prepared = data.prepare(self.recipe.data, texts, seed=self.recipe.seed)
            for split in ("train", "dev", "test"):
                data.records_to_file(getattr(prepared, split), self.run.path("data", f"{split}.jsonl"))
            self.run.write("data.json", prepared.summary)

        hashes = data.input_hashes(self.recipe.data)
        told = self.recipe.data.model_dump(exclude={"engine"})  # where signals are measured changes none
        ran = self.stage("prepare", {"data": told, "hashes": hashes, "e": settings.benchmarks}, work)
        if ran and not self.quiet:
            show_data(self.run.read("data.json", DataSummary))

    def evaluate(self, model: Any, tokenizer: Any, name: str) -> tuple[Evaluation, list[tuple[str, str, str, str]]]:
        """Measure one model: the target, the general benchmarks, and some answers written out."""
        from selectune import evaluation

        settings = self.recipe.evaluation
        scorer = evaluation.Scorer(model, tokenizer, bfloat16=self.bfloat16, progress=not self.quiet)
        encoder = self.encoder(tokenizer)
        test = self.records("test")
        benchmarks = []
        if settings.target != "off" and test:
            benchmarks += evaluation.evaluate_target(
                test, settings.target, scorer, encoder, settings.max_new_tokens, settings.target_items
            )
        benchmarks += evaluation.run_benchmarks(
            settings.benchmarks, scorer, settings.data_root, settings.items, settings.few_shot
        )
        answers = evaluation.sample_answers(test, scorer, encoder, settings.samples, settings.max_new_tokens)
        return Evaluation(model=name, benchmarks=benchmarks), answers

    def measure_base(self) -> None:
        from selectune import models

        inputs = {
            "base": models.fingerprint(models.locate(self.recipe.base), self.recipe.base),
            "evaluation": self.recipe.evaluation.model_dump(exclude=_JUDGING),
            "test": [record.key for record in self.records("test")],
            "encoder": [self.recipe.data.system, self.recipe.data.max_length, self.recipe.data.long_records],
            "bfloat16": self.bfloat16,
        }
        kept = models.cache_folder() / "measurements" / f"{fingerprint({**inputs, 'version': __version__})}.json"

        def work(meter: Meter) -> None:
            """Measure the base, or take what an earlier run with the same base, test set and settings measured."""
            if not kept.exists():
                base = self.load_base(quantised=False)  # what the user has, even where a form then holds it in 4 bits
                meter.watch(base.model, base.anatomy.total_parameters)
                measured, answers = self.evaluate(base.model, base.tokenizer, "base")
                write_atomically(kept, json.dumps({"evaluation": measured.model_dump(mode="json"), "answers": answers}))
            values = json.loads(kept.read_text(encoding="utf-8"))
            self.run.write("base_evaluation.json", Evaluation(**values["evaluation"]))
            self.run.write("base_answers.json", values["answers"])

        self.stage("measure_base", inputs, work)

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

    def choose_examples(self) -> None:
        """Choose the records that train; nothing to do, and no stage, where all of them do."""
        from selectune import data
        from selectune.examples import Pool
        from selectune.examples.factors.store import write_scores

        if self.examples == catalogue.create("examples", "all"):
            return

        def work(meter: Meter) -> None:
            records = data.records_from_file(self.run.path("data", "train.jsonl"))
            target = data.read_target(self.recipe.data) or data.records_from_file(self.run.path("data", "dev.jsonl"))
            pool = Pool(
                records,
                lambda: self.load_base(quantised=False),
                self.encoder,
                target,
                self.recipe.seed,
                meter,
                self.bfloat16,
                self.quiet,
                self.run.path("examples"),
                self.library,
                engine=self.recipe.data.engine,
                rehearsal=self.rehearsal,
            )
            choice = self.examples.select(pool)
            trains = choice.as_they_train(records)
            write_scores(self.run.path("scores.parquet"), pool, choice.signals, list(trains), choice.reasons)
            kept = [record for _, record in sorted(trains.items())]
            data.records_to_file(kept, self.run.path("data", "chosen.jsonl"))
            if self.recipe.examples is None:
                pool.notes.append(
                    "nobody chose: of a large pool what leaves least uncertainty about the target trains; all does with `examples: all`"
                )
            told = {"pool": len(records), "chosen": len(kept), "notes": pool.notes}
            self.run.write("examples.json", {"method": self.examples.describe(), **told})

        given = {"examples": self.examples.describe(), "seed": self.recipe.seed, "bfloat16": self.bfloat16}
        self.stage("choose_examples", given, work)

    def choose(self) -> None:
        def work(meter: Meter) -> None:
            base = self.load_base(quantised=False)  # scores need gradients, which 4-bit weights have not
            context = self.context(base, meter)
            selection = self.parameters.select(context)
            if not selection.parts:
                raise UserError(f"'{self.parameters.name}' chose nothing on this base", field="parameters", expected="weights that it has",
                                mend="larger shares or bands, or other `targets`")  # fmt: skip
            selection.save(self.run.path("selection.safetensors"))
            scores = context.block_scores
            blocks = [
                BlockScore(block=i, score=scores.get(i), trained=any(selection.covers(name) for name in block.parameters))
                for i, block in enumerate(base.anatomy.blocks)
            ]
            self.run.write(
                "scores.json",
                Scores(
                    method=self.parameters.describe(),
                    form=self.form.describe(),
                    blocks=blocks,
                    trained_parameters=self.form.count(base, selection),
                    total_parameters=base.anatomy.total_parameters,
                    examples=context.examples_scored,
                    notes=context.notes,
                ),
            )

        self.stage(
            "choose",
            {"parameters": self.parameters.describe(), "form": self.form.describe(), "seed": self.recipe.seed},
            work,
        )

    def trainable(self, meter: Meter) -> tuple[Trainable, Any, Any]:
        """Load the base, make it ready to train in the recipe's form, and pack the records; return base and selection beside it."""
        import torch

        from selectune.data import pack
        from selectune.parameters import Selection
        from selectune.training import Trainable

        torch.manual_seed(self.recipe.seed)
        base = self.base
        encoder = self.encoder(base.tokenizer)
        length, packing, padding = self.recipe.data.max_length, self.recipe.data.packing, base.tokenizer.pad_token_id
        encoded = {
            split: [piece for record in self.records(split) for piece in encoder.encode(record)] for split in ("train", "dev")
        }
        beside = self.policy.records(self.context(base, meter), self.clean)
        encoded["train"] += [piece for record in beside for piece in encoder.encode(record)]
        if not encoded["train"]:
            raise UserError("every training record is longer than the context", field="data.max_length",
                            expected=f"records of at most {length} tokens", mend="raise it, or set data.long_records: truncate")  # fmt: skip
        rows = {split: pack(pieces, length, packing, padding) for split, pieces in encoded.items()}
        self._note_tokens(rows["train"], sum(len(piece.input_ids) for piece in encoded["train"]))
        selection = Selection.load(self.run.path("selection.safetensors"))
        model = self.form.apply(base, selection, self.recipe.seed)
        del self.base  # the form has changed it
        made = Trainable(model, rows["train"], rows["dev"], self.objective, self.bfloat16, self.run.folder, self.recipe.seed,
                         self.policy, self.context(base, meter))  # fmt: skip
        return made, base, selection

    def train(self) -> None:
        def work(meter: Meter) -> None:
            from selectune import training
            from selectune.training import processes

            several = self.recipe.training.processes
            if several == 1 or processes.count() > 1:
                return self.train_here(meter)
            training.plan(self.trainable(Meter("plan"))[0], self.training)  # by one process, and then known to all
            processes.start(self.run, several, self.quiet)
            meter.cost = meter.cost.plus(self.run.read(_TOGETHER, Cost))
            self.run.path(_TOGETHER).unlink()

        inputs = {
            "training": self.recipe.training.model_dump(exclude={"report_to"}),
            "budget": self.recipe.budget.model_dump(exclude={"memory_gib"}),  # refuses a run, changes none
        }
        methods = {"objective": self.objective.describe(), "policy": self.policy.describe()}
        methods["policy"] |= self.other_records
        self.stage("train", inputs | methods | {"seed": self.recipe.seed}, work)

    def train_here(self, meter: Meter) -> None:
        """Train in this process (one of several, perhaps) and write what came of it."""
        from selectune import training
        from selectune.training import processes

        made, base, selection = self.trainable(meter)
        # what a policy spends while it is tried out is no cost of the training
        tried = replace(made, context=self.context(base, Meter("plan")))
        plan = processes.agree(training.plan(tried, self.training) if processes.first() else None)
        settings = self.training.training.model_copy(update={"micro_batch_sequences": plan.micro_batch_sequences})
        result = training.train(
            made,
            settings,
            steps=plan.steps,
            learning_rate=settings.learning_rate or self.parameters.peak_rate(self.form),
            meter=meter,
            run_name=self.run.name,
            quiet=self.quiet,
        )
        meter.count(flops=training.flops(base.anatomy, made.model, meter.cost, result.skipped_tokens))
        if not processes.first():
            return
        shutil.rmtree(self.run.path(TRAINED), ignore_errors=True)
        with folder_atomically(self.run.path("specialist")) as folder:
            self.form.save(made.model, base, result.touched or selection, folder)
        meter.count(written=sum(file.stat().st_size for file in self.run.path("specialist").iterdir()))
        self.run.write("training.json", {"steps": result.steps, "best_step": result.best_step, "dev_loss": result.dev_loss})

    def finish(self) -> None:
        """Change what was trained once more, where the recipe says so; what training left is kept beside it."""
        from selectune.training import processes

        trained, specialist = self.run.path(TRAINED), self.run.path("specialist")

        def put_back() -> None:
            if trained.exists():
                shutil.rmtree(specialist, ignore_errors=True)
                trained.rename(specialist)
            for told in ("finish.json", "stages/finish.json"):
                self.run.path(told).unlink(missing_ok=True)

        def work(meter: Meter) -> None:
            from selectune.merging.delta import Delta
            from selectune.merging.export import merged
            from selectune.models import load_base

            put_back()
            model, base = (
                load_base(self.recipe.base, dtype="float32", trust_remote_code=self.recipe.trust_remote_code) for _ in range(2)
            )
            plain = merged(model, specialist)
            told = self.finishing.finish(plain, self.context(base, meter))
            delta = Delta.of(base, plain.to(base.dtype))
            specialist.rename(trained)
            with folder_atomically(specialist) as folder:
                delta.save(folder, original=False)
            meter.count(written=sum(file.stat().st_size for file in specialist.iterdir()))
            self.run.write("finish.json", {"method": self.finishing.describe(), "told": told})

        if self.finishing.name == "none":
            if processes.first():
                put_back()
            return
        self.stage("finish", {"finish": self.finishing.describe(), "seed": self.recipe.seed}, work)

    def predict(self) -> Prediction:
        """Prepare the data, choose by a few examples, run a few steps of training, and say what the whole will take."""
        from selectune.inference.remembering import Rehearsal

        self.prepare()
        self.rehearsal = asked = Rehearsal()
        self.choose_examples()
        choosing, notes = self._rehearse_choice()
        if asked.calls:
            notes.append(f"to choose its records the run asks a model {asked.calls:,} questions (about {asked.read:,} tokens read, at most "
                         f"{asked.written:,} written), which took no time here")  # fmt: skip
        begin = time.perf_counter()
        from selectune.training.predict import predict  # what training imports is loaded in the stage that is predicted

        made, base, selection = self.trainable(Meter("plan"))
        return predict(
            made,
            self.training,
            anatomy=base.anatomy,
            save=lambda folder: self.form.save(made.model, base, selection, folder),
            loading=time.perf_counter() - begin,
            choosing=choosing,
            form=self.form.describe(),
            parameters=catalogue.create("parameters", self.recipe.parameters).describe(),
            tokens=self.run.read("data.json", DataSummary).tokens,
            notes=notes,
        )

    def _rehearse_choice(self) -> tuple[float, list[str]]:
        """Choose with as few examples as possible; return the seconds that the recipe's own choice will take, and what was assumed."""
        asked = self.parameters
        wanted = min(getattr(asked, "examples", 0), len(self.records("train")))
        if wanted <= _REHEARSED:
            self.choose()
            return self.run.costs()[-1].seconds, []
        begin = time.perf_counter()
        self.load_base(quantised=False)
        loading = time.perf_counter() - begin
        self.parameters = asked.model_copy(update={"examples": _REHEARSED})
        self.choose()
        took = self.run.costs()[-1].seconds
        each = max(took - loading, 0.0) / _REHEARSED
        note = f"the weights were chosen by {_REHEARSED} examples instead of {wanted}, and may be others in the run"
        return took + (wanted - _REHEARSED) * each, [note]

    def specialist(self) -> tuple[Any, Any]:
        """Load the base and put the specialist on it; what was finished are weights of the base as it is, quantised or not."""
        from selectune.adapters import load_specialist

        base = self.load_base(quantised=self.finishing.name == "none")
        return base, load_specialist(base, self.run.path("specialist"))

    def measure_specialist(self) -> None:
        from selectune import evaluation

        def work(meter: Meter) -> None:
            base, model = self.specialist()
            tokenizer = base.tokenizer
            meter.watch(model, base.anatomy.total_parameters)
            measured, answers = self.evaluate(model, tokenizer, "specialist")
            if self.recipe.evaluation.forgetting:
                beside = self.load_base(quantised=False)
                meter.watch(beside.model, beside.anatomy.total_parameters)
                before, after = evaluation.measure_forgetting(beside.model, model, tokenizer, bfloat16=self.bfloat16)
                base_measured = self.run.read("base_evaluation.json", Evaluation)
                kept = [item for item in base_measured.benchmarks if item.role != "forgetting"]
                self.run.write("base_evaluation.json", Evaluation(model="base", benchmarks=kept + before))
                measured.benchmarks.extend(after)
            self.run.write("evaluation.json", measured)
            earlier = self.run.path("base_answers.json").read_text(encoding="utf-8")
            samples = _pair_answers(earlier, answers)
            self.run.write("samples.json", [sample.model_dump() for sample in samples])

        self.stage("measure_specialist", {"evaluation": self.recipe.evaluation.model_dump(exclude=_JUDGING)}, work)

    def judge(self) -> None:
        from selectune import evaluation

        def work(meter: Meter) -> None:
            before = self.run.read("base_evaluation.json", Evaluation)
            after = self.run.read("evaluation.json", Evaluation)
            settings = self.recipe.evaluation
            verdict = evaluation.judge(before, after, settings.confidence, settings.tolerance, self.recipe.seed)
            self.run.write("verdict.json", verdict)

        self.stage("judge", self.recipe.evaluation.model_dump(include=_JUDGING), work)

    def report(self) -> None:
        from selectune.reporting import write_report

        self.stage("report", {}, lambda meter: write_report(self.run) and None)
        write_report(self.run)  # once more, now with the cost of every stage

    def _note_tokens(self, rows: list[dict[str, Any]], records: int) -> None:
        """Add the token counts to the account of the data."""
        from selectune.training import processes

        if not processes.first():
            return
        summary = self.run.read("data.json", DataSummary)
        slots = sum(len(row["input_ids"]) for row in rows)
        response = sum(int((row["labels"] != -100).sum()) for row in rows)
        summary.tokens = {"all": records, "response": response, "sequences": len(rows), "padding": slots - records}
        self.run.write("data.json", summary)


_REHEARSED = 6
"""Examples on which a prediction chooses. Each has a length of its own, as those of the run will have, and compiles kernels for it."""
TRAINED = "trained"
_TOGETHER = "training_cost.json"  # what several processes cost, for the one that started them
MEASUREMENTS = 3
"""Raise it when what is measured changes: kept measurements of bases are then taken anew."""
_JUDGING = {"confidence", "tolerance", "require_retention"}


def _pair_answers(before: str, after: list[tuple[str, str, str, str]]) -> list[Sample]:
    earlier = {item[0]: item[3] for item in json.loads(before)}
    return [
        Sample(id=item, prompt=prompt, target=target, before=earlier.get(item, ""), after=answer)
        for item, prompt, target, answer in after
    ]


def verdict_of(run: Run) -> Verdict:
    """Return a finished run's verdict."""
    return run.read("verdict.json", Verdict)
