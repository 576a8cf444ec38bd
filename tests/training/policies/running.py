"""Short training runs with a policy, for tests."""

from dataclasses import dataclass

import torch

from selectune import catalogue
from selectune.data import Encoder, Message, Record, pack
from selectune.meter import Meter
from selectune.models import load_base
from selectune.parameters import Context, Selection
from selectune.parameters.selection import Part
from selectune.recipe import TrainingRecipe
from selectune.training import Trainable, train
from selectune.training.partial import _PARTS, ENTRIES

RECORDS = [
    Record("chat", (Message("user", f"What is fault {i}?"), Message("assistant", f"Fault {i} means that lamp {i * 7} is red.")))
    for i in range(24)
]


def mixed(model):
    """Whole tensors, rows and single entries."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    whole = {name: Part(shapes[name]) for name in shapes if ".layers.3." in name}
    up, query = "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"
    draw = torch.Generator().manual_seed(3)
    return Selection({
        **whole, up: Part(shapes[up], "rows", [1, 5, 9, 77]),
        query: Part(shapes[query], "elements", torch.randperm(shapes[query][0] * shapes[query][1], generator=draw)[:200]),
    })  # fmt: skip


def blocks(model):
    """All blocks."""
    return Selection.of(model, [name for name, _ in model.named_parameters() if ".layers." in name])


@dataclass
class Ran:
    """What came of a run."""

    base: dict
    """The weights before, by name."""
    begun: dict
    """What the form made of them."""
    after: dict
    selection: Selection
    result: object
    model: object
    made: object
    """The base, as the form changed it."""
    cost: object


def dense(model):
    """Return the weights of a model, with the entries that train written into them."""
    for module in model.modules():
        for trained in getattr(module, _PARTS, {}).values():
            trained.current()
    return {name: value.detach().clone() for name, value in model.state_dict().items() if ENTRIES not in name}


def run(folder, base_folder, policy="none", *, choose=mixed, form="full", steps=6, rate=1e-2, bfloat16=False, seed=0,
        objective="cross_entropy", watching=(), **settings):  # fmt: skip
    """Train a tiny base with a policy."""
    base = load_base(base_folder, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    selection = choose(base.model)
    encoder = Encoder(base.tokenizer, 64)
    rows = pack([piece for record in RECORDS for piece in encoder.encode(record)], 64)
    settings = {"batch_sequences": 4, "micro_batch_sequences": 2, "evaluations": 2, "keep_best": False, "weight_decay": 0.1,
                "clip_norm": 0.5, "warmup_fraction": 0.0, **settings}  # fmt: skip
    meter = Meter("train")
    context = Context(base, encoder, RECORDS, [], torch.Generator().manual_seed(seed), meter)
    torch.manual_seed(seed)
    model = catalogue.create("adapters", form).apply(base, selection, seed)
    begun = dense(model)
    made = Trainable(model, rows[:-2], rows[-2:], catalogue.create("objectives", objective), bfloat16, folder, seed,
                     catalogue.create("policies", policy, "policy"), context)  # fmt: skip
    result = train(made, TrainingRecipe(**settings), steps=steps, learning_rate=rate, meter=meter, quiet=True, watching=watching)
    return Ran(before, begun, dense(model), selection, result, model, base, meter.cost)


def same(one, other):
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
