"""A specialist learns for one question and is then what it was: SIFT's stop, the steps against a plain loop, every weight bit for bit."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from selectune import catalogue, cli
from selectune.data import Encoder, Message, Record, pack
from selectune.errors import UserError
from selectune.inference.test_time import Settings, Specialist, adapted, worth_a_step
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.recipe import Recipe
from selectune.run import Run
from tests.examples.words import words  # noqa: F401
from tests.training.policies.running import mixed

pytestmark = pytest.mark.usefixtures("words")


def record(question, answer):
    return Record("chat", (Message("user", question), Message("assistant", answer)))


POOL = [record(f"What does fault {i} mean?", f"Lamp {i * 7}.") for i in range(6)] + [record("Who sings?", "A bird.")]


def unit(values):
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def test_a_step_is_worth_it_while_the_uncertainty_is_low_enough():
    generator = np.random.default_rng(0)
    vectors, wanted = unit(generator.normal(size=(60, 8))), unit(generator.normal(size=8))
    order = np.arange(60)
    loud = {"steps": 30, "neighbours": 20, "noise": 0.5}
    everything, left = worth_a_step(vectors, wanted, order, Settings(alpha=None, **loud))
    near = set(np.argsort(-(vectors @ wanted))[:20].tolist())
    assert len(everything) == 30 and set(everything) <= near and len(left) == 31
    assert left[0] == pytest.approx(1) and all(a >= b for a, b in pairwise(left))
    counts = []
    for alpha in (0.01, 0.2, 0.5, 1.0, 5.0):
        places, after = worth_a_step(vectors, wanted, order, Settings(alpha=alpha, **loud))
        counts.append(next((n - 1 for n in range(1, 31) if left[n] > 1 / (alpha * n)), 30))
        assert places == everything[: counts[-1]] and after == left[: counts[-1] + 1]
    assert counts == sorted(counts, reverse=True) and counts[0] == 30 and counts[-1] == 0 and len(set(counts)) > 3
    turned = worth_a_step(vectors[::-1], wanted, order[::-1], Settings(alpha=None, **loud))[0]
    assert [59 - place for place in turned] == everything


def test_what_points_away_from_the_question_is_not_learnt_from():
    """An antipode would count as much as the question itself: squares know no sign."""
    wanted = unit(np.array([1.0, 0, 0]))
    vectors = unit(np.array([[-1.0, 0, 0], [0.5, 1, 0], [-0.9, 0, 0.1]]))
    places, left = worth_a_step(vectors, wanted, np.arange(3), Settings(alpha=None, steps=4))
    assert set(places) == {1} and len(left) == 5
    assert worth_a_step(vectors[[0, 2]], wanted, np.arange(2), Settings(alpha=None)) == ([], [pytest.approx(1)])


def specialist(folder, base_folder, form, dtype="float32", choose=None):
    """A specialist as a run leaves it, after a disturbance instead of a training."""
    base = load_base(base_folder, dtype=dtype)
    selection = (choose or (lambda model: Selection.of(model, [n for n, _ in model.named_parameters() if ".layers." in n])))(
        base.model
    )
    made = catalogue.create("adapters", form)
    model = made.apply(base, selection, 0)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=source), alpha=0.02)
    run = Run.create(folder, Recipe(base=str(base_folder), form=form, data={"train": "none.jsonl", "max_length": 64}))
    run.path("specialist").mkdir()
    made.save(model, base, selection, run.path("specialist"))
    return run


FORMS = [("lora", None), ("full", None), ("full", mixed), ("lofit", None), ("snella", None), ("ssf", None)]


@pytest.mark.parametrize(("form", "choose"), FORMS)
def test_every_weight_is_what_it_was(form, choose, tmp_path, llama_folder):
    run = specialist(tmp_path / "run", llama_folder, form, choose=choose)
    one = Specialist(run)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    kinds = [type(module) for module in one.model.modules()]
    encoder = Encoder(one._tokenizer, 64)
    rows = [pack(encoder.encode(record), 64)[0] for record in POOL[:3]]
    probe = rows[0]["input_ids"][None]
    with torch.no_grad():
        said = one.model(probe).logits
    with adapted(one.model, one._folder, one._added, rows, 1e-2, False) as losses, torch.no_grad():
        assert len(losses) == 3 and not torch.allclose(one.model(probe).logits, said, atol=1e-3)
    after = one.model.state_dict()
    assert before.keys() == after.keys() and [type(module) for module in one.model.modules()] == kinds
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert not any(value.requires_grad or value.grad is not None for value in one.model.parameters())
    with torch.no_grad():
        assert torch.equal(one.model(probe).logits, said)


@pytest.mark.parametrize(("form", "choose"), [("lora", None), ("full", mixed)])
def test_bf16_weights_come_back_too_even_after_a_mistake(form, choose, tmp_path, llama_folder):
    run = specialist(tmp_path / "run", llama_folder, form, dtype="bfloat16", choose=choose)
    one = Specialist(run)
    one.model.to(torch.bfloat16)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    rows = [pack(Encoder(one._tokenizer, 64).encode(POOL[0]), 64)[0]]
    for wrong in (rows, [rows[0], {}]):  # and one in the middle of learning
        with pytest.raises((ZeroDivisionError, KeyError)), adapted(one.model, one._folder, one._added, wrong, 1e-2, True):
            raise ZeroDivisionError
        after = one.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_the_steps_are_those_of_a_plain_loop(tmp_path, llama_folder):
    run = specialist(tmp_path / "run", llama_folder, "full")
    one = Specialist(run)
    rows = [pack(Encoder(one._tokenizer, 64).encode(record), 64)[0] for record in (POOL[0], POOL[0], POOL[4])]
    model = copy.deepcopy(one.model)
    trained = [value.requires_grad_(True) for name, value in model.named_parameters() if ".layers." in name]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for row in rows:
        end = int((row["labels"] != -100).nonzero().max()) + 1
        loss = model(input_ids=row["input_ids"][None, :end], labels=row["labels"][None, :end]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    with adapted(one.model, one._folder, one._added, rows, 1e-2, False) as found:
        assert found == pytest.approx(losses, rel=1e-3)
        for name, value in one.model.named_parameters():
            assert torch.allclose(value, dict(model.named_parameters())[name], atol=2e-3), name


def test_what_is_learnt_is_about_the_question(tmp_path, llama_folder):
    pool = tmp_path / "pool.jsonl"
    pool.write_text(
        "".join(json.dumps({"question": one.question, "answer": one.response}) + "\n" for one in POOL), encoding="utf-8"
    )
    run = specialist(tmp_path / "run", llama_folder, "lora")
    one = Specialist(run, str(pool), quiet=True)
    found = one.answer("What does fault 3 mean?", Settings(steps=4, alpha=None, learning_rate=2e-2), 8)
    assert found.records[0].question == "What does fault 3 mean?" and len(found.records) == 4 == len(found.uncertainty) - 1
    assert found.text != found.without and found.uncertainty[-1] < found.uncertainty[0]
    assert one.answer("What does fault 3 mean?", Settings(steps=4, alpha=None, learning_rate=2e-2), 8) == found
    plain = Specialist(run).answer("What does fault 3 mean?", max_new_tokens=8)
    assert plain.text == found.without and plain.without is None and not plain.records
    nothing = one.answer("What does fault 3 mean?", Settings(alpha=100.0), 8)
    assert nothing.text == nothing.without == plain.text and not nothing.records and len(nothing.uncertainty) == 1
    assert list(run.path("examples", "signals").iterdir())  # the pool is embedded once


def test_what_cannot_be_learnt_is_no_step_and_one_record_is_enough(tmp_path, llama_folder):
    run = specialist(tmp_path / "run", llama_folder, "lora")
    settings = Settings(steps=3, alpha=None)

    def chosen(*records):
        file = tmp_path / "pool.jsonl"
        file.write_text("".join(json.dumps({"question": one.question, "answer": one.response}) + "\n" for one in records))
        return Specialist(run, str(file), quiet=True).chosen(POOL[3].question, settings)

    cut = record("What does fault 3 mean? " + "What does fault 3 mean? " * 30, "Lamp 21.")
    records, uncertainty, rows = chosen(cut, *POOL[:2], POOL[6])
    assert len(records) == len(rows) == len(uncertainty) - 1 == 3 and cut.question not in {one.question for one in records}
    assert chosen(cut) == ([], [1.0], [])
    for pool in (POOL[3:4], [record(POOL[3].question, answer) for answer in ("Lamp 21.", "Lamp 21!", "Lamp 22.")]):
        records, uncertainty, _ = chosen(*pool)
        assert len(records) == 3 and uncertainty[0] == pytest.approx(1) and uncertainty[-1] < 0.1


def test_the_command_answers_and_tells_what_it_learnt(tmp_path, llama_folder, monkeypatch, capsys):
    pool = tmp_path / "pool.jsonl"
    pool.write_text(
        "".join(json.dumps({"question": one.question, "answer": one.response}) + "\n" for one in POOL), encoding="utf-8"
    )
    run = specialist(tmp_path / "run", llama_folder, "lora")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["selectune", "ask", str(run.folder), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    status, out, _ = call("What does fault 3 mean?", "--adapt", pool, "--steps", 3)
    assert status == 0 and "specialist" in out and "3 steps, uncertainty 1.00 -> " in out and "pool.jsonl:4" in out
    status, out, _ = call("What does fault 3 mean?", "--adapt", pool, "--steps", 2, "--json")
    assert status == 0 and len(json.loads(out)["records"]) == 2
    status, out, _ = call("What does fault 3 mean?")
    assert status == 0 and "uncertainty" not in out and out.strip()
    for arguments, why in (
        (("What?", "--adapt", tmp_path / "none.jsonl"), "none.jsonl"),
        (("  ",), "empty"),
        (("What?", "--adapt", pool, "--steps", 0), "at least 1"),
        (("What?", "--adapt", pool, "--alpha", -1), "above 0"),
    ):
        status, out, err = call(*arguments)
        assert status == 2 and why in err and err.count("\n") == 1 and not out
    run.path("specialist", "selectune.json").unlink()
    status, _, err = call("What?")
    assert status == 2 and "holds no specialist" in err
    with pytest.raises(UserError, match="steps"):
        Settings(steps=0)
