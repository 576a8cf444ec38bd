"""A stage around a tiny model, without a trainer."""

import torch

from selectune import catalogue
from selectune.meter import Meter
from selectune.training.loss import LossOfModel
from selectune.training.policies import Stage
from tests.tiny import tiny


def batch(sequences=2, length=20, seed=0):
    """Sequences of one record each."""
    ids = torch.randint(3, 250, (sequences, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(sequences, -1).contiguous()}


def stage(model=None, rows=4, seed=0, everything=True):
    """Everything trains, or what already does."""
    model = model or tiny("llama")
    if everything:
        model.requires_grad_(True)
    made = [{key: value[0] for key, value in batch(1, seed=number).items()} for number in range(rows)]
    found = Stage(LossOfModel(model, catalogue.create("objectives", "cross_entropy"), False), seed, 10, Meter("train"), made)
    found.optimiser = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])
    return found


def make(choice):
    return catalogue.create("policies", choice, "policy")
