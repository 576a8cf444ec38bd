"""What an experiment may say: every mistake is one line with its place, and a budget means what it says."""

import pytest

from selectune import catalogue
from selectune.errors import UserError
from selectune.experiment import protocol
from selectune.experiment.budget import Facts, entries_of, fit, fit_examples, fit_knob
from selectune.experiment.lines import MethodLine
from selectune.experiment.page import paper_of
from selectune.experiment.plan import ENTRIES, RESOURCES, Plan, Slot
from selectune.experiment.store import Choice, Store, Trial
from selectune.meter import Cost

GOOD = """name: small
tasks:
  lamps:
    train: lamps.jsonl
methods:
  - fisher_blocks
  - name: gradient
    parameters: scored:score=gradient
    claim: {text: wins, better_than: random, on: gain}
training: {max_steps: 5}
"""
FACTS = Facts(fingerprint="x", total_parameters=1000, blocks=[100, 100, 100], bfloat16=False)
# what is put in place of what -> what must be said
MISTAKES = {
    "top": ("training:", "trainings:", [":10", "trainings", "did you mean 'training'"]),
    "task": ("    train: lamps", "    trian: lamps", [":4", "tasks.lamps.trian", "did you mean 'train'"]),
    "method": ("    parameters:", "    parameter:", [":8", "methods.1.parameter", "did you mean 'parameters'"]),
    "claim": ("better_than", "beter_than", [":9", "methods.1.claim.0.beter_than", "did you mean 'better_than'"]),
    "training": ("max_steps", "max_step", [":10", "training.max_step", "did you mean 'max_steps'"]),
    "name of a method": ("- fisher_blocks", "- fisher_block", [":6", "did you mean 'fisher_blocks'"]),
    "hyper-parameter": ("score=gradient", "scor=gradient", [":8", "did you mean 'score'"]),
    "compared with nobody": ("better_than: random", "better_than: rondom", [":9", "did you mean 'random'"]),
    "two rules": ("on: gain", "no_worse_than: random", [":9", "one of them"]),
    "side": ("on: gain", "on: speed", [":9", "speed"]),
    "wrong value": ("max_steps: 5", "max_steps: 0", [":10", "greater than 0"]),
    "rate": ("training: {", "training: {learning_rate: 0.1, ", [":10", "learning_rates"]),
    "same name twice": ("- name: gradient", "- name: fisher_blocks", ["second method"]),
    "seconds of nobody": (
        "training:",
        "tables: {resources: {like: rondom}}\ntraining:",
        [":10", "tables.resources.like", "did you mean 'random'"],
    ),
    "a budget of another": (
        "training:",
        "tables: {resources: {budgets: [0.02]}}\ntraining:",
        [":10", "tables.resources.budgets", "0.02", "0.01"],
    ),
    "no tasks": ("  lamps:\n    train: lamps.jsonl", "  {}", ["tasks"]),
}


def test_a_file_that_is_missing_or_empty_is_told_of_as_an_experiment(tmp_path):
    with pytest.raises(UserError, match=r"no such experiment.*docs/experiment\.md"):
        protocol.load(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match="holds no experiment"):
        protocol.load(tmp_path / "empty.yaml")


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_with_its_line(case, tmp_path):
    old, new, expected = MISTAKES[case]
    file = tmp_path / "e.yaml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as told:
        protocol.load(file)
    assert all(text in str(told.value) for text in [str(file), *expected]), str(told.value)


def load(tmp_path, **changes):
    text = GOOD
    for old, new in changes.values():
        text = text.replace(old, new)
    (tmp_path / "e.yaml").write_text(text)
    return protocol.load(tmp_path / "e.yaml")


def test_controls_are_there_unless_left_out(tmp_path):
    names = [line.name for line in load(tmp_path).lines()]
    assert names == ["random", "random_blocks", "full_fine_tuning", "lora", "last_blocks", "fisher_blocks", "gradient"]
    fewer = load(tmp_path, more=("training:", "controls: {lora: false, full_fine_tuning: false}\ntraining:"))
    assert [line.name for line in fewer.lines()][:3] == ["random", "random_blocks", "last_blocks"]


