"""Contrastive generation: the faithful-if lines, and a miniature of the claim."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import selectune
from selectune.cli import app
from selectune.errors import UserError
from selectune.evaluation.novelty import Novelty, contrasted, draw, log_probability, novelties, novelties_of
from selectune.models import load_base
from selectune.run import Run

ONE, OTHER = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 2, torch.randn(5, 40) * 2
NEW = "Fault 17 means that the red lamp is on."


def test_scores_are_differences_within_what_is_plausible():
    found = contrasted(ONE, OTHER, 0.1, 0.7)
    ours, theirs = ONE.softmax(-1), OTHER.softmax(-1)
    plausible = ours >= 0.1 * ours.max(-1, keepdim=True).values
    assert torch.equal(found.isfinite(), plausible) and not plausible.all()
    assert torch.allclose(found[plausible], (ours.log() - 0.7 * theirs.log())[plausible], atol=1e-5)


def test_without_contrast_it_is_the_specialist_and_with_itself_it_is_flat():
    alone = contrasted(ONE, OTHER, 0.0, 0.0)
    assert torch.allclose(alone, ONE.log_softmax(-1))
    same = contrasted(ONE, ONE, 0.1, 1.0)
    assert torch.equal(same[same.isfinite()], torch.zeros(int(same.isfinite().sum())))
    strict = contrasted(ONE, OTHER, 1.0, 1.0)
    assert torch.equal(strict.isfinite().sum(-1), torch.ones(5, dtype=torch.int64))
    assert torch.equal(strict.isfinite().int().argmax(-1), ONE.argmax(-1))


@pytest.fixture(scope="module")
def models(llama_folder):
    """A base, and a specialist that learnt one sentence."""
    base = load_base(llama_folder, torch.float32)
    specialist = copy.deepcopy(base.model).requires_grad_(True)
    ids = base.tokenizer(NEW, return_tensors="pt")["input_ids"]
    ids = torch.cat([torch.tensor([[base.tokenizer.bos_token_id]]), ids], 1)
    stepper = torch.optim.AdamW(specialist.parameters(), lr=1e-3)
    for _ in range(30):
        specialist(input_ids=ids, labels=ids).loss.backward()
        stepper.step()
        stepper.zero_grad()
    return specialist.eval().requires_grad_(False), base, ids[0].tolist()


def greedy(model, opening, count, ends):
    ids = list(opening)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[list(ends)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(opening) :]


def test_only_the_likeliest_word_is_greedy_and_the_end_is_never_taken(models):
    specialist, base, ids = models
    how = Novelty(tokens=20, plausible=1.0, beams=3)
    found = draw(specialist, base.model, ids[:1], how, [], torch.Generator().manual_seed(0))
    assert found == greedy(specialist, ids[:1], 20, [])
    sure = greedy(specialist, ids[:1], 1, [])[0]  # the only plausible word is the end: the next best is taken
    assert draw(specialist, base.model, ids[:1], how, [sure], torch.Generator().manual_seed(0)) == greedy(
        specialist, ids[:1], 20, [sure]
    )
    loose = Novelty(tokens=30, plausible=0.0, contrast=0.0, beams=1)
    end = max(set(found), key=found.count)
    for seed in range(5):
        assert end not in draw(specialist, base.model, ids[:1], loose, [end], torch.Generator().manual_seed(seed))


def test_no_end_that_the_model_names_is_taken_and_texts_fit_the_context(models, monkeypatch):
    specialist, base, ids = models
    from selectune.evaluation import novelty

    taken = []
    monkeypatch.setattr(novelty, "draw", lambda one, other, begun, how, ends, generator: taken.append(ends) or ids[1:])
    monkeypatch.setattr(specialist.generation_config, "eos_token_id", [7, 9])
    list(novelties(specialist, base.model, base.tokenizer, Novelty(rounds=1, tokens=4, iterative=False)))
    assert {7, 9, base.tokenizer.eos_token_id, base.tokenizer.pad_token_id} == set(taken[0])
    with pytest.raises(UserError, match="do not fit"):
        list(novelties(specialist, base.model, base.tokenizer, Novelty(tokens=100_000)))


def test_one_beam_without_contrast_draws_as_the_specialist_does(models):
    """The likeliest words, half of all draws, come in half of them."""
    specialist, base, ids = models
    with torch.no_grad():
        wanted = specialist(input_ids=torch.tensor([ids[:2]])).logits[0, -1].softmax(-1)
    how, generator = Novelty(tokens=1, plausible=0.0, contrast=0.0, beams=1), torch.Generator().manual_seed(2)
    drawn = torch.tensor([draw(specialist, base.model, ids[:2], how, [], generator)[0] for _ in range(300)])
    order = wanted.argsort(descending=True)
    likely = order[: int((wanted[order].cumsum(0) < 0.5).sum()) + 1]
    assert abs(float(torch.isin(drawn, likely).float().mean()) - float(wanted[likely].sum())) < 0.1


def test_the_beam_with_the_largest_sum_is_kept(models):
    specialist, base, ids = models
    how = Novelty(tokens=6, beams=4)
    found = draw(specialist, base.model, ids[:1], how, [], torch.Generator().manual_seed(5))

    def score(text):
        with torch.no_grad():
            return float((log_probability(specialist, ids[:1], text) - log_probability(base.model, ids[:1], text)).sum())

    alone = [draw(specialist, base.model, ids[:1], Novelty(tokens=6, beams=1), [], torch.Generator().manual_seed(seed))
             for seed in range(6)]  # fmt: skip
    assert score(found) >= sorted(map(score, alone))[3]


def test_a_shown_text_is_new_no_more_and_both_models_stay(models):
    specialist, base, _ = models
    before = {id(model): [value.clone() for value in model.parameters()] for model in (specialist, base.model)}
    how = Novelty(rounds=4, tokens=12, learning_rate=3e-3)
    told = list(novelties(specialist, base.model, base.tokenizer, how, seed=1))
    for model in (specialist, base.model):
        assert all(torch.equal(value, old) for value, old in zip(model.parameters(), before[id(model)], strict=True))
    still = list(novelties(specialist, base.model, base.tokenizer, Novelty(rounds=4, tokens=12, iterative=False), seed=1))
    assert told[0] == still[0]  # nothing was shown before the first
    assert len({one.text for one in told}) >= len({one.text for one in still})
    assert [one.text for one in told] == [one.text for one in novelties(specialist, base.model, base.tokenizer, how, seed=1)]


def test_one_step_on_a_text_makes_it_likelier(models, monkeypatch):
    specialist, base, ids = models
    from selectune.evaluation import novelty

    seen = []
    plain = novelty.draw

    def watched(specialist, known, *rest):
        with torch.no_grad():
            seen.append(float(log_probability(known, ids[:1], ids[1:]).sum()))
        plain(specialist, known, *rest)
        return ids[1:]

    monkeypatch.setattr(novelty, "draw", watched)
    list(novelties(specialist, base.model, base.tokenizer, Novelty(rounds=3, tokens=4), opening=ids[:1]))
    assert seen[0] < seen[1] < seen[2]


def test_what_was_learnt_is_found(models):
    """The specialist's own sentence stands out by contrast; without it the texts are those of the specialist, whatever the base says."""
    specialist, base, _ = models
    told = list(novelties(specialist, base.model, base.tokenizer, Novelty(rounds=3, tokens=15)))
    assert any("lamp" in one.text or "Fault" in one.text for one in told)
    assert all(one.contrast > 1 for one in told)
    same = list(novelties(base.model, base.model, base.tokenizer, Novelty(rounds=1, tokens=15)))
    assert same[0].contrast == 0


