"""The stage that trains: base, form and packed records become one :class:`~selectune.training.Trainable`, in one process or several.

Knows: what a training is made of and where its result goes. Does not know: how a step is done (:mod:`selectune.training`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from selectune.errors import UserError
from selectune.meter import Cost, Meter
from selectune.pipeline.chain import Chain
from selectune.pipeline.finishing import TRAINED
from selectune.run import DataSummary, Run, folder_atomically

if TYPE_CHECKING:
    from selectune.training import Trainable

_TOGETHER = "training_cost.json"  # what several processes cost, for the one that started them


def train(chain: Chain) -> None:
    """Train what was chosen, in as many processes as the recipe names, and write the specialist."""

    def work(meter: Meter) -> None:
        from selectune import training
        from selectune.training import processes

        several = chain.recipe.training.processes
        if several == 1 or processes.count() > 1:
            return train_here(chain, meter)
        training.plan(trainable(chain, Meter("plan"))[0], chain.training)  # by one process, and then known to all
        processes.start(chain.run, several, chain.quiet)
        meter.cost = meter.cost.plus(chain.run.read(_TOGETHER, Cost))
        chain.run.path(_TOGETHER).unlink()

    inputs = {
        "training": chain.recipe.training.model_dump(exclude={"report_to"}),
        "budget": chain.recipe.budget.model_dump(exclude={"memory_gib"}),  # refuses a run, changes none
    }
    methods = {"objective": chain.objective.describe(), "policy": chain.policy.describe()}
    methods["policy"] |= chain.other_records
    chain.stage("train", inputs | methods | {"seed": chain.recipe.seed}, work)


def train_together(run: Run, quiet: bool = False) -> None:
    """Be one of several processes that :mod:`selectune.training.processes` started to train a run."""
    from selectune.training import processes

    chain = Chain(run, run.recipe, quiet or not processes.first())
    with Meter("train") as meter:
        train_here(chain, meter)
    if processes.first():
        run.write(_TOGETHER, meter.cost)


def train_here(chain: Chain, meter: Meter) -> None:
    """Train in this process (one of several, perhaps) and write what came of it."""
    from selectune import training
    from selectune.training import processes

    made, base, selection = trainable(chain, meter)
    # what a policy spends while it is tried out is no cost of the training
    tried = replace(made, context=chain.context(base, Meter("plan")))
    plan = processes.agree(training.plan(tried, chain.training) if processes.first() else None)
    settings = chain.training.training.model_copy(update={"micro_batch_sequences": plan.micro_batch_sequences})
    result = training.train(
        made,
        settings,
        steps=plan.steps,
        learning_rate=settings.learning_rate or chain.parameters.peak_rate(chain.form),
        meter=meter,
        run_name=chain.run.name,
        quiet=chain.quiet,
    )
    meter.count(flops=training.flops(base.anatomy, made.model, meter.cost, result.skipped_tokens))
    if not processes.first():
        return
    shutil.rmtree(chain.run.path(TRAINED), ignore_errors=True)
    with folder_atomically(chain.run.path("specialist")) as folder:
        chain.form.save(made.model, base, result.touched or selection, folder)
    meter.count(written=sum(file.stat().st_size for file in chain.run.path("specialist").iterdir()))
    chain.run.write("training.json", {"steps": result.steps, "best_step": result.best_step, "dev_loss": result.dev_loss})


def trainable(chain: Chain, meter: Meter) -> tuple[Trainable, Any, Any]:
    """Load the base, make it ready to train in the recipe's form, and pack the records; return base and selection beside it."""
    import torch

    from selectune.data import pack
    from selectune.parameters import Selection
    from selectune.training import Trainable

    torch.manual_seed(chain.recipe.seed)
    base = chain.base
    encoder = chain.encoder(base.tokenizer)
    length, packing, padding = chain.recipe.data.max_length, chain.recipe.data.packing, base.tokenizer.pad_token_id
    encoded = {
        split: [piece for record in chain.records(split) for piece in encoder.encode(record)] for split in ("train", "dev")
    }
    beside = chain.policy.records(chain.context(base, meter), chain.clean)
    encoded["train"] += [piece for record in beside for piece in encoder.encode(record)]
    if not encoded["train"]:
        raise UserError("every training record is longer than the context", field="data.max_length",
                        expected=f"records of at most {length} tokens", mend="raise it, or set data.long_records: truncate")  # fmt: skip
    rows = {split: pack(pieces, length, packing, padding) for split, pieces in encoded.items()}
    _note_tokens(chain, rows["train"], sum(len(piece.input_ids) for piece in encoded["train"]))
    selection = Selection.load(chain.run.path("selection.safetensors"))
    model = chain.form.apply(base, selection, chain.recipe.seed)
    del chain.base  # the form has changed it
    made = Trainable(model, rows["train"], rows["dev"], chain.objective, chain.bfloat16, chain.run.folder, chain.recipe.seed,
                     chain.policy, chain.context(base, meter))  # fmt: skip
    return made, base, selection


def _note_tokens(chain: Chain, rows: list[dict[str, Any]], records: int) -> None:
    """Add the token counts to the account of the data."""
    from selectune.training import processes

    if not processes.first():
        return
    summary = chain.run.read("data.json", DataSummary)
    slots = sum(len(row["input_ids"]) for row in rows)
    response = sum(int((row["labels"] != -100).sum()) for row in rows)
    summary.tokens = {"all": records, "response": response, "sequences": len(rows), "padding": slots - records}
    chain.run.write("data.json", summary)