def test_learning_rates_come_from_the_nearest_place(tmp_path):
    loaded = load(tmp_path, more=("training:", "learning_rates: {all: [0.1], lora: [0.2, 0.3], gradient: [0.4]}\ntraining:"))
    rates = {line.name: loaded.rates(line) for line in loaded.lines()}
    assert rates["random"] == [0.1] and rates["lora"] == [0.2, 0.3] and rates["gradient"] == [0.4]
    assert load(tmp_path).rates(MethodLine(name="x", form="lora")) == [1e-3]


@pytest.mark.parametrize(
    ("best", "widen", "tried"),
    [(0.04, 2, [0.01, 0.02, 0.04, 0.08]), (0.04, 1, [0.01, 0.02, 0.04]), (0.02, 3, [0.01, 0.02, 0.04]), (0.0025, 1, [0.005, 0.01, 0.02]),
     (0.02, 0, [0.01, 0.02])],
)  # fmt: skip
def test_a_grid_grows_while_the_best_is_at_its_edge(tmp_path, best, widen, tried):
    (tmp_path / "lamps.jsonl").write_text('{"question": "Which lamp?", "answer": "The red one."}\n')
    changes = {"file": ("lamps.jsonl", str(tmp_path / "lamps.jsonl")),
               "rates": ("training:", f"learning_rates: [0.01, 0.02]\nwiden: {widen}\ntraining:")}  # fmt: skip
    loaded = load(tmp_path, **changes)
    plan = Plan(loaded, FACTS, Store(tmp_path / "runs"))
    slot = Slot(ENTRIES, next(line for line in loaded.lines() if line.name == "random"), "lamps", 0.1, 0)
    choice = Choice(form={"method": "full"}, parameters={"method": "random"})
    plan.store.write("choices", plan.choice_key(slot), choice)
    plan.store.chosen(plan.choice_key(slot)).parent.mkdir()
    plan.store.chosen(plan.choice_key(slot)).touch()
    while (missing := plan.next(slot)) is not None and missing.where == "trials":
        rate = missing.recipe.training.learning_rate
        loss = None if rate > 0.1 else abs(rate - best)  # training breaks down at large rates
        plan.store.write(
            "trials", missing.key, Trial(learning_rate=rate, dev_loss=loss, failed=None if loss is not None else "not finite")
        )
    assert sorted(plan.trials(slot, choice)) == tried
    assert plan.pieces(slot)["trials"] == 0 and missing.where == "cells"
    assert plan.best(slot)[1].learning_rate == min(tried, key=lambda rate: abs(rate - best))


@pytest.mark.parametrize(
    ("table", "of_random", "of_gradient"),
    [("{}", 10, "choosing and starting take 30 of 20 seconds"), ("{like: gradient}", 23, 10), ("{seconds: 60}", 36, 30),
     ("{like: gradient, memory_gib: 3}", 23, "needs 4.0 GiB, more than the 3 of the table")],
)  # fmt: skip
def test_at_equal_seconds_each_trains_as_long_as_its_choosing_leaves_time(tmp_path, table, of_random, of_gradient):
    (tmp_path / "lamps.jsonl").write_text('{"question": "Which lamp?", "answer": "The red one."}\n')
    loaded = load(
        tmp_path, file=("lamps.jsonl", str(tmp_path / "lamps.jsonl")),
        table=("training:", f"tables: {{resources: {table}}}\ntraining:"), steps=("max_steps: 5", "max_steps: 10"),
    )  # fmt: skip
    plan, lines = Plan(loaded, FACTS, Store(tmp_path / "runs")), {line.name: line for line in loaded.lines()}
    assert plan.steps_within(Slot(RESOURCES, lines["random"], "lamps", 0.01, 0)) == "not run"
    # seconds of choosing, of starting, and of each of ten steps
    for name, choosing, starting, step, memory in (("random", 0, 5, 1.5, 1), ("gradient", 20, 10, 1, 4)):
        slot = Slot(ENTRIES, lines[name], "lamps", 0.01, 0)
        choice = Choice(form={"method": "full"}, parameters={"method": "random"}, cost=Cost(stage="choose", seconds=choosing))
        trial = Trial(learning_rate=1e-3, dev_loss=1.0, steps=10, step_seconds=step,
                      cost=Cost(stage="train", seconds=starting + 10 * step, peak_memory_bytes=memory * 2**30))  # fmt: skip
        plan.store.write("choices", plan.choice_key(slot), choice)
        plan.store.chosen(plan.choice_key(slot)).parent.mkdir(exist_ok=True)
        plan.store.chosen(plan.choice_key(slot)).touch()
        for key, _ in plan.trials(slot, choice).values():
            plan.store.write("trials", key, trial)
    for name, expected in (("random", of_random), ("gradient", of_gradient)):
        slot = Slot(RESOURCES, lines[name], "lamps", 0.01, 0)
        found, missing = plan.steps_within(slot), plan.next(slot)
        assert expected == (found if isinstance(found, str) else found[1])
        if isinstance(expected, str):
            assert missing is None
        elif expected != 10:  # ten steps are those of the other table
            assert missing.where == "trials" and missing.recipe.training.max_steps == expected