def test_the_command_reads_a_run(tmp_path, llama_folder):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is fault {i}?", "answer": f"lamp {i}"}) + "\n" for i in range(40)))
    values = {"base": str(llama_folder), "form": "lora", "training": {"max_steps": 2, "evaluations": 0, "batch_sequences": 2},
              "evaluation": {"benchmarks": [], "forgetting": False, "samples": 0, "target_items": 4}, "output": str(tmp_path)}  # fmt: skip
    run = selectune.specialize(str(data), name="learnt", quiet=True, **values)
    out = tmp_path / "new.jsonl"
    done = CliRunner().invoke(
        app, ["novelty", str(run.folder), "--rounds", "2", "--tokens", "5", "--ask", "What?", "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["contrast"] == pytest.approx(lines[0]["specialist"] - lines[0]["base"])
    asked = list(novelties_of(Run.open(run.folder), Novelty(rounds=1, tokens=5), ask="What?"))
    assert asked[0].text == lines[0]["text"] != next(novelties_of(Run.open(run.folder), Novelty(rounds=1, tokens=5))).text
    with pytest.raises(UserError, match="holds no run"):
        next(novelties_of(Run.open(tmp_path)))
    (run.folder / "specialist" / "selectune.json").unlink()
    with pytest.raises(UserError, match="holds no specialist"):
        next(novelties_of(Run.open(run.folder)))
