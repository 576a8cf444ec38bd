"""Signals against the model's own loss and slow loops; what is kept survives."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch

from selectune.data import Encoder, Message, Record
from selectune.errors import UserError
from selectune.examples import Pool
from selectune.examples.factors import store
from selectune.examples.factors.normalise import standard
from selectune.examples.factors.signals import GradientSketch, OwnEmbedding, ResponseLoss, SentenceEmbedding
from selectune.examples.factors.store import measure, write_scores
from selectune.models import load_base
from tests.examples.words import Words

RECORDS = [
    Record("chat", (Message("user", f"What is fault {i}?"), Message("assistant", "lamp " * (i % 5 + 1) + f"{i * 7} is on.")))
    for i in range(9)
] + [Record("text", text="The quick brown fox jumps over the lazy dog. " * 3)]


def pool(base, records=RECORDS, **options):
    return Pool(records, lambda: load_base(base), lambda words: Encoder(words, 128), quiet=True, **options)


def own_loss(base, ids, labels):
    """The model's own mean loss of one sequence."""
    with torch.no_grad():
        return float(base.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss)


def test_losses_are_the_models_own(llama_folder):
    made = pool(llama_folder)
    found = measure(made, ResponseLoss())
    for record, value in zip(RECORDS, found, strict=True):
        (piece,) = made.encoder.encode(record)
        labels = [-100, *piece.labels[1:]]
        assert value == pytest.approx(own_loss(made.base, piece.input_ids, labels), rel=1e-4)
    alone = measure(made, ResponseLoss(conditional=False))
    (piece,) = made.encoder.encode(RECORDS[3])
    response = [label for label in piece.labels if label != -100]
    assert alone[3] == pytest.approx(own_loss(made.base, [1, *response], [-100, *response]), rel=1e-4)
    assert not np.allclose(alone, found)


def test_embeddings_are_means_of_the_last_states(llama_folder):
    made = pool(llama_folder)
    found = measure(made, OwnEmbedding())
    for number in (0, 9):
        ids = made.base.tokenizer(RECORDS[number].question)["input_ids"]
        with torch.no_grad():
            states = made.base.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:]
        assert np.allclose(found[number], torch.nn.functional.normalize(states.mean(0), dim=0), atol=1e-5)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_sketches_keep_inner_products_of_adapter_gradients(llama_folder):
    made = pool(llama_folder)
    signal = GradientSketch(dimension=4096, rank=2, unit=False)
    found = measure(made, signal)
    by_hand = []
    for record in RECORDS[:5]:
        (piece,) = made.encoder.encode(record)
        ids, labels = torch.tensor([piece.input_ids]), torch.tensor([[-100, *piece.labels[1:]]])
        adapters, handles = [], []
        for place, name in enumerate(name for block in made.base.anatomy.blocks for name in block.linears):
            module = made.base.model.get_submodule(name)
            generator = torch.Generator().manual_seed(place)
            side = torch.randn(2, module.in_features, generator=generator) / 2**0.5
            adapter = torch.zeros(module.out_features, 2, requires_grad=True)
            adapters.append(adapter)
            handles.append(module.register_forward_hook(lambda m, x, y, a=adapter, s=side: y + x[0] @ s.T @ a.T))
        made.base.model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        by_hand.append(torch.cat([adapter.grad.reshape(-1) for adapter in adapters]))
        for handle in handles:
            handle.remove()
        made.base.model.zero_grad()
    exact = torch.stack(by_hand).double().numpy()
    wanted, got = exact @ exact.T, found[:5].astype(np.float64) @ found[:5].astype(np.float64).T
    assert np.allclose(got, wanted, atol=0.15 * np.abs(wanted).max())
    assert np.linalg.norm(found[:5], axis=1) == pytest.approx(np.linalg.norm(exact, axis=1), rel=0.1)


def test_a_base_in_bfloat16_gives_nearly_the_same_sketches(llama_folder):
    exact = measure(pool(llama_folder), GradientSketch())
    rounded = measure(pool(llama_folder, bfloat16=True), GradientSketch())
    assert (exact * rounded).sum(1) == pytest.approx(1, abs=0.02)


def test_equal_records_are_measured_once_and_order_does_not_matter(llama_folder):
    doubled = pool(llama_folder, [*RECORDS, *RECORDS[::-1]])
    found = measure(doubled, ResponseLoss())
    assert np.array_equal(found[: len(RECORDS)], found[len(RECORDS) :][::-1])
    assert np.array_equal(found[: len(RECORDS)], measure(pool(llama_folder), ResponseLoss()))