def test_equal_seconds_can_be_of_one_budget_and_seed(tmp_path):
    loaded = load(
        tmp_path,
        more=("training:", "budgets: [0.01, 0.1]\nseeds: [0, 1]\ntables: {resources: {budgets: [0.1], seeds: [1]}}\ntraining:"),
    )
    slots = list(Plan(loaded, FACTS, Store(tmp_path)).slots(only="random"))
    assert [(slot.table, slot.budget, slot.seed) for slot in slots] == [
        (ENTRIES, 0.01, 0), (ENTRIES, 0.1, 0), (ENTRIES, 0.01, 1), (ENTRIES, 0.1, 1), (RESOURCES, 0.1, 1)]  # fmt: skip


def test_signals_are_shared_by_methods_and_by_nothing_else(tmp_path):
    (tmp_path / "lamps.jsonl").write_text('{"question": "Which lamp?", "answer": "The red one."}\n')
    loaded = load(tmp_path, file=("lamps.jsonl", str(tmp_path / "lamps.jsonl")))
    plan = Plan(loaded, FACTS, Store(tmp_path))
    slots = [Slot(ENTRIES, line, "lamps", budget, 0) for line in loaded.lines()[:2] for budget in (0.1, 0.2)]
    (key,) = {plan.signals_key(slot) for slot in slots}
    others = [
        Plan(loaded, FACTS.model_copy(update=change), Store(tmp_path)) for change in ({"fingerprint": "y"}, {"bfloat16": True})
    ]
    seed = Slot(ENTRIES, slots[0].line, "lamps", 0.1, 1)
    assert len({key, plan.signals_key(seed), *(other.signals_key(slots[0]) for other in others)}) == 4


def test_steps_alone_are_so_many_steps(tmp_path):
    assert load(tmp_path).training_of(MethodLine(name="x", parameters="all")).epochs == protocol.ENDLESS
    line = MethodLine(name="x", parameters="all", training={"optimiser": "lion"})
    both = load(tmp_path, more=("max_steps: 5", "max_steps: 5, epochs: 2"))
    assert both.training_of(line).epochs == 2 and both.training_of(line).optimiser == "lion"


def test_a_budget_is_entries_or_the_most_blocks_that_fit():
    assert entries_of(0.01, FACTS) == 10 and entries_of(250, FACTS) == 250
    scored = fit(MethodLine(name="s", parameters="scored"), 250, FACTS)
    assert scored.parameters["entries"] == 250 and scored.entries is None
    for entries, k in ((250, 2), (300, 3), (10, 1), (10_000, 3)):
        assert fit(MethodLine(name="b", parameters="last_blocks"), entries, FACTS).parameters["k"] == k
    assert fit(MethodLine(name="b", parameters="last_blocks:k=1"), 300, FACTS).parameters["k"] == 1
    assert fit(MethodLine(name="l", form="lora"), 250, FACTS).entries == 250
    assert fit(MethodLine(name="l", form="lora:rank=2"), 250, FACTS).entries is None
    assert fit(MethodLine(name="f", parameters="all"), 250, FACTS) == fit(MethodLine(name="f", parameters="all"), 10, FACTS)


def test_any_number_can_be_the_knob():
    gps = fit(MethodLine(name="g", parameters="gps"), 250, FACTS)
    assert (gps.entries, gps.knob) == (250, "k")
    assert fit(MethodLine(name="g", parameters="gps:k=2"), 250, FACTS).entries is None
    for entries, k in ((85, 8), (9, 1), (80, 8), (79, 7)):
        found = fit_knob(catalogue.create("parameters", "gps"), "k", entries, lambda method: 10 * method.k)
        assert found.k == k
    uneven = fit_knob(catalogue.create("parameters", "gps"), "k", 100, lambda method: 10 + 20 * (method.k - 1))
    assert uneven.k == 5


