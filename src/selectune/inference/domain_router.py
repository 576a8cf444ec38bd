"""Which specialist a prompt should go to: a small classifier that learns domain after domain without keeping any domain's data.

A prompt's features are its mean hidden states at some depths of the base, standardised and reduced. Of each domain only a mixture of two Gaussians
is kept; when a domain comes, a linear classifier trains on its features and on samples drawn from the mixtures of the domains before. General
prompts are the first domain: they go to the base itself.
Knows: features, mixtures, the classifier and its file. Does not know: specialists.

Source: SOYO, *Boosting Domain Incremental Learning: Selecting the Optimal Parameters is All You Need*, CVPR 2025, arXiv 2505.23744. The features
of several depths are laid side by side instead of being fused by a network of their own, and reduced by the first domain's components. What a
prompt goes to is a whole specialist instead of an adapter with a head of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from selectune.errors import UserError
from selectune.models.anatomy import Anatomy, within_context
from selectune.models.head import SplitModel


@torch.no_grad()
def features(model: Any, prompts: Sequence[Sequence[int]], depths: Sequence[float] = (0.33, 0.67, 1.0)) -> Tensor:
    """Return the prompts' mean hidden states behind some blocks, side by side, ``(prompts, depths * hidden)`` fp32.

    Args:
        prompts: token ids, the answers not among them. depths: shares of the base's blocks.
    """
    split, count, device = SplitModel(model), len(Anatomy.of(model).blocks), next(model.parameters()).device
    layers = [max(round(depth * count), 1) for depth in depths]
    rows = []
    for prompt in prompts:  # one by one: nothing is padded
        ids = torch.tensor([list(within_context(model, prompt))], device=device)
        states = split.decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        rows.append(torch.cat([states[layer][0].float().mean(0) for layer in layers]))
    return torch.stack(rows).cpu()


@dataclass
class Mixture:
    """Gaussians with full covariances."""

    weights: Tensor
    """``(components,)``, of sum 1."""
    means: Tensor
    """``(components, features)``."""
    covariances: Tensor
    """``(components, features, features)``."""

    @classmethod
    def of(cls, values: Tensor, components: int = 2, seed: int = 0) -> Mixture:
        """Fit a mixture to features, ``(n, features)``, from k-means on; fewer components where there are too few values."""
        from sklearn.mixture import GaussianMixture

        fitted = GaussianMixture(min(components, max(len(values) // 2, 1)), reg_covar=1e-3, random_state=seed).fit(
            values.double().numpy()
        )
        return cls(*(torch.tensor(one, dtype=torch.float64) for one in (fitted.weights_, fitted.means_, fitted.covariances_)))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw features, ``(count, features)`` fp32."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        roots = torch.linalg.cholesky(self.covariances)
        return (self.means[chosen] + torch.einsum("nij,nj->ni", roots[chosen], noise)).float()


@dataclass
class DomainRouter:
    """A linear classifier of domains, and what it remembers of each."""

    reduced: int = 64
    """Features after the reduction (principal components of the first domain's and all later ones' standard)."""
    batch: int = 64
    epochs: int = 30
    learning_rate: float = 0.05
    seed: int = 0
    domains: list[str] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    """``(domains, features)``; and a bias."""
    bias: Tensor = field(default_factory=lambda: torch.empty(0))
    _mean: Tensor = field(default_factory=lambda: torch.empty(0))
    _map: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, name: str, values: Tensor) -> None:
        """Learn a domain from its prompts' features, ``(n, features)``; nothing of them is kept but a mixture.

        In each batch ``batch // (domains before + 1)`` are new, the others are drawn from the mixtures of the domains before.

        Raises:
            UserError: its name is taken, or there are too few prompts.
        """
        if name in self.domains:
            raise UserError(f"there is a domain called '{name}' already", field="domain")
        if len(values) < 2:
            raise UserError(f"{len(values)} prompts say too little of '{name}'", field="domain", expected="at least 2")
        if not self.domains:
            self._standardise(values)
        own = self.reduce(values)
        generator = torch.Generator().manual_seed(self.seed + len(self.domains))
        before = [(number, mixture.sample(len(own), generator)) for number, mixture in enumerate(self.mixtures)]
        self.domains.append(name)
        self.mixtures.append(Mixture.of(own, seed=self.seed))
        self._train(own, before, generator)

    def _standardise(self, values: Tensor) -> None:
        self._mean = values.mean(0)
        spread = values.std(0).clamp(min=1e-6)
        _, sizes, axes = torch.linalg.svd((values - self._mean) / spread, full_matrices=False)
        kept = min(self.reduced, len(values) - 1, values.shape[1])
        scale = (sizes[:kept] / max(len(values) - 1, 1) ** 0.5).clamp(min=1e-3)
        self._map = (axes[:kept] / spread / scale[:, None]).t().contiguous()

    def reduce(self, values: Tensor) -> Tensor:
        """Return standardised and reduced features, ``(n, reduced)``."""
        return (values - self._mean) @ self._map

    def _train(self, own: Tensor, before: list[tuple[int, Tensor]], generator: torch.Generator) -> None:
        count, width = len(self.domains), own.shape[1]
        weight = torch.zeros(count, width)
        bias = torch.zeros(count)
        if len(self.weight):
            weight[:-1], bias[:-1] = self.weight, self.bias
        weight.requires_grad_(True), bias.requires_grad_(True)
        fresh = max(self.batch // count, 1)
        steps = max(-(-len(own) // fresh), 1) * self.epochs
        optimiser = torch.optim.SGD([weight, bias], lr=self.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            inputs, labels = self.compose(own, before, fresh, generator)
            loss = torch.nn.functional.cross_entropy(inputs @ weight.t() + bias, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        self.weight, self.bias = weight.detach(), bias.detach()

    def compose(
        self, own: Tensor, before: list[tuple[int, Tensor]], fresh: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return a batch: ``fresh`` of the new domain's features, the rest of what was drawn of the others, and whose each is."""
        pieces = [own[torch.randint(len(own), (fresh,), generator=generator)]]
        labels = [torch.full((fresh,), len(before))]
        if before:
            old = torch.cat([values for _, values in before])
            whose = torch.cat([torch.full((len(values),), number) for number, values in before])
            drawn = torch.randint(len(old), (self.batch - fresh,), generator=generator)
            pieces.append(old[drawn])
            labels.append(whose[drawn])
        return torch.cat(pieces), torch.cat(labels)

    def choose(self, values: Tensor) -> list[str]:
        """Return the domain of each prompt by its features, ``(n, features)``.

        Raises:
            UserError: no domain was learnt yet.
        """
        if not self.domains:
            raise UserError("the router knows no domain yet", expected="add one")
        return [self.domains[place] for place in (self.reduce(values) @ self.weight.t() + self.bias).argmax(1).tolist()]

    def save(self, path: Path) -> None:
        """Write the router as safetensors."""
        tensors = {"weight": self.weight, "bias": self.bias, "mean": self._mean, "map": self._map}
        for number, one in enumerate(self.mixtures):
            tensors |= {f"{number}.weights": one.weights, f"{number}.means": one.means, f"{number}.covariances": one.covariances}
        numbers = {"domains": self.domains, "reduced": self.reduced, "batch": self.batch, "epochs": self.epochs,
                   "learning_rate": self.learning_rate, "seed": self.seed}  # fmt: skip
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"router": json.dumps(numbers)})

    @classmethod
    def load(cls, path: Path) -> DomainRouter:
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            made = cls(**json.loads(file.metadata()["router"]))
            made.weight, made.bias, made._mean, made._map = (file.get_tensor(name) for name in ("weight", "bias", "mean", "map"))
            made.mixtures = [
                Mixture(*(file.get_tensor(f"{number}.{name}") for name in ("weights", "means", "covariances")))
                for number in range(len(made.domains))
            ]
        return made