def test_what_was_measured_before_a_kill_is_not_measured_again(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    whole = measure(pool(llama_folder), ResponseLoss())
    calls = []
    plain = ResponseLoss.measure

    def counted(self, worker, records):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(records))
        return plain(self, worker, records)

    monkeypatch.setattr(ResponseLoss, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(pool(llama_folder, folder=tmp_path), ResponseLoss())
    assert calls == [2, 2, 2]
    monkeypatch.setattr(ResponseLoss, "measure", lambda self, w, r: calls.append(len(r)) or plain(self, w, r))
    again = measure(pool(llama_folder, folder=tmp_path), ResponseLoss())
    assert calls == [2, 2, 2, 2, 2] and np.array_equal(again, whole)
    measure(pool(llama_folder, folder=tmp_path), ResponseLoss())
    assert len(calls) == 5
    measure(pool(llama_folder, folder=tmp_path), ResponseLoss(conditional=False))
    assert len(calls) == 10  # another setting is another signal


def test_what_another_choice_measured_is_not_measured_again_and_costs_the_same(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SECONDS", 0.0)
    shared = {"library": tmp_path / "library"}
    first, second = (pool(llama_folder, folder=tmp_path / name, **shared) for name in ("one", "two"))
    found = measure(first, ResponseLoss())
    spent = first.meter.cost.forward_tokens
    assert spent > 0
    assert np.array_equal(measure(first, ResponseLoss()), found) and first.meter.cost.forward_tokens == spent  # its own is free
    monkeypatch.setattr(ResponseLoss, "measure", lambda *_: pytest.fail("measured again"))
    half = measure(second, ResponseLoss(), RECORDS[:5])
    assert np.array_equal(half, found[:5]) and 0 < second.meter.cost.forward_tokens < spent
    for _ in range(2):  # each value is counted once
        assert np.array_equal(measure(second, ResponseLoss()), found)
        assert second.meter.cost.forward_tokens == pytest.approx(spent, abs=2)
    with second.meter:
        measure(pool(llama_folder, folder=tmp_path / "three", meter=second.meter, **shared), ResponseLoss())
        second.meter.count(seconds=100)
    taken = second.meter.cost
    assert taken.forward_tokens == pytest.approx(2 * spent, abs=4) and taken.seconds > 100


def test_two_choices_at_once_measure_a_signal_once_and_waiting_costs_nothing(llama_folder, tmp_path, monkeypatch):
    shared, begun, calls = {"library": tmp_path / "library"}, Event(), []
    first, second = (pool(llama_folder, folder=tmp_path / name, **shared) for name in ("one", "two"))
    plain = ResponseLoss.measure

    def slow(self, worker, records):
        calls.append(len(records))
        begun.set()
        time.sleep(1)
        return plain(self, worker, records)

    monkeypatch.setattr(ResponseLoss, "measure", slow)
    with ThreadPoolExecutor() as threads, first.meter, second.meter:
        found = threads.submit(measure, first, ResponseLoss())
        begun.wait(30)
        again = measure(second, ResponseLoss())
        assert np.array_equal(found.result(), again) and len(calls) == 1
    assert abs(first.meter.cost.seconds - second.meter.cost.seconds) < 0.5


def test_what_is_kept_is_one_bases_in_one_reading(tiny_folders, tmp_path):
    """Another base, another length, another prompt of the system or another precision measures anew."""

    def found(architecture="llama", length=128, bfloat16=False, **reading):
        return measure(
            Pool(
                RECORDS[:2],
                lambda: load_base(tiny_folders[architecture]),
                lambda words: Encoder(words, length, **reading),
                bfloat16=bfloat16,
                quiet=True,
                folder=tmp_path,
            ),
            ResponseLoss(),
        )

    plain = found()
    others = (found("gpt2"), found(length=16), found(system="Be brief."), found(bfloat16=True))
    assert all(not np.array_equal(one, plain) for one in others)
    assert len(list(tmp_path.rglob("part-*.parquet"))) == 5
    assert np.array_equal(found(), plain) and len(list(tmp_path.rglob("part-*.parquet"))) == 5


def test_what_needs_no_base_loads_none_to_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", Words)
    made = Pool(RECORDS, lambda: pytest.fail("loaded"), lambda words: None, quiet=True, folder=tmp_path)
    assert np.array_equal(measure(made, SentenceEmbedding()), measure(made, SentenceEmbedding()))
    assert len(list(tmp_path.rglob("part-*.parquet"))) == 1


def test_two_choices_that_begin_at_once_keep_both_parts(tmp_path):
    for key in (b"a", b"b"):
        store._write(tmp_path / "signal", np.array([key]), np.ones(1), [slice(0, 1)], {})
        (part,) = (tmp_path / "signal").glob("part-*.parquet")
        part.rename(tmp_path / part.name)  # the other does not see it
    assert len(list(tmp_path.glob("part-000000-*.parquet"))) == 2


def test_a_damaged_part_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("selectune.models.sentence_encoder.sentence_encoder", Words)
    made = Pool(RECORDS, lambda: pytest.fail("loaded"), lambda words: None, quiet=True, folder=tmp_path)
    measure(made, SentenceEmbedding())
    (part,) = tmp_path.rglob("part-*.parquet")
    part.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=f"{part.name}: cannot be read.*remove it") as error:
        measure(made, SentenceEmbedding())
    assert "\n" not in str(error.value)


def test_a_constant_is_at_no_distance_from_its_mean():
    assert standard(np.array([0.1, 0.1, 0.1])).tolist() == [0, 0, 0]  # their deviation is 1e-17


def test_scores_are_a_table(llama_folder, tmp_path):
    import pandas as pd

    made = pool(llama_folder)
    write_scores(tmp_path / "scores.parquet", made, {"loss": np.arange(10.0)}, np.array([4, 2]))
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table["chosen"].sum() == 2 and table["rank"][4] == 0 and table["rank"][2] == 1
    assert table["key"].tolist() == made.keys