def test_a_rank_is_the_largest_that_fits(llama_folder):
    from selectune.experiment.budget import fit_rank
    from selectune.models import load_base
    from selectune.parameters import Selection

    base = load_base(llama_folder)
    everything, form = Selection.all(base.model), catalogue.create("adapters", "lora")
    each = form.model_copy(update={"rank": 1}).count(base, everything)
    for entries, rank in ((each * 3, 3), (each * 3 - 1, 2), (each - 1, 1)):
        fitted = fit_rank(form, base, everything, entries)
        assert fitted.rank == rank and fitted.count(base, everything) == rank * each
        assert fitted.alpha == 2 * rank
    described = catalogue.create("adapters", form.describe())
    assert fit_rank(described, base, everything, 3 * each).alpha == 6


def test_a_rank_is_one_that_the_form_takes(llama_folder):
    from selectune.experiment.budget import fit_rank
    from selectune.models import load_base
    from selectune.parameters import Selection

    base = load_base(llama_folder)
    selection, form = Selection.all(base.model), catalogue.create("adapters", "snella")
    counts = {rank: form.model_copy(update={"rank": rank}).count(base, selection) for rank in (2, 4, 5, 6)}
    assert fit_rank(form, base, selection, counts[5]).rank == 4
    assert fit_rank(form, base, selection, counts[6]).rank == 6
    assert fit_rank(form, base, selection, 1).rank == 2


def test_a_short_name_is_a_way_of_choosing_or_a_form():
    assert MethodLine.model_validate("lora:rank=4").form == "lora:rank=4"
    line = MethodLine.model_validate("fisher_blocks:examples=4")
    assert (line.parameters, line.form, line.name) == ("fisher_blocks:examples=4", "full", "fisher_blocks:examples=4")


EXAMPLES = """name: small
axis: examples
every_method: true
form: lora
tasks:
  lamps:
    train: lamps.jsonl
methods:
  - loss
  - {name: low, examples: "loss:keep=lowest", form: full}
"""


def test_an_experiment_about_examples(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(EXAMPLES)
    loaded = protocol.load(file)
    lines = {line.name: line for line in loaded.lines()}
    assert list(lines)[:5] == ["random", "longest", "every_record", "loss", "low"]
    assert lines["loss"].examples == "loss" and lines["loss"].parameters is None and lines["low"].form == "full"
    assert all(line.form == "lora" for name, line in lines.items() if name != "low")
    assert set(catalogue.methods("examples")) - {"all"} <= set(lines)
    assert loaded.seeds_of(lines["random"]) == [0, 1, 2, 3, 4] and loaded.seeds_of(lines["loss"]) == [0]
    file.write_text(EXAMPLES.replace("- loss", "- losss"))
    with pytest.raises(UserError, match="did you mean 'loss'"):
        protocol.load(file)
    file.write_text(EXAMPLES.replace("    train:", "    pool: {sources: [{train: a.jsonl, record: 3}]}\n    train:"))
    with pytest.raises(UserError, match="did you mean 'records'"):
        protocol.load(file)


def test_a_budget_of_tokens_is_held_by_every_line_that_sets_none():
    by_tokens = fit_examples(MethodLine(name="l", examples="loss"), 0.15).examples
    assert (by_tokens["fraction"], by_tokens["count"], by_tokens["by"]) == (0.15, None, "tokens")
    assert fit_examples(MethodLine(name="l", examples="loss"), 5000).examples["count"] == 5000
    own = fit_examples(MethodLine(name="l", examples="loss:count=9"), 0.15).examples
    assert (own["count"], own["by"]) == (9, "records")
    assert fit_examples(MethodLine(name="all", examples="all"), 0.15).examples == catalogue.create("examples", "all").describe()


@pytest.mark.parametrize(("line", "paper"), [
    ({"name": "gps", "parameters": "gps"}, "2312.10136"), ({"name": "a", "form": "lora"}, "2106.09685"),
    ({"name": "b", "form": "lora", "policy": "sparse_lora"}, "SparseLoRA"), ({"name": "c", "finish": "recovery"}, "2504.09757"),
    ({"name": "d", "examples": "ifd", "form": "lora"}, "2308.12032"), ({"name": "e", "paper": "Mine, 2026"}, "Mine, 2026"),
])  # fmt: skip
def test_a_line_cites_what_is_its_own(line, paper):
    """Not the form that it trains in, where something else is said too."""
    assert paper in paper_of(MethodLine(**line))
