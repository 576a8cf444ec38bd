"""S2L, LoBaSS, DONOD, IFD, GRAPE: the faithful-if lines of their cards."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selectune.data import Encoder, Message, Record
from selectune.data.duplicates import content
from selectune.errors import UserError
from selectune.examples import Pool, judged, self_scoring, trained
from selectune.examples.factors import learnt
from selectune.examples.factors.learnt import Learnt, losses_along, losses_under
from selectune.examples.factors.signals import ResponseLoss
from selectune.examples.factors.store import measure
from selectune.examples.judged import NO, YES, YesOrNo
from selectune.examples.longest import Longest
from selectune.examples.self_scoring import Answers, HighestLoss, InstructionFollowingDifficulty, JointRank
from selectune.examples.trained import (
    Learnability,
    OutputChange,
    OutputGradient,
    Trajectories,
)
from selectune.models import load_base
from tests.examples.test_signals import RECORDS, own_loss, pool
from tests.tiny import save_tiny


@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("gemma2", {"final_logit_softcapping": 3.0}), ("phi", {})])
def test_the_output_layers_gradient_is_autograds(architecture, changes, tmp_path):
    made = pool(save_tiny(architecture, tmp_path, **changes))
    model = made.base.model
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    found = measure(made, OutputGradient())
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # no longer tied to the input's
    for number in (0, 4, 9):
        (piece,) = made.encoder.encode(RECORDS[number])
        head.weight.grad = None
        logits = model(input_ids=torch.tensor([piece.input_ids])).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(piece.labels[1:]), ignore_index=-100).backward()
        weight, gradient = head.weight.detach(), head.weight.grad
        assert found[number, 0] == pytest.approx(float(gradient.norm()), rel=1e-3)
        assert found[number, 1] == pytest.approx(float((gradient * weight).sum()), rel=1e-2, abs=1e-3)
        rate = 1e-3  # one small plain step: the norm of the change, and the change of the norm
        stepped = weight - rate * gradient
        assert float((stepped - weight).norm()) / rate == pytest.approx(found[number, 0], rel=1e-2)
        by_step = float(stepped.double().norm() - weight.double().norm()) / rate
        assert by_step == pytest.approx(-found[number, 1] / float(weight.norm()), rel=0.1, abs=0.05)


def test_donod_keeps_what_moves_least(llama_folder):
    made = pool(llama_folder)
    signals = OutputChange(count=3).score(made)
    ideal = signals["closeness"].argmax()
    assert signals["norm of the change"][ideal] <= np.median(signals["norm of the change"])


def test_growth_has_the_sign_of_a_step_against_the_gradient(llama_folder, monkeypatch):
    made = pool(llama_folder, RECORDS[:2])
    monkeypatch.setattr(trained, "measure", lambda pool, signal: np.array([[1, -4], [1, 4]], dtype=np.float32))
    weight = made.base.model.get_output_embeddings().weight
    weight.data.mul_(2 / weight.data.norm())
    for bad, closeness in ((True, [0, 1]), (False, [1, 0])):
        found = OutputChange(count=1, growth_is_bad=bad).score(made)
        assert found["growth of the norm"] == pytest.approx([2, -2]) and found["closeness"] == pytest.approx(closeness)


def test_a_long_text_moves_no_more_than_its_pieces(llama_folder):
    text = Record("text", text="The quick brown fox jumps over the lazy dog. " * 12)
    made = Pool([text], lambda: load_base(llama_folder), lambda words: Encoder(words, 32), quiet=True)
    pieces = made.encoder.encode(text)
    whole = measure(made, OutputGradient())[0]
    assert len(pieces) > 3
    each = [
        measure(made, OutputGradient(), [Record("text", text=made.base.tokenizer.decode(piece.input_ids))])[0, 0]
        for piece in pieces[:-1]
    ]
    assert 0.8 * min(each) < whole[0] < 1.2 * max(each)
    loss = sum(
        own_loss(made.base, piece.input_ids, [-100, *piece.labels[1:]]) * (len(piece.input_ids) - 1) for piece in pieces
    ) / sum(len(piece.input_ids) - 1 for piece in pieces)
    assert measure(made, ResponseLoss())[0] == pytest.approx(loss, rel=1e-4)


UNREAD = [Record("chat", (Message("user", "lamp " * 300 + str(n)), Message("assistant", "on"))) for n in range(6)]
"""Nothing of their responses fits."""


def test_records_that_cannot_be_read_disturb_nothing_and_come_last(llama_folder):
    plain = OutputChange(count=3).score(pool(llama_folder))["closeness"]
    made = pool(llama_folder, [*UNREAD, *RECORDS])
    choice = OutputChange(count=3).select(made)
    assert choice.signals["closeness"][len(UNREAD) :] == pytest.approx(plain) and min(choice.places) >= len(UNREAD)
    assert "6 records have no finite score" in made.notes[0]
    with pytest.raises(UserError, match="to learn from"):
        Learnt(pool(llama_folder, UNREAD), 2, 1e-3).losses()


def test_learnability_of_nothing_learnt_is_nothing(llama_folder):
    made = pool(llama_folder)
    still = Learnability(steps=1, learning_rate=1e-12, shortest=0).score(made)["learnability"]
    assert np.abs(still).max() < 1e-4
    learnt = Learnability(steps=30, learning_rate=3e-3, shortest=0).score(made)
    by_hand = (learnt["loss"] - learnt["loss after"]) / learnt["loss"]
    assert np.allclose(learnt["learnability"], by_hand) and by_hand.mean() > 0.1


@pytest.mark.parametrize("keep", ["highest", "lowest"])
def test_short_responses_have_no_learnability(llama_folder, monkeypatch, keep):
    made = pool(llama_folder, RECORDS[:3])
    monkeypatch.setattr(trained, "measure", lambda pool, signal: np.array([2.0, 2.0, 2.0]))
    monkeypatch.setattr(Learnability, "_crossed", lambda self, pool: np.array([0.0, 1.0, 0.0]))
    made.tokens = np.array([20, 20, 3])
    found = Learnability(count=3, keep=keep).score(made)["learnability"]
    assert found[:2].tolist() == [1.0, 0.5] and np.isnan(found[2])
    assert Learnability(count=2, keep=keep).select(made).places.tolist() == ([0, 1] if keep == "highest" else [1, 0])


def grouped_trajectories(*sizes):
    """Well-separated groups of so many records, ``(records, 2)``."""
    return np.concatenate([np.full((size, 2), 100.0 * number) for number, size in enumerate(sizes)])


@pytest.mark.parametrize(("count", "expected"), [(30, [5, 10, 15, 0, 0]), (117, [5, 10, 100, 2, 0])])
def test_groups_share_evenly_and_the_smallest_come_last(llama_folder, monkeypatch, count, expected):
    made = pool(llama_folder, [replace(RECORDS[0], text=str(number)) for number in range(118)])
    monkeypatch.setattr(trained, "losses_along", lambda *settings: grouped_trajectories(5, 10, 100, 2, 1))
    places = Trajectories(count=count, clusters=5, checkpoints=2).choose(made).places
    found = np.histogram(places, bins=[0, 5, 15, 115, 117, 118])[0].tolist()
    assert found[:3] == expected[:3] and sum(found[3:]) == sum(expected[3:])
    assert sorted(Trajectories(count=118, clusters=5, checkpoints=2).choose(made).places.tolist()) == list(range(118))


def test_the_order_of_checkpoints_changes_no_group(llama_folder, monkeypatch):
    made = pool(llama_folder, [replace(RECORDS[0], text=str(number)) for number in range(40)])
    drawn = np.random.default_rng(0).normal(size=(40, 4)) + np.repeat(np.eye(4) * 50, 10, axis=0)
    choices = []
    for trajectories in (drawn, drawn[:, ::-1]):
        monkeypatch.setattr(trained, "losses_along", lambda *settings, given=trajectories: given)
        choices.append(Trajectories(count=12, clusters=4, checkpoints=4).choose(made))
    one, other = (choice.signals["cluster"] for choice in choices)
    assert np.array_equal(one[:, None] == one, other[:, None] == other) and len(set(one)) == 4
    assert set(choices[0].places.tolist()) == set(choices[1].places.tolist())


def test_losses_after_a_training_are_each_records_own(llama_folder):
    made = pool(
        llama_folder, [Record("chat", (Message("user", f"Fault {n}?"), Message("assistant", f"lamp {n * 7}"))) for n in range(70)]
    )
    found = losses_under(made, made.base.model)
    for place in (0, 33, 69):
        (piece,) = made.encoder.encode(made.records[place])
        assert found[place] == pytest.approx(own_loss(made.base, piece.input_ids, [-100, *piece.labels[1:]]), rel=1e-4)


def test_a_copy_is_trained_once_for_all_budgets_and_not_again_after_a_stop(llama_folder, tmp_path, monkeypatch):
    method, shared = Learnability(steps=3, learning_rate=3e-3, shortest=0, count=2), {"library": tmp_path / "library"}
    first = pool(llama_folder, folder=tmp_path / "first", **shared)
    plain, trained_on, calls = learnt.trained_copy, [], []

    def once(pool, steps, learning_rate, records):
        trained_on.append(len(records))
        return plain(pool, steps, learning_rate, records)

    def stopping(self, worker, records):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ResponseLoss.measure(self, self._learnt.worker, records)

    monkeypatch.setattr(learnt, "trained_copy", once)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learnt.LossAfter, "measure", stopping)
        method.score(first)
    assert len(trained_on) == 1
    whole = method.select(first)
    assert len(trained_on) == 2  # each half once
    other = pool(llama_folder, folder=tmp_path / "other", **shared)
    more = method.model_copy(update={"count": 5}).select(other)
    assert len(trained_on) == 2 and whole.places.tolist() == more.places[:2].tolist()
    costs = other.meter.cost, first.meter.cost
    assert costs[0].backward_tokens > 0 and costs[0].forward_tokens <= costs[1].forward_tokens
    alone = pool(llama_folder)
    assert np.array_equal(method.score(alone)["loss after"], more.signals["loss after"])
    assert costs[0].backward_tokens == alone.meter.cost.backward_tokens
    third = pool(llama_folder, folder=tmp_path / "third", **shared)
    third.seed = 1
    method.score(third)
    assert len(trained_on) == 6  # two of the choice alone, and two by another seed


def test_trajectories_begin_at_the_base(llama_folder):
    made = pool(llama_folder)
    signals = Trajectories(count=4, steps=10, checkpoints=3, learning_rate=3e-3).choose(made).signals
    assert np.allclose(signals["loss at checkpoint 0"], measure(made, ResponseLoss()))
    assert (
        signals["loss at checkpoint 2"].mean() < signals["loss at checkpoint 1"].mean() < signals["loss at checkpoint 0"].mean()
    )


def test_learnability_is_measured_by_who_has_not_seen_the_record(llama_folder, monkeypatch):
    seen, plain = [], learnt.trained_copy

    def listening(pool, steps, learning_rate, records):
        seen.append({record.key for record in records})
        return plain(pool, steps, learning_rate, records)

    monkeypatch.setattr(learnt, "trained_copy", listening)
    made = pool(llama_folder, [*RECORDS, RECORDS[3]])
    after = Learnability(steps=20, learning_rate=3e-3, shortest=0).score(made)["loss after"]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(made.keys) and abs(len(seen[0]) - len(seen[1])) <= 1
    for known in seen:
        others = [place for place, key in enumerate(made.keys) if key not in known]
        tuned = plain(made, 20, 3e-3, [made.records[place] for place in made.order if made.keys[place] in known])
        assert np.allclose(after[others], losses_under(made, tuned)[others], rtol=1e-3)
    monkeypatch.undo()  # one record, twice, has no other half
    assert np.isfinite(Learnability(steps=2).score(pool(llama_folder, RECORDS[:1] * 2))["loss after"]).all()


def test_a_trajectory_is_of_one_training_and_ends_where_it_ends(llama_folder):
    made, once = pool(llama_folder), pool(llama_folder)
    method = Trajectories(count=4, steps=10, checkpoints=4, learning_rate=3e-3)
    signals = method.choose(made).signals
    after = Learnt(once, 10, 3e-3).model
    assert made.meter.cost.trainings == 1 and made.meter.cost.backward_tokens == once.meter.cost.backward_tokens
    assert np.array_equal(signals["loss at checkpoint 3"], losses_under(once, after).astype(np.float32))
    read = sum(len(piece.input_ids) for record in RECORDS for piece in made.encoder.encode(record))
    assert made.meter.cost.forward_tokens == once.meter.cost.backward_tokens + 4 * read
    assert losses_along(pool(llama_folder), 2, 3e-3, 6).shape == (len(RECORDS), 6)  # fewer steps than points


def test_a_trajectory_is_kept_for_all_budgets_and_charged_to_each(llama_folder, tmp_path):
    method, shared = Trajectories(count=2, steps=4, checkpoints=3), {"library": tmp_path / "library"}
    first, other, alone = (
        pool(llama_folder, folder=tmp_path / "first", **shared), pool(llama_folder, folder=tmp_path / "other", **shared), pool(llama_folder),
    )  # fmt: skip
    one, more, found = method.choose(first), method.model_copy(update={"count": 5}).choose(other), method.choose(alone)
    assert first.meter.cost.trainings == alone.meter.cost.trainings == 1 and other.meter.cost.trainings == 0
    assert all(np.array_equal(one.signals[name], values) for name, values in more.signals.items() if "loss" in name)
    assert all(np.array_equal(found.signals[name], values) for name, values in more.signals.items() if "loss" in name)
    for made in (first, other):
        cost = made.meter.cost
        assert (cost.forward_tokens, cost.backward_tokens) == (alone.meter.cost.forward_tokens, alone.meter.cost.backward_tokens)


def test_groups_are_a_tenth_of_the_budget_unless_they_are_given(llama_folder, monkeypatch):
    asked, plain = [], trained.k_means
    monkeypatch.setattr(trained, "losses_along", lambda pool, *settings: np.arange(len(pool) * 2.0).reshape(-1, 2))
    monkeypatch.setattr(trained, "k_means", lambda points, clusters, seed: asked.append(clusters) or plain(points, 3, seed))
    for count, given in ((25, None), (1200, None), (25, 7), (5, None)):
        Trajectories(count=count, clusters=given, checkpoints=2).choose(pool(llama_folder, RECORDS * 130))
    assert asked == [2, 100, 7, 1]


def test_records_without_a_loss_are_no_group(llama_folder):
    made = pool(llama_folder, [*UNREAD, *RECORDS])
    choice = Trajectories(count=len(RECORDS), steps=2, checkpoints=2, clusters=3).select(made)
    assert min(choice.places) == len(UNREAD) and "6 records have no finite loss" in made.notes[0]
    assert np.isnan(choice.signals["cluster"][:6]).all() and np.isfinite(choice.signals["cluster"][6:]).all()
    assert len(Trajectories(count=2, steps=2, checkpoints=2).select(pool(llama_folder, UNREAD + RECORDS[:1])).places) == 2


def test_difficulty_is_the_ratio_of_perplexities_and_useless_prompts_come_last(llama_folder):
    made = pool(llama_folder)
    signals = InstructionFollowingDifficulty(count=3).score(made)
    ratio = signals["instruction-following difficulty"]
    assert np.allclose(ratio, np.exp(signals["loss"]) / np.exp(signals["loss without prompt"]))
    order = signals["order"]
    assert all((order[i] < 0) == (ratio[i] >= 1) for i in range(len(ratio)))
    limit = float(np.median(ratio))
    for keep in ("highest", "lowest"):
        places = InstructionFollowingDifficulty(below=limit, keep=keep, count=int((ratio < limit).sum())).select(made).places
        assert (ratio[places] < limit).all()


def answers(question, *given):
    return [Record("chat", (Message("user", question), Message("assistant", answer))) for answer in given]


def test_of_several_answers_the_likeliest_is_kept(llama_folder):
    records = answers("Which lamp?", "lamp lamp", "the red one", "zebra quartz") + answers("How many?", "42", "some")
    made = pool(llama_folder, records)
    losses = measure(made, ResponseLoss())
    best = {min(range(3), key=lambda i: losses[i]), min((3, 4), key=lambda i: losses[i])}
    assert set(Answers().select(made).places.tolist()) == best
    worst = {max(range(3), key=lambda i: losses[i]), max((3, 4), key=lambda i: losses[i])}
    assert set(Answers(keep="unlikeliest").select(made).places.tolist()) == worst
    single = pool(llama_folder, RECORDS)
    assert sorted(Answers().select(single).places.tolist()) == list(range(len(RECORDS)))


def test_the_longest_are_those_of_most_response_tokens_before_anything_is_cut(llama_folder):
    turns = tuple(Message(role, "lamp " * 4) for role in ("user", "assistant") * 2)
    records = [Record("chat", turns), *answers("Which lamp?", "lamp " * 5, "fox " * 5, "lamp " * 300, "lamp " * 290)]
    records += [*answers("word " * 300, "lamp " * 6), Record("text", text="The quick brown fox jumps over the lazy dog. " * 3)]
    made = pool(llama_folder, records)
    said = [[turn.content for turn in record.messages if turn.role == "assistant"] or [record.text] for record in records]
    counted = [sum(len(made.encoder.response_ids(text)) for text in texts) for texts in said]
    assert made.tokens[3] == made.tokens[4] and counted[3] > counted[4] > made.encoder.max_length and counted[0] > counted[5]
    by_hand = sorted(made.order.tolist(), key=lambda place: -counted[place])
    assert Longest(count=6).select(made).places.tolist() == by_hand[:6]
    assert Longest(count=6).choose(made).signals["response tokens"].tolist() == counted


def test_joint_rank_ends_are_length_and_difficulty(llama_folder):
    made = pool(llama_folder, [record for i in range(9) for record in answers(f"What is fault {i}?", "lamp " * (i % 3 + 1))])
    for count in range(1, 9):  # of three lengths, three records each
        for weight, alone in ((1, Longest), (0, HighestLoss)):
            joint = JointRank(weight=weight, count=count).select(made)
            assert joint.places.tolist() == alone(count=count).select(made).places.tolist()


def test_a_trace_that_would_be_cut_comes_last_and_one_that_cannot_be_read_after_it(llama_folder):
    records = answers("lamp " * 300, "lamp " * 60) + answers("lamp " * 60, "lamp " * 60, "lamp " * 3) + RECORDS[:5]
    made = pool(llama_folder, records)
    assert len(made.encoder.encode(records[1])[0].input_ids) == made.encoder.max_length > len(records[1].response.split())
    choice = JointRank(weight=1, count=7).select(made)
    assert choice.places.tolist()[6] == 1 and 0 not in choice.places.tolist()
    assert np.isnan(choice.signals["joint rank"][0]) and "1 record has no finite score" in made.notes[0]
    last = JointRank(weight=1, count=7, keep="lowest").select(made).places.tolist()
    assert last[6] == 1 and 0 not in last
    assert JointRank(weight=1, count=7, longest=10_000).select(made).places.tolist()[0] == 1


def test_a_long_text_that_is_split_is_not_cut(llama_folder):
    made = pool(llama_folder, [Record("text", text="The lamp is on. " * 60), *RECORDS[:5]])
    assert len(made.encoder.encode(made.records[0])) > 1
    assert JointRank(weight=1, count=1).select(made).places.tolist() == [0]
    assert 0 not in JointRank(weight=1, count=5, longest=100).select(made).places
    truncating = replace(made, make_encoder=lambda words: Encoder(words, 128, "truncate"))
    assert 0 not in JointRank(weight=1, count=5).select(truncating).places


def test_yes_against_no_is_a_sigmoid_of_summed_spellings(llama_folder):
    made = pool(llama_folder)
    signal = YesOrNo(questions=("Is it about lamps?",))
    found = measure(made, signal)
    worker = made.worker()
    piece = signal._prompt(worker, RECORDS[2], 0)
    with torch.no_grad():
        logits = made.base.model(input_ids=torch.tensor([piece.input_ids]), use_cache=False).logits[0, -1].double()
    odds = [torch.logsumexp(logits[tokens], 0) for tokens in signal._begins(worker)]
    assert found[2] == pytest.approx(float(1 / (1 + torch.exp(odds[1] - odds[0]))), rel=1e-3)
    two = measure(made, YesOrNo(questions=("Is it about lamps?", "Is it clear?")))
    assert (two <= found + 1e-9).all()


def test_all_spellings_of_one_token_count_and_beginnings_only_where_there_is_none():
    signal, known = YesOrNo(questions=("Is it about lamps?",)), {}
    spelled = {word: [number] for number, word in enumerate((*YES, *NO))}
    worker = SimpleNamespace(base=SimpleNamespace(tokenizer=lambda word, add_special_tokens: {"input_ids": known[word]}))
    known |= spelled
    assert signal._begins(worker) == [list(range(6)), list(range(6, 12))]
    known |= {word: [50, 51] for word in (*YES[3:], *NO[:5])}
    assert signal._begins(worker) == [[0, 1, 2], [11]]
    known |= {word: [60, number] if word[0] == " " else [number, 61] for number, word in enumerate((*YES, *NO))}
    assert signal._begins(worker) == [[0, 1, 2], [6, 7, 8]]  # what " YES" and " NO" both begin with says nothing
    known |= {word: [60, 61] for word in known}
    with pytest.raises(UserError, match="tell YES from NO"):
        signal._begins(worker)


def test_the_second_question_is_asked_after_a_yes_to_the_first(llama_folder):
    worker = pool(llama_folder).worker()
    signal = YesOrNo(questions=("Is it about lamps?", "Is it clear?"))
    first, second = (worker.base.tokenizer.decode(signal._prompt(worker, RECORDS[2], asked).input_ids) for asked in range(2))
    assert first.endswith("assistant\n1.") and second.endswith("assistant\n1. YES\n2.")
    assert all("1. Is it about lamps?\n2. Is it clear?" in text for text in (first, second))


def test_the_score_of_no_is_what_yes_leaves(llama_folder, monkeypatch):
    worker, signal = pool(llama_folder).worker(), YesOrNo(questions=("Is it about lamps?",))
    found = signal.measure(worker, RECORDS[:4])
    monkeypatch.setattr(judged, "YES", judged.NO)
    monkeypatch.setattr(judged, "NO", YES)
    assert signal.measure(worker, RECORDS[:4]) == pytest.approx(1 - found)


def test_a_judge_reads_the_first_4096_characters_where_its_context_holds_them(llama_folder):
    worker = pool(llama_folder).worker()
    signal = YesOrNo(questions=("Is it about lamps?",))
    long = answers("Which?", "lamp " * 150)[0]
    ids = signal._prompt(worker, long, 0).input_ids
    assert worker.encoder.max_length < len(ids) < 256 and worker.base.tokenizer.decode(ids).count("lamp ") == 150
    assert signal.measure(worker, [long, RECORDS[0]])[1] == pytest.approx(signal.measure(worker, RECORDS[:1])[0], rel=1e-4)
    texts, encode = [], worker.encoder.prompt_ids
    worker.encoder.prompt_ids = lambda messages: texts.append(messages[0].content) or encode(messages)
    assert len(signal._prompt(worker, answers("q", "q" * 5000)[0], 0).input_ids) == 256
    assert texts[0].split("\n\n")[1] == "q\n" + "q" * 4094


def test_compression_is_of_the_concatenation(llama_folder):
    """Of three texts two are hardest to compress, each by itself; but each repeats the other."""
    generator = np.random.default_rng(0)
    letters, fewer = ("".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"[:size]), 400)) for size in (26, 20))
    made = pool(llama_folder, answers("Which?", f"one {letters}", f"two {letters}", fewer))
    choice = self_scoring.Compression(count=2).select(made)
    alone = choice.signals["compression ratio"]
    assert alone[2] > max(alone[:2])
    assert 2 in choice.places.tolist()


def zipped(texts, budget, first, second, third):
    """The three stages of the paper, all compressed anew."""

    def ratio(text):
        return len(text) / len(zlib.compress(text, 9))

    chosen, known = [], [ratio(text) for text in texts]
    while len(chosen) < budget:
        pot = sorted((place for place in range(len(texts)) if place not in chosen), key=lambda place: known[place])[:first]
        for place in pot:
            known[place] = ratio(b"".join(texts[one] for one in chosen) + texts[place])
        pot = sorted(pot, key=lambda place: known[place])[:second]
        for _ in range(min(third, len(pot), budget - len(chosen))):
            chosen.append(min(pot, key=lambda place: ratio(b"".join(texts[one] for one in chosen) + texts[place])))
            pot.remove(chosen[-1])
    return chosen


def drawn_texts(count):
    generator = np.random.default_rng(1)
    sizes = generator.integers(20, 200, count).tolist()
    return answers("Which?", *("".join(generator.choice(list("abcdefgh "), size)) for size in sizes))


def test_compression_goes_by_stages_and_what_is_known_of_the_others_is_old():
    made = Pool(drawn_texts(12), lambda: None, lambda words: None, quiet=True)
    method = self_scoring.Compression(count=9, first=6, second=3, third=2)
    texts = [content(one).encode() for one in made.records]
    assert method.select(made).places.tolist() == zipped(texts, 9, 6, 3, 2)


def test_compression_by_tokens_goes_on_while_a_record_still_fits():
    made = Pool(drawn_texts(40), lambda: None, lambda words: None, quiet=True)
    made.tokens = np.array([300] * 20 + [20] * 19 + [0])
    chosen = self_scoring.Compression(by="tokens", count=2000, first=20, second=4, third=3).select(made).places
    left = set(range(39)) - set(chosen.tolist())
    used = int(made.tokens[chosen].sum())
    assert 39 not in chosen and len(set(chosen.tolist())) == len(chosen)
    assert used <= 2000 and left and all(used + made.tokens[place] > 2000 for place in left)


def test_the_highest_loss_comes_first_and_what_is_cut_away_last(llama_folder):
    made = pool(llama_folder, [*answers("lamp " * 300, "lamp"), *RECORDS[:5]])
    choice = HighestLoss(count=5).select(made)
    losses = measure(made, ResponseLoss())
    assert choice.places.tolist() == (np.argsort(-losses[1:], kind="stable") + 1).tolist() and np.isnan(losses[0])
    assert HighestLoss(count=5, keep="lowest").select(made).places.tolist() == choice.places.tolist()[::-1]
    assert made.notes == ["1 record has no finite score and comes last"] * 2
