"""The stage that changes once more what was trained, where the recipe says so; and the specialist as it then is.

Knows: what is kept beside the finished specialist, and how it is put back. Does not know: what changes (:mod:`selectune.merging`).
"""

from __future__ import annotations

import shutil
from typing import Any

from selectune.meter import Meter
from selectune.pipeline.chain import Chain
from selectune.run import folder_atomically

TRAINED = "trained"
"""The folder that keeps what training left, where it was finished."""


def finish(chain: Chain) -> None:
    """Change what was trained once more, where the recipe says so; what training left is kept beside it."""
    from selectune.training import processes

    trained, specialist = chain.run.path(TRAINED), chain.run.path("specialist")

    def put_back() -> None:
        if trained.exists():
            shutil.rmtree(specialist, ignore_errors=True)
            trained.rename(specialist)
        for told in ("finish.json", "stages/finish.json"):
            chain.run.path(told).unlink(missing_ok=True)

    def work(meter: Meter) -> None:
        from selectune.merging.delta import Delta
        from selectune.merging.export import merged
        from selectune.models import load_base

        put_back()
        model, base = (
            load_base(chain.recipe.base, dtype="float32", trust_remote_code=chain.recipe.trust_remote_code) for _ in range(2)
        )
        plain = merged(model, specialist)
        told = chain.finishing.finish(plain, chain.context(base, meter))
        delta = Delta.of(base, plain.to(base.dtype))
        specialist.rename(trained)
        with folder_atomically(specialist) as folder:
            delta.save(folder, original=False)
        meter.count(written=sum(file.stat().st_size for file in specialist.iterdir()))
        chain.run.write("finish.json", {"method": chain.finishing.describe(), "told": told})

    if chain.finishing.name == "none":
        if processes.first():
            put_back()
        return
    chain.stage("finish", {"finish": chain.finishing.describe(), "seed": chain.recipe.seed}, work)


def specialist(chain: Chain) -> tuple[Any, Any]:
    """Load the base and put the specialist on it; what was finished are weights of the base as it is, quantised or not."""
    from selectune.adapters import load_specialist

    base = chain.load_base(quantised=chain.finishing.name == "none")
    return base, load_specialist(base, chain.run.path("specialist"))
