"""Tags, verdicts, judgements and repairs of a model behind an endpoint, and what a dry run says of them."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import selectune
from selectune.cli import app
from selectune.data import Encoder, Message, Record, records_from_file
from selectune.errors import UserError
from selectune.examples import Pool, iter_select_tune, middo
from selectune.examples.factors.signals import OwnEmbedding, ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.factors.tagging import asked_tags, merged, read_tags
from selectune.examples.iter_select_tune import HardRecords
from selectune.examples.judged import Judged
from selectune.examples.middo import DynamicOptimisation, beyond, rating
from selectune.examples.tags import Tagged
from selectune.models import load_base
from tests.contracts.test_examples import no_download  # noqa: F401
from tests.endpoint import Endpoint, echoed


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTUNE_CACHE", str(tmp_path / "cache"))


def record(asked, answer="It means that lamp 7 is on."):
    return Record("chat", (Message("user", asked), Message("assistant", answer)))


def pool(folder, records, **options):
    return Pool(records, lambda: load_base(folder), lambda words: Encoder(words, 250), quiet=True, **options)


def last(body):
    return body["messages"][-1]["content"]


# -- tags ------------------------------------------------------------------------------------------------------------------


def test_tags_are_read_however_they_are_listed():
    assert read_tags('Sure: ["Unit Conversion", "physics!", ""]') == {"unit conversion", "physics"}
    assert read_tags('[{"tag": "Physics", "explanation": "x"}, 7]') == {"physics"}
    assert read_tags("- physics\n- show the steps, maths") == {"physics", "show the steps", "maths"}
    assert read_tags("[physics, maths") == {"physics", "maths"}
    assert read_tags("A sentence that goes on and on and is by no means a tag, is it" * 2) == {"is it"} or read_tags("") == set()


def test_tags_that_are_one_become_one(monkeypatch):
    tagged = [{"lamp", "light"}, {"lamps"}, {"lamp", "light"}, {"rare"}, {"light"}, {"lamps", "light"}]
    near = {"lamp": [1.0, 0], "lamps": [1.0, 0.01], "light": [0, 1.0], "a": [0, 1], "b": [1, 0], "c": [-1, 0]}
    encoder = SimpleNamespace(embed=lambda words: np.array([near[word] for word in words]))
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", lambda: encoder)
    found = merged(tagged, least=2)
    assert found == [{"lamp", "light"}, {"lamp"}, {"lamp", "light"}, set(), {"light"}, {"lamp", "light"}]
    together = [{"a", "b"}, {"a", "b"}, {"b"}, {"c"}, {"b", "c"}]
    assert merged(together, least=1, support=2) == [{"b"}, {"b"}, {"b"}, {"c"}, {"b", "c"}]
    assert merged(together, least=1, support=3) == together
    within = [{"a", "b", "c"}, {"a", "b", "c"}, {"b", "c"}, {"c"}]
    assert merged(within, least=1, support=2) == [{"c"}] * 4
    surest = [{"a", "b", "c"}] * 3 + [{"a", "c"}] + [{"b"}] * 3 + [{"c"}]  # a comes with b in three of four, with c always
    assert merged(surest, least=1, support=2, confidence=0.7)[:4] == [{"b", "c"}] * 3 + [{"c"}]


def test_every_user_turn_is_tagged_and_rich_records_come_first(llama_folder):
    words = ["lamp", "valve", "pump", "fuse"]
    turns = (Message("user", "lamp"), Message("assistant", "yes"), Message("user", "valve"), Message("assistant", "no"))
    records = [Record("chat", turns), *(record(f"{words[n % 4]} {n}") for n in range(8)), record("lamp valve pump fuse")]

    def tagger(body):
        return json.dumps([word for word in words if word in last(body).split("Question:")[1]])

    with Endpoint(tagger) as there:
        made = Tagged(by_endpoint=there.url, by_model="tagger", count=3)
        choice = made.select(pool(llama_folder, records))
        assert choice.signals["tags"].tolist() == [2, *[1] * 8, 4] and choice.places.tolist()[:1] == [9]
        assert len(there.asked) == 11
        from selectune.inference.responder import responder

        assert asked_tags(responder(made, pool(llama_folder, records)), records[:1]) == [{"lamp", "valve"}]
    assert not Tagged(count=3).select(pool(llama_folder, records)).signals["tags"].max() > 20


def test_the_base_gives_tags_where_it_is_told_to(llama_folder):
    from selectune.inference.remembering import Rehearsal

    made = pool(llama_folder, [record("lamp"), record("valve")], rehearsal=Rehearsal())
    Tagged(tagger="model", count=1).select(made)
    assert made.rehearsal.calls == 2


# -- verdicts --------------------------------------------------------------------------------------------------------------


def test_the_share_of_yes_is_the_score(llama_folder):
    def judge(body):
        text = last(body)
        if "about lamps" in text:
            return "YES." if "lamp" in text.split("Read this:")[1].split("Is it")[0] else "NO"
        return "Yes, it is" if body["seed"] % 2 else "No"

    records = [record("A lamp?", "x"), record("A valve?", "y"), record("Two lamps?", "z")]
    with Endpoint(judge) as there:
        settings = {"by_endpoint": there.url, "by_model": "judge", "subject": "lamps", "samples": 4, "count": 2}
        choice = Judged(**settings).select(pool(llama_folder, records))
    assert choice.signals["yes against no"].tolist() == [0.5, 0.0, 0.5] and set(choice.places) == {0, 2}
    assert len(there.asked) == 3 * 4 + 2 * 4  # nothing more is asked of what is not about lamps


def test_another_local_model_judges(llama_folder, tiny_folders):
    made = pool(llama_folder, [record(f"Lamp {n}?") for n in range(6)])
    other = pool(tiny_folders["qwen2"], made.records)
    found = Judged(by_model=str(tiny_folders["qwen2"]), count=2).select(made).signals["yes against no"]
    assert found == pytest.approx(Judged(count=2).select(other).signals["yes against no"])
    assert not np.allclose(found, Judged(count=2).select(made).signals["yes against no"])


# -- IterSelectTune --------------------------------------------------------------------------------------------------------

MIXED = [record(f"zzz zz {n} zzzz" if n % 2 else f"aaa a {n} aaaa") for n in range(40)]


def prefers_the_reference(body):
    """The reference is better where the question is one of z."""
    first = last(body).split("Reply A:\n")[1].startswith("It means")
    return ("A" if first else "B") if "zzz" in last(body) else ("B" if first else "A")


def test_records_where_the_reference_wins_are_hard_and_few_are_judged(llama_folder):
    made = pool(llama_folder, MIXED)
    settings = {"by_model": "judge", "start": 8, "more": 4, "rounds": 3, "clusters": 4, "longest": 4, "count": 12}
    with Endpoint(prefers_the_reference) as there:
        choice = HardRecords(by_endpoint=there.url, **settings).select(made)
        only = HardRecords(by_endpoint=there.url, alpha=1.0, **settings).select(pool(llama_folder, MIXED))
    judged = choice.signals["judged hard"]
    assert np.isfinite(judged).sum() == 8 + 4 + 4
    assert all(value == (place % 2) for place, value in enumerate(judged) if np.isfinite(value))
    groups = choice.signals["cluster"]
    for group in set(groups):  # of each cluster the best, in proportion
        within = np.flatnonzero(groups == group)
        chosen = np.isin(within, choice.places)
        assert abs(chosen.sum() - len(within) * 12 / 40) < 1
        assert choice.signals["quality"][within[chosen]].min() >= choice.signals["quality"][within[~chosen]].max()
    hard = judged == 1
    assert choice.signals["like hard ones"][hard] == pytest.approx(1, abs=1e-5)
    assert choice.signals["quality"] == pytest.approx(
        0.7 * choice.signals["likely to be hard"] + 0.3 * choice.signals["like hard ones"]
    )
    assert only.signals["quality"] == pytest.approx(only.signals["likely to be hard"])
    assert ["that did not teach" in note for note in made.notes] == [True]


def test_a_judge_who_always_takes_the_first_finds_nothing_hard(llama_folder):
    with Endpoint(lambda body: "A") as there:
        settings = {"by_endpoint": there.url, "by_model": "judge", "start": 8, "rounds": 1, "longest": 4, "count": 5}
        made = pool(llama_folder, MIXED)
        choice = HardRecords(**settings).select(made)
    assert np.nansum(choice.signals["judged hard"]) == 0 and len(there.asked) == 16
    assert "all of one kind" in made.notes[-1]


def test_without_a_judge_and_a_margin_half_of_the_first_are_hard(llama_folder):
    made = pool(llama_folder, MIXED)
    choice = HardRecords(start=10, more=6, rounds=2, longest=6, count=3).select(made)
    first = HardRecords(start=10, rounds=1, longest=6, count=3).select(pool(llama_folder, MIXED)).signals["judged hard"]
    assert np.nansum(first) == 5 and np.isfinite(first).sum() == 10
    known = np.isfinite(first)
    assert np.array_equal(choice.signals["judged hard"][known], first[known])  # one margin for all rounds
    assert "nats per token" in made.notes[-1] and "all of one kind" not in " ".join(made.notes)


def test_without_a_judge_likelihoods_tell(llama_folder):
    made = pool(llama_folder, MIXED[:10])
    choice = HardRecords(start=10, rounds=1, longest=6, margin=0.5, count=3).select(made)
    from selectune.inference.local import LocalResponder

    own = LocalResponder(made.base, made.encoder, quiet=True).answers([one.prompt for one in made.records], max_new_tokens=6)
    written = [record(one.question, text) for one, (text,) in zip(made.records, own, strict=True)]
    gap = measure(made, ResponseLoss()) - measure(made, ResponseLoss(), written)
    assert np.array_equal(choice.signals["judged hard"] == 1, gap > 0.5)


def test_what_cannot_be_judged_is_neither_hard_nor_easy_and_is_told(llama_folder):
    unread = [record("lamp " * 300 + str(number)) for number in range(3)]  # nothing of their answers is left
    made = pool(llama_folder, [*MIXED, *unread])
    choice = HardRecords(start=40, more=5, rounds=3, longest=4, count=3).select(made)
    assert np.isnan(choice.signals["judged hard"][-3:]).all() and np.isfinite(choice.signals["judged hard"][:-3]).all()
    assert "3 records could not be judged" in made.notes[-1]


def test_what_tells_the_accuracy_did_not_teach(llama_folder, monkeypatch):
    seen = []
    plain = iter_select_tune._taught
    monkeypatch.setattr(iter_select_tune, "_taught", lambda v, h, places: seen.append(set(places)) or plain(v, h, places))
    made, hard = pool(llama_folder, [*MIXED, *MIXED[:5]]), np.array([float(n % 2) for n in range(45)])
    method = HardRecords()
    right, of = method._accuracy(made, method.embed(made), hard)
    taught = {made.keys[place] for place in seen[0]}
    assert of == 45 - len(seen[0]) > 0 and right <= of
    assert not taught & {made.keys[place] for place in set(range(45)) - seen[0]}  # copies of a record are on one side


# -- Middo -----------------------------------------------------------------------------------------------------------------

FEW = [record(f"What is fault {n}?", "lamp " * (n % 4 + 1) + str(n * 7)) for n in range(16)] + [
    record("Straße 日本語 ???", "qq zz kk 9"), record("Tell me of every pump and valve there is", "No.")
]  # fmt: skip


def writes(body):
    text = last(body)
    if "new question and nothing else" in text:
        return f"New: {re.sub('[^a-z0-9 ]', '', text.lower())[-20:]}?"
    return "A new answer."


def test_limits_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=50)
    values[3] = np.nan
    known = np.delete(values, 3)
    assert np.array_equal(beyond(values, 1.5, 1), values > known.mean() + 1.5 * known.std())
    assert np.array_equal(beyond(values, 0.5, -1, sample=1), values < known.mean() - 0.5 * known.std(ddof=1))
    few = np.array([0.0, 0.0, 0.0, 3.0])  # 1.3 for a population, 1.5 for a sample
    assert beyond(few, 1.6, 1).tolist() == [False, False, False, True] and not beyond(few, 1.6, 1, sample=1).any()
    assert not beyond(values, 99.0, 1).any() and not beyond(np.array([1.0]), 0.0, 1).any()
    assert [rating(text) for text in ("7", "I say 8.5 of 10", "none", "99")] == [7.0, 8.5, 0.0, 10.0]


def test_flags_follow_the_signs(llama_folder, monkeypatch):
    made = pool(llama_folder, FEW)
    method = DynamicOptimisation(steps=3)
    monkeypatch.setattr("selectune.examples.factors.learnt.trained_copy", lambda pool, *settings: pool.base.model)
    signs, flags, near = method._diagnosis(made)
    before = measure(made, ResponseLoss())
    assert np.array_equal(flags["complexity"], before > before.mean() + before.std()) and flags["complexity"].any()
    vectors = measure(made, OwnEmbedding(of="question"))
    whole = vectors @ vectors.T
    np.fill_diagonal(whole, -np.inf)
    alone = np.sort(whole, axis=1)[:, -2:].mean(1)
    assert signs["likeness to its neighbours"] == pytest.approx(alone, abs=1e-5)
    assert np.array_equal(flags["diversity"], alone < alone.mean() - alone.std()) and flags["diversity"].any()
    assert all(place not in own for place, own in enumerate(near.tolist()))
    quality = signs["quality"]
    assert np.array_equal(flags["quality"], quality < quality.mean() - quality.std(ddof=1))
    learnt = int(np.flatnonzero(flags["complexity"])[0])
    monkeypatch.setattr(middo.Learnt, "losses", lambda self: np.where(np.arange(len(self.pool)) == learnt, 0.0, before))
    assert not method._diagnosis(made)[1]["complexity"][learnt]  # what the tuned model has learnt is not too hard


def test_nothing_is_flagged_far_out_and_nothing_changes(llama_folder):
    with Endpoint(writes) as there:
        made = DynamicOptimisation(by_endpoint=there.url, by_model="writer", spread=50, steps=2)
        choice = made.select(pool(llama_folder, FEW))
    assert list(choice.records) == FEW and sorted(choice.places) == list(range(18)) and not there.asked


def test_each_flag_gives_one_new_record_and_the_size_stays(llama_folder):
    made = pool(llama_folder, FEW)
    settings = {"by_model": "writer", "steps": 2}
    _, flags, _ = DynamicOptimisation(**settings)._diagnosis(made)
    with Endpoint(writes) as there:
        choice = DynamicOptimisation(by_endpoint=there.url, **settings).select(made)
    bad = flags["complexity"] | flags["quality"]
    changed = [place for place in range(18) if choice.records[place] != FEW[place]]
    assert len(choice.records) == 18 and bad.any() and flags["diversity"].any()
    assert len(changed) == bad.sum() + flags["diversity"].sum() and len(there.asked) == 2 * len(changed)
    assert set(np.flatnonzero(bad)) <= set(changed)
    assert all(choice.records[place].response == "A new answer." for place in changed)
    assert all(choice.records[place] == FEW[place] for place in np.flatnonzero(flags["diversity"] & ~bad))
    assert not any(choice.signals[f"flagged: {name}"].any() for name in flags)
    others = [last(body) for body in there.asked if "Others:" in last(body)]
    assert len(others) == flags["diversity"].sum() and all(len(text.split("Others:\n")[1].splitlines()) == 2 for text in others)


@pytest.mark.parametrize("half", [False, True])
def test_what_could_not_be_written_stays_and_comes_last(llama_folder, half):
    def silent(body):
        return writes(body) if half and "new question and nothing else" in last(body) else ""

    with Endpoint(silent) as there:
        made = DynamicOptimisation(by_endpoint=there.url, by_model="writer", steps=2)
        choice = made.select(pool(llama_folder, FEW))
    assert list(choice.records) == FEW
    bad = np.flatnonzero(choice.signals["flagged: complexity"] + choice.signals["flagged: quality"])
    assert set(choice.places[-len(bad) :]) == set(bad)


def test_dropping_leaves_flagged_records_out_and_lonely_ones_weigh_double(llama_folder):
    made = pool(llama_folder, FEW)
    choice = DynamicOptimisation(repair="drop", steps=2).select(made)
    bad = (choice.signals["flagged: complexity"] + choice.signals["flagged: quality"]) > 0
    lonely = (choice.signals["flagged: diversity"] > 0) & ~bad
    train = choice.as_they_train(FEW)
    assert bad.any() and lonely.any() and set(train) == set(np.flatnonzero(~bad).tolist())
    weights = {place: record.weight for place, record in train.items()}
    assert np.mean(list(weights.values())) == pytest.approx(1)
    assert {round(weights[place] / min(weights.values()), 6) for place in np.flatnonzero(lonely).tolist()} == {2.0}
    assert len({weights[place] for place in train if not lonely[place]}) == 1
    assert f"{bad.sum()} records are left out; {lonely.sum()} that stand alone weigh double" in made.notes[-1]
    few = DynamicOptimisation(repair="drop", steps=2, count=10).select(made)
    assert len(few.places) == 10 and not bad[few.places].any()
    with pytest.raises(UserError, match="no record is left"):
        DynamicOptimisation(spread=0.0)._weights(made, np.ones(3, bool), np.zeros(3, bool))


def test_the_tuned_model_rates_six_times(llama_folder):
    made = pool(llama_folder, FEW[:6])
    asked = []
    from selectune.inference.local import LocalResponder

    plain = LocalResponder.answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LocalResponder, "answers", lambda self, prompts, **how: asked.append(len(prompts)) or plain(self, prompts, **how)
        )
        choice = DynamicOptimisation(quality="rating", repair="drop", steps=2, count=2).select(made)
    assert asked == [6] * 6 and all(0 <= value <= 10 for value in choice.signals["quality"])


# -- as a user does --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool_file(tmp_path):
    lines = [{"question": f"What is fault {i}?", "answer": f"lamp {i * 7}" if i % 4 else "wrong"} for i in range(10, 70)]
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def knows(body):
    return f"Answer: lamp {7 * int(re.findall(r'fault ([0-9]+)', last(body))[-1])}"


def test_a_dry_run_counts_and_asks_nothing(pool_file, tmp_path, llama_folder):
    out = tmp_path / "out.jsonl"
    with Endpoint(knows) as there:
        asked = ["select", str(pool_file), "-m", "yes_no:price_read=1,price_written=2,subject=lamps", "--endpoint", there.url, "--model", "large",
                 "--base", str(llama_folder), "-o", str(out)]  # fmt: skip
        done = CliRunner().invoke(app, [*asked, "--dry-run"])
        assert done.exit_code == 0, done.output
        assert done.output.startswith("60 calls, about") and "and 480 written, for 0.00; questions that follow" in done.output
        assert not there.asked and not out.exists()
        assert CliRunner().invoke(app, asked).exit_code == 0 and out.exists()
        done = CliRunner().invoke(app, [*asked, "--dry-run"])
        assert done.output.startswith("0 calls") and len(there.asked) == 60
    wrong = CliRunner().invoke(app, ["select", str(pool_file), "-m", "longest", "--endpoint", "http://localhost:1/v1"])
    assert isinstance(wrong.exception, UserError) and "by_endpoint" in str(wrong.exception)


def test_a_run_trains_on_records_as_they_were_changed(pool_file, tmp_path, llama_folder):
    values = {"base": str(llama_folder), "form": "full", "training": {"max_steps": 2, "evaluations": 0, "batch_sequences": 2},
              "evaluation": {"benchmarks": [], "forgetting": False, "samples": 0, "target_items": 4}, "output": str(tmp_path)}  # fmt: skip
    with Endpoint(knows) as there:
        method = {"method": "robust_ft", "by_endpoint": there.url, "by_model": "large", "sure": 1.0, "fraction": 1.0}
        run = selectune.specialize(str(pool_file), examples=method, name="relabelled", quiet=True, **values)
    chosen, train = (records_from_file(run.path("data", f"{name}.jsonl")) for name in ("chosen", "train"))
    assert len(chosen) == len(train) and any(one.response == "wrong" for one in train)
    assert all(one.response == f"lamp {7 * int(one.question.split()[-1][:-1])}" for one in chosen)
    out = tmp_path / "out.jsonl"
    with Endpoint(knows) as there:
        selected = selectune.choose_examples(
            str(pool_file), method | {"by_endpoint": there.url}, out=out, base=str(llama_folder), quiet=True
        )
    assert "wrong" not in out.read_text() and selected.chosen == 60


def test_an_endpoint_that_fails_half_way_is_one_line_and_is_taken_up_again(pool_file, tmp_path, llama_folder, monkeypatch):
    monkeypatch.setattr("selectune.inference.endpoint.PAUSE", 0.001)
    asked = {
        "method": "yes_no",
        "by_model": "large",
        "base": str(llama_folder),
        "folder": tmp_path / "kept",
        "quiet": True,
        "count": 5,
    }
    with Endpoint() as there:
        there.reply = lambda body: "YES" if len(there.asked) < 40 else (500, "oh", {})
        with pytest.raises(UserError, match="status 500") as error:
            selectune.choose_examples(str(pool_file), by_endpoint=there.url, **asked)
        assert "\n" not in str(error.value)
        before = {last(body) for body in there.asked[:39]}
        there.asked.clear()
        there.reply = lambda body: echoed(body) and "YES"
        assert selectune.choose_examples(str(pool_file), by_endpoint=there.url, **asked).chosen == 5
        assert len(there.asked) == 120 - 39 and not before & {last(body) for body in there.asked}


def test_a_plan_asks_nothing_and_says_what_the_run_would_ask(pool_file, tmp_path, llama_folder):
    with Endpoint(knows) as there:
        method = {"method": "yes_no", "by_endpoint": there.url, "by_model": "large", "count": 10}
        told = selectune.plan(str(pool_file), examples=method, base=str(llama_folder), form="full", quiet=True, output=str(tmp_path),
                              training={"max_steps": 2, "evaluations": 0, "batch_sequences": 2}, evaluation={"benchmarks": []})  # fmt: skip
    assert not there.asked and any(re.search(r"asks a model \d+ questions", note) for note in told.notes)
