"""Training that gives away little of any single sequence: differential privacy.

Knows: the gradient of each sequence, its clipping, the noise, the account of what was spent (Opacus). Does not know: how the optimiser steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from selectune.errors import UserError
from selectune.training import processes
from selectune.training.policies.policy import Batch, Policy, Stage


class Private(Policy):
    """DP-SGD: each sequence's gradient is clipped, and noise of the size of the limit is added to their sum."""

    name: ClassVar[str] = "private"
    paper: ClassVar[str] = (
        "Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133; the private training under Efficient Differentially Private "
        "Fine-Tuning of LLMs via Reinforcement Learning, arXiv 2507.22565; noisy embeddings of arXiv 2312.15603"
    )
    summary: ClassVar[str] = "Differentially private training: clipped gradients of single sequences, with noise."
    departs: ClassVar[str] = (
        "Limits and noise are constant (no learnt controller). A sequence is the unit: what is protected is one sequence in place of another. "
        "Without a record others would be packed together, so set `data.packing: false` where single records are to be protected. The account is "
        "that of Poisson sampling; sequences are shuffled. All sequences weigh alike, however many tokens of theirs are learnt (in plain training "
        "tokens weigh alike). The noise follows from the run's seed, which must stay secret. Of the third paper only the noise on embeddings is "
        "here: no token is exchanged for another, all get the same noise, nothing is split between two parties, and the account leaves it out."
    )
    copies: ClassVar[int] = 2
    own_gradients: ClassVar[bool] = True

    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a sequence's gradient."""
    per: Literal["all", "module"] = "all"
    """Clipped as one; or each module (both matrices of an adapter) to an equal share, so that the whole keeps the limit."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the noise in limits; left out: as much as ``epsilon`` asks for."""
    epsilon: Annotated[float, Field(gt=0)] = 8.0
    """The privacy budget of the whole run."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability with which the promise may fail."""
    embedding_noise: Annotated[float, Field(gt=0)] | None = None
    """Rate of a noise on token embeddings, of density proportional to exp(-rate x norm); left out: none."""

    @property
    def changes_what_trains(self) -> bool:  # type: ignore[override]
        """Noisy embeddings make every pass another."""
        return self.embedding_noise is not None

    def before_step(self, stage: Stage) -> None:
        if "noise" not in stage.numbers:
            stage.numbers["noise"] = self.multiplier(stage) if self.noise is None else self.noise
        stage.passing["sums"], stage.passing["sequences"] = {}, 0

    def multiplier(self, stage: Stage) -> float:
        """Return the noise that spends the budget in the steps of the run."""
        found = _opacus().utils.get_noise_multiplier(target_epsilon=self.epsilon, target_delta=self.delta,
                                                     sample_rate=self.rate(stage), steps=stage.steps, accountant="rdp")  # fmt: skip
        return float(found)

    def rate(self, stage: Stage) -> float:
        """Return the share of the sequences in a batch."""
        return min(1.0, stage.batch_sequences / len(stage.rows))

    def spent(self, stage: Stage, steps: int) -> float:
        """Return the epsilon that some steps have spent; infinite without noise."""
        if not stage.numbers["noise"]:
            return float("inf")
        accountant = _opacus().RDPAccountant()
        accountant.history = [(stage.numbers["noise"], self.rate(stage), steps)]
        return float(accountant.get_epsilon(self.delta))

    def loss(self, stage: Stage, batch: Batch, plain: Callable[[], Tensor]) -> Tensor:
        for number in range(len(batch["input_ids"])):
            one = {key: value[number : number + 1] for key, value in batch.items() if key != "row"}
            source = stage.generator(f"embeddings/{stage.passing['sequences']}/{processes.rank()}")
            stage.passing["sequences"] += 1
            with _noisy(stage, self.embedding_noise, source) if self.embedding_noise else nullcontext():
                gradient = stage.gradient(one)
            clipped(gradient, self.clip, self.per)
            for name, value in gradient.items():
                stage.passing["sums"][name] = stage.passing["sums"][name].add_(value) if name in stage.passing["sums"] else value
        return plain()

    def gradients(self, stage: Stage) -> None:
        source = stage.generator("noise")
        count = float(stage.mean(torch.tensor(float(stage.passing.pop("sequences"))))) * processes.count()
        sums = stage.passing.pop("sums")
        for name, value in stage.parameters.items():
            drawn = torch.randn(value.shape, generator=source).to(value.device) * (stage.numbers["noise"] * self.clip)
            total = stage.mean(sums[name]) * processes.count() if name in sums else torch.zeros_like(value)
            value.grad = (total + drawn) / count

    def after_step(self, stage: Stage) -> None:
        if self.noise is None or self.noise > 0:
            stage.numbers["epsilon"] = self.spent(stage, stage.step + 1)


def clipped(gradient: dict[str, Tensor], limit: float, per: str = "all") -> None:
    """Shorten a gradient in place to a norm of at most ``limit``; of each module to an equal share of it."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, value in gradient.items():
        groups["" if per == "all" else name.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias")].append(value)
    for members in groups.values():
        norm = torch.stack([value.norm() for value in members]).norm()
        share = limit / len(groups) ** 0.5
        for value in members:
            value.mul_((share / norm.clamp(min=1e-12)).clamp(max=1.0))


@contextmanager
def _noisy(stage: Stage, rate: float, source: torch.Generator) -> Iterator[None]:
    """Within, every token's embedding is moved in a random direction by a Gamma-distributed distance."""

    def move(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output + noise(tuple(output.shape), rate, source).to(output)

    handle = stage.whole.causal.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def noise(shape: tuple[int, ...], rate: float, source: torch.Generator) -> Tensor:
    """Return noise of density proportional to ``exp(-rate x norm)`` over the last dimension."""
    direction = torch.randn(shape, generator=source)
    distance = torch._standard_gamma(torch.full((*shape[:-1], 1), float(shape[-1])), generator=source) / rate
    return direction / direction.norm(dim=-1, keepdim=True) * distance


def _opacus() -> Any:
    try:
        import opacus.accountants
        import opacus.accountants.utils
    except ImportError:
        raise UserError("the account of privacy is kept by Opacus, which is not installed", field="policy",
                        mend="pip install 'selectune[private]'") from None  # fmt: skip
    return opacus.accountants
