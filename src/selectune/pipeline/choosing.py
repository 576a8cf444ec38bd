"""The stages that choose: which records train, and which weights.

Knows: what a choice is given and what it leaves in the run folder. Does not know: how anything is chosen
(:mod:`selectune.examples`, :mod:`selectune.parameters`).
"""

from __future__ import annotations

from selectune import catalogue
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.pipeline.chain import Chain
from selectune.run import BlockScore, Scores


def choose_examples(chain: Chain) -> None:
    """Choose the records that train; nothing to do, and no stage, where all of them do."""
    from selectune import data
    from selectune.examples import Pool
    from selectune.examples.factors.store import write_scores

    if chain.examples == catalogue.create("examples", "all"):
        return

    def work(meter: Meter) -> None:
        records = data.records_from_file(chain.run.path("data", "train.jsonl"))
        target = data.read_target(chain.recipe.data) or data.records_from_file(chain.run.path("data", "dev.jsonl"))
        pool = Pool(
            records,
            lambda: chain.load_base(quantised=False),
            chain.encoder,
            target,
            chain.recipe.seed,
            meter,
            chain.bfloat16,
            chain.quiet,
            chain.run.path("examples"),
            chain.library,
            engine=chain.recipe.data.engine,
            rehearsal=chain.rehearsal,
        )
        choice = chain.examples.select(pool)
        trains = choice.as_they_train(records)
        write_scores(chain.run.path("scores.parquet"), pool, choice.signals, list(trains), choice.reasons)
        kept = [record for _, record in sorted(trains.items())]
        data.records_to_file(kept, chain.run.path("data", "chosen.jsonl"))
        if chain.recipe.examples is None:
            pool.notes.append(
                "nobody chose: of a large pool what leaves least uncertainty about the target trains; all does with `examples: all`"
            )
        told = {"pool": len(records), "chosen": len(kept), "notes": pool.notes}
        chain.run.write("examples.json", {"method": chain.examples.describe(), **told})

    given = {"examples": chain.examples.describe(), "seed": chain.recipe.seed, "bfloat16": chain.bfloat16}
    chain.stage("choose_examples", given, work)


def choose(chain: Chain) -> None:
    """Choose the weights that train, and write the selection and what was measured for it."""

    def work(meter: Meter) -> None:
        base = chain.load_base(quantised=False)  # scores need gradients, which 4-bit weights have not
        context = chain.context(base, meter)
        selection = chain.parameters.select(context)
        if not selection.parts:
            raise UserError(f"'{chain.parameters.name}' chose nothing on this base", field="parameters", expected="weights that it has",
                            mend="larger shares or bands, or other `targets`")  # fmt: skip
        selection.save(chain.run.path("selection.safetensors"))
        scores = context.block_scores
        blocks = [
            BlockScore(block=i, score=scores.get(i), trained=any(selection.covers(name) for name in block.parameters))
            for i, block in enumerate(base.anatomy.blocks)
        ]
        chain.run.write(
            "scores.json",
            Scores(
                method=chain.parameters.describe(),
                form=chain.form.describe(),
                blocks=blocks,
                trained_parameters=chain.form.count(base, selection),
                total_parameters=base.anatomy.total_parameters,
                examples=context.examples_scored,
                notes=context.notes,
            ),
        )

    chain.stage(
        "choose",
        {"parameters": chain.parameters.describe(), "form": chain.form.describe(), "seed": chain.recipe.seed},
        work,
    )
