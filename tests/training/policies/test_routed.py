"""LANDeRMT's routing: a neuron learns from its own groups' records alone, and everything else from all (card: faithful-if 2 and 4)."""

import pytest
import torch

from selectune import catalogue
from selectune.data import Encoder, Message, Record, pack
from selectune.data.packing import stack
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.objectives.cross_entropy import CrossEntropy
from selectune.parameters import Context, Selection
from selectune.training.loss import LossOfModel
from selectune.training.partial import train_entries
from selectune.training.policies.policy import Stage

RECORDS = {
    name: [
        Record("chat", (Message("user", f"{name} {i}?"), Message("assistant", f"{name} {i} is {i * 7}.")), source=name)
        for i in range(5)
    ]
    for name in ("fault", "lamp", "red")
}
CHOICE = "language_neurons:k=2,general=0.3,kappa=0.9,examples=4"


class Trial:
    """One step by hand, up to the gradients."""

    def __init__(self, folder, groups, choose=None, **settings):
        self.base = load_base(folder)
        everyone = [record for name in ("fault", "lamp", "red") for record in RECORDS[name]]
        self.encoder = Encoder(self.base.tokenizer, 64)
        context = Context(self.base, self.encoder, everyone, [], torch.Generator().manual_seed(0), Meter("train"), quiet=True)
        method = catalogue.create("parameters", CHOICE)
        _, self.roles = method.roles(context)
        chosen = Selection.of(self.base.model, [n for n, _ in self.base.model.named_parameters() if ".layers." in n])
        train_entries(self.base.model, method.select(context) if choose is None else chosen)
        self.base.model.zero_grad()
        whole = LossOfModel(self.base.model, CrossEntropy(), False)
        self.rows = pack([piece for name in groups for record in RECORDS[name] for piece in self.encoder.encode(record)], 64)
        self.stage = Stage(whole, 0, 5, context.meter, self.rows, context)
        self.policy = catalogue.create("policies", {"method": "routed", "parameters": CHOICE, **settings})
        self.policy.begin(self.stage)
        assert all(value.grad is None for value in self.stage.parameters.values())
        self.policy.before_step(self.stage)

    def plain(self, batch):
        return self.stage.whole(**batch) / 100

    def routed(self):
        batch = stack(self.rows)
        loss = self.policy.loss(self.stage, batch, lambda other=batch: self.plain(other))
        loss.backward()
        return loss

    def gradients(self):
        return {name: value.grad.clone() for name, value in self.stage.parameters.items() if value.grad is not None}


def test_each_entry_has_the_gradient_of_its_own_groups_records(llama_folder):
    groups = ["fault", "lamp", "red"]
    trial = Trial(llama_folder, groups, choose="all")
    loss = trial.routed()
    assert torch.allclose(loss, sum(trial.plain({k: v[None] for k, v in row.items()}) for row in trial.rows), rtol=1e-5)
    own = {group: _unrouted(llama_folder, group) for group in groups}
    found = trial.gradients()
    assert found.keys() == own["fault"].keys()
    looked_at, specific = _looked_at(trial), 0
    for name, gradient in found.items():
        wanted = sum(own[group][name] for group in groups)
        block = int(name.split(".layers.")[1].split(".")[0])
        if ".mlp." in name and block in looked_at:
            for neuron in range(trial.roles[""].shape[1]):
                its = [group for group in groups if trial.roles[group][block, neuron]]
                if any(mask[block, neuron] for role, mask in trial.roles.items() if role) and len(its) < 3:
                    place = (slice(None), neuron) if "down" in name else neuron
                    wanted[place] = sum(own[group][name][place] for group in its)  # 0, where only general conversations need it
                    specific += 1
        assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-7), name
    assert specific > 20


def _looked_at(trial):
    method = catalogue.create("parameters", CHOICE)
    blocks, _ = method.roles(trial.stage.context)
    return blocks


def _unrouted(folder, group):
    trial = Trial(folder, [group], choose="all")
    trial.plain(stack(trial.rows)).backward()
    return trial.gradients()


def test_rows_of_groups_that_are_not_in_the_batch_stay_bit_for_bit(llama_folder):
    """Under AdamW with momentum and weight decay."""
    trial = Trial(llama_folder, ["fault"])
    optimiser = torch.optim.AdamW(trial.stage.parameters.values(), lr=0.1, weight_decay=0.1)
    for value in trial.stage.parameters.values():
        value.grad = torch.ones_like(value)
    optimiser.step()  # everything has momentum
    optimiser.zero_grad()
    before = trial.stage.values()
    trial.stage.passing["heard"].add("lamp")  # in the step before
    trial.policy.before_step(trial.stage)
    trial.routed()
    with torch.no_grad():
        trial.policy.gradients(trial.stage)
        optimiser.step()
        trial.policy.after_step(trial.stage)
    stayed = moved = 0
    for name, mask in trial.stage.passing["hears"]["fault"].items():
        value = trial.stage.parameters[name]
        assert torch.equal(value[~mask], before[name][~mask]) and (value[mask] != before[name][mask]).all(), name
        stayed, moved = stayed + int((~mask).sum()), moved + int(mask.sum())
    assert stayed and moved


def test_a_neurons_rows_and_column_go_together(llama_folder):
    trial = Trial(llama_folder, ["fault"], choose="all")
    for group, masks in trial.stage.passing["hears"].items():
        for block in _looked_at(trial):
            up, gate, down = (masks[f"model.layers.{block}.mlp.{name}_proj.weight"] for name in ("up", "gate", "down"))
            others = torch.stack([mask[block] for name, mask in trial.roles.items() if name]).any(0) & ~trial.roles[group][block]
            assert torch.equal(up[:, 0], ~others) and torch.equal(up, gate) and torch.equal(up, down.T) and others.any()


def test_records_of_nobody_move_everything(llama_folder):
    trial = Trial(llama_folder, ["fault", "lamp"], choose="all")
    plain = Trial(llama_folder, ["fault", "lamp"], choose="all")
    trial.stage.passing["group of"] = {}
    trial.routed()
    plain.plain(stack(plain.rows)).backward()
    assert trial.policy.factors(trial.stage) == {}
    trial.stage.passing["heard"].add("fault")
    assert trial.policy.factors(trial.stage) == {}
    wanted = plain.gradients()
    assert all(torch.allclose(value, wanted[name], rtol=1e-3, atol=1e-7) for name, value in trial.gradients().items())


def test_the_runs_own_choice_says_whose_neurons_are(llama_folder):
    policy = catalogue.create("policies", "routed")
    assert policy.for_run(CHOICE).parameters == CHOICE and policy.for_run("half").parameters is None
    assert (
        catalogue.create("policies", {"method": "routed", "parameters": CHOICE}).for_run("language_neurons").parameters == CHOICE
    )
    with pytest.raises(UserError, match=r"'random' does not say whose"):
        Trial(llama_folder, ["fault"], parameters="random")
