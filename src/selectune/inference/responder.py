"""Whoever answers: the base at hand, another local model, or an endpoint.

Knows: what every responder gives, and which one a method's settings name. Does not know: how any of them answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from selectune.data.records import Message
from selectune.errors import UserError
from selectune.inference.local import LocalResponder

if TYPE_CHECKING:
    from selectune.examples.pool import Pool


class Responder(Protocol):
    """Whoever answers."""

    def answers(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        samples: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> list[list[str]]:
        """Return ``samples`` answers to each prompt.

        Args:
            temperature: 0 for the likeliest answer (all samples are then one and the same). seed: of what is drawn.

        Raises:
            UserError: the model does not answer.
        """
        ...


class Asking(BaseModel):
    """Settings of a method that asks a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by_endpoint: str | None = None
    """Address of an OpenAI-compatible endpoint that answers, such as ``http://localhost:8000/v1``; left out: a model on this machine does."""
    by_model: str | None = None
    """The model's name at the endpoint; without one, a local base (built-in name, folder or hub id) that answers instead of the run's."""
    key_from: str | None = None
    """Environment variable with the endpoint's key; left out: OPENAI_API_KEY for api.openai.com, and no key is sent anywhere else."""
    most_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens that one run may use of the endpoint, read and written."""
    most_cost: Annotated[float, Field(gt=0)] | None = None
    """What one run may cost at the endpoint, by the prices."""
    price_read: Annotated[float, Field(ge=0)] = 0.0
    """Of a million tokens that the endpoint reads."""
    price_written: Annotated[float, Field(ge=0)] = 0.0
    """Of a million tokens that it writes."""


def kept_in(pool: Pool) -> Path | None:
    """Return the file that keeps answers beside what is measured of a pool."""
    return None if pool.folder is None else pool.folder / "answers.sqlite"


def responder(settings: Asking, pool: Pool) -> Responder:
    """Return whoever answers a method's questions; answers are kept in the pool's folder, those of endpoints in the user's cache, for all runs.

    Raises:
        UserError: an endpoint without a model's name, a key or an address that will not do, a model that cannot be loaded.
    """
    if settings.by_endpoint is not None:
        return _of_endpoint(settings, pool)
    kept = kept_in(pool)
    if settings.by_model is None:
        return LocalResponder(pool.base, pool.encoder, pool.meter, kept, pool.quiet, pool.rehearsal)
    from selectune.models import load_base

    base = load_base(settings.by_model, dtype="auto" if pool.bfloat16 else "float32")
    return LocalResponder(base, pool.make_encoder(base.tokenizer), pool.meter, kept, pool.quiet, pool.rehearsal)


def _of_endpoint(settings: Asking, pool: Pool) -> Responder:
    from selectune.inference.endpoint import Budget, EndpointResponder
    from selectune.models.builtin import cache_folder

    if settings.by_model is None:
        raise UserError("an endpoint needs the name of a model", field="by_model", expected="a model that the endpoint has")
    if settings.most_cost is not None and not (settings.price_read or settings.price_written):
        raise UserError(
            "a limit of costs needs prices", field="most_cost", expected="price_read and price_written, of a million tokens"
        )
    return EndpointResponder(
        settings.by_endpoint or "",
        settings.by_model,
        settings.key_from,
        Budget(settings.most_tokens, settings.most_cost, (settings.price_read, settings.price_written)),
        kept=cache_folder() / "answers.sqlite",
        quiet=pool.quiet,
        rehearsal=pool.rehearsal,
    )
