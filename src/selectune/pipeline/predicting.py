"""What a run would train and take: the chain as far as training, tried out on a few examples.

Knows: which stages are run for it, and what of a choice is extrapolated. Does not know: how steps are timed and memory is counted
(:mod:`selectune.training.predict`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from selectune import catalogue
from selectune.meter import Meter
from selectune.pipeline.chain import Chain
from selectune.pipeline.choosing import choose, choose_examples
from selectune.pipeline.preparing import prepare
from selectune.pipeline.training import trainable
from selectune.run import DataSummary

if TYPE_CHECKING:
    from selectune.training import Prediction

_REHEARSED = 6
"""Examples on which a prediction chooses. Each has a length of its own, as those of the run will have, and compiles kernels for it."""


def predict(chain: Chain) -> Prediction:
    """Prepare the data, choose by a few examples, run a few steps of training, and say what the whole will take."""
    from selectune.inference.remembering import Rehearsal

    prepare(chain)
    chain.rehearsal = asked = Rehearsal()
    choose_examples(chain)
    choosing, notes = _rehearse_choice(chain)
    if asked.calls:
        notes.append(f"to choose its records the run asks a model {asked.calls:,} questions (about {asked.read:,} tokens read, at most "
                     f"{asked.written:,} written), which took no time here")  # fmt: skip
    begin = time.perf_counter()
    from selectune.training import predict as timing  # what training imports is loaded in the stage that is predicted

    made, base, selection = trainable(chain, Meter("plan"))
    return timing.predict(
        made,
        chain.training,
        anatomy=base.anatomy,
        save=lambda folder: chain.form.save(made.model, base, selection, folder),
        loading=time.perf_counter() - begin,
        choosing=choosing,
        form=chain.form.describe(),
        parameters=catalogue.create("parameters", chain.recipe.parameters).describe(),
        tokens=chain.run.read("data.json", DataSummary).tokens,
        notes=notes,
    )


def _rehearse_choice(chain: Chain) -> tuple[float, list[str]]:
    """Choose with as few examples as possible; return the seconds that the recipe's own choice will take, and what was assumed."""
    asked = chain.parameters
    wanted = min(getattr(asked, "examples", 0), len(chain.records("train")))
    if wanted <= _REHEARSED:
        choose(chain)
        return chain.run.costs()[-1].seconds, []
    begin = time.perf_counter()
    chain.load_base(quantised=False)
    loading = time.perf_counter() - begin
    chain.parameters = asked.model_copy(update={"examples": _REHEARSED})
    choose(chain)
    took = chain.run.costs()[-1].seconds
    each = max(took - loading, 0.0) / _REHEARSED
    note = f"the weights were chosen by {_REHEARSED} examples instead of {wanted}, and may be others in the run"
    return took + (wanted - _REHEARSED) * each, [note]
