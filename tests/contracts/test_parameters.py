"""The contract of every method that chooses weights, on tiny models of several architectures.

Whatever the method: the budget is exact, the choice is deterministic and leaves the base as it was, training changes what was chosen
and nothing else (weight decay, clipping, accumulation and bf16 included), a budget that makes no sense is refused in one line, and a base on which
it has nothing to act too. A method is covered as soon as it is in the catalogue.
"""

import pytest
import torch

from selectune import catalogue
from selectune.adapters.form import load_specialist
from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.meter import Meter
from selectune.models import load_base
from selectune.parameters import Context, Selection
from selectune.parameters.blocks import Blocks
from selectune.parameters.factors.targets import targets
from selectune.parameters.method import Budgeted
from tests.contracts.test_forms_and_parameters import logits, train_a_little
from tests.tiny import ARCHITECTURES

METHODS = catalogue.methods("parameters")
SMALL = {
    "density": 0.02,
    "k": 2,
    "examples": 2,
    "steps": 2,
    "side": 16,
    "rank": 4,
    "trials": 3,
    "finalists": 2,
    "population": 4,
    "parents": 2,
    "generations": 1,
}
"""Settings that make a tiny model enough, for the methods that have them."""
RECORDS = [
    Record("chat", (Message("user", f"What is fault {i}?"), Message("assistant", f"Fault {i} means that lamp {i * 7} is on.")))
    for i in range(6)
]


def context(base, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = base.model.dtype == torch.bfloat16
    return Context(
        base, Encoder(base.tokenizer, 128), RECORDS, RECORDS[:2], generator, Meter("choose"), quiet=True, bfloat16=mixed
    )


def make(name, **values):
    known = METHODS[name].model_fields
    return catalogue.create("parameters", {"method": name} | {k: v for k, v in (SMALL | values).items() if k in known})


DENSE = {name for name in ARCHITECTURES if name != "mixtral"}
NOTHING_FOR = {
    "biases": {"llama", "mixtral", "gemma2"},  # they have none
    "d_pruner": {"mixtral"},  # stacks of experts have no inputs to be scored by
    "esft": DENSE,
    "router_lens": DENSE,
    "language_neurons": {"mixtral"},  # neurons of experts are not told apart
    "s2ft": {"mixtral"},  # no dense down projection
}
"""Method -> bases on which it has nothing to act; everywhere else it must choose."""
CASES = [(name, base) for name in METHODS for base in ARCHITECTURES if base not in NOTHING_FOR.get(name, ())]


def chosen(name, base, seed=0, **values):
    return make(name, **values).select(context(base, seed))


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, base) for name, bases in NOTHING_FOR.items() for base in sorted(bases)]
)
def test_a_base_with_nothing_to_act_on_is_refused_in_one_line(name, architecture, tiny_folders):
    with pytest.raises(UserError) as error:
        chosen(name, load_base(tiny_folders[architecture]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_the_choice_is_exact_deterministic_and_leaves_the_base_as_it_was(name, architecture, tiny_folders):
    base = load_base(tiny_folders[architecture])
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    flags = {key: value.requires_grad for key, value in base.model.named_parameters()}
    first = chosen(name, base)
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert flags == {key: value.requires_grad for key, value in base.model.named_parameters()}
    assert first == chosen(name, load_base(tiny_folders[architecture]))
    shapes = {key: tuple(value.shape) for key, value in base.model.named_parameters()}
    assert first.count() > 0
    assert all(part.shape == shapes[key] for key, part in first.parts.items())
    assert first.count() == sum(int(first.mask(key).sum()) for key in first.names())
    method = make(name)
    if isinstance(method, Blocks):
        touched = [block for block in base.anatomy.blocks if any(first.covers(key) for key in block.parameters)]
        assert len(touched) == 2
        assert first.count() == sum(base.anatomy.sizes[key] for block in touched for key in block.parameters)
    elif isinstance(method, Budgeted) and method.exact:
        eligible = targets(base, method.targets)
        budget = method.budget(eligible)
        if all(part.form == "elements" for part in first.parts.values()):
            assert first.count() == budget
        else:
            assert 0 < first.count() <= budget


@pytest.mark.parametrize("name", [name for name in METHODS if "llama" not in NOTHING_FOR.get(name, ())])
def test_what_another_choice_measured_changes_neither_the_choice_nor_its_cost(name, tiny_folders):
    base, shared = load_base(tiny_folders["llama"]), {}
    for size in ({}, {"density": 0.05, "k": 3}, {}):
        alone, together = context(base), context(base)
        together.kept = shared
        method = make(name, **size)
        assert method.select(alone) == method.select(together)
        costs = [one.meter.cost.model_dump(exclude={"seconds", "peak_memory_bytes"}) for one in (alone, together)]
        assert costs[0] == costs[1] and alone.examples_scored == together.examples_scored


def test_scores_are_measured_once_for_several_choices(tiny_folders):
    base, shared, asked = load_base(tiny_folders["llama"]), {}, []

    def measure():
        asked.append(torch.rand(1, generator=one.generator))
        one.meter.count(forward=7)
        return {"weight": asked[-1]}

    for seed in (0, 0, 1):
        one = context(base, seed)
        one.kept = shared
        one.once("a score", measure)
        assert one.meter.cost.forward_tokens == 7
        after = torch.rand(1, generator=one.generator)
        torch.rand(1, generator=(other := torch.Generator().manual_seed(seed)))
        assert after == torch.rand(1, generator=other)  # whoever draws later draws the same
    assert len(asked) == 2
    one.train = one.train[:3]
    one.generator.manual_seed(0)
    one.once("a score", measure)  # other records
    one.generator.manual_seed(0)
    one.once("another", measure)
    assert len(asked) == 4


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_training_changes_what_was_chosen_and_nothing_else(name, architecture, tiny_folders, tmp_path):
    base = load_base(tiny_folders[architecture], dtype=torch.bfloat16)
    original = {key: value.clone() for key, value in base.model.named_parameters()}
    selection = chosen(name, base)
    form = catalogue.create("adapters", "full")
    model = form.apply(base, selection, 0)
    with torch.autocast("cpu", torch.bfloat16):
        train_a_little(model, base)
    form.save(model, base, selection, tmp_path)
    again = load_base(tiny_folders[architecture], dtype=torch.bfloat16)
    loaded = load_specialist(again, tmp_path)
    changed = 0
    for key, value in loaded.named_parameters():
        mask = selection.mask(key) if selection.covers(key) else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(value[~mask], original[key][~mask]), key
        changed += int((value != original[key]).sum())
    assert changed > 0
    Selection.load(tmp_path / "selection.safetensors") if not selection.whole() else None
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, Budgeted)])
def test_budgets_that_make_no_sense_are_refused_in_one_line(name, llama_folder):
    base = load_base(llama_folder)
    for wrong in ({"entries": 10**9}, {"density": 1e-9}):
        with pytest.raises(UserError) as error:
            make(name, **wrong).select(context(base))
        assert "parameters." in str(error.value)
    for wrong in ({"density": 0}, {"density": 1.5}, {"entries": 0}):
        with pytest.raises(UserError):
            make(name, **wrong)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, Blocks)])
def test_more_blocks_than_there_are_is_refused(name, llama_folder):
    with pytest.raises(UserError, match="the base has 4"):
        make(name, k=5).select(context(load_base(llama_folder)))
