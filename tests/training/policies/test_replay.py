"""Exactly a share of general records is mixed in."""

from types import SimpleNamespace

import pytest
import torch

from selectune.errors import UserError
from tests.training.policies.running import run, same
from tests.training.policies.staged import make


def context(train, general, seed=0):
    return SimpleNamespace(train=list(range(train)), general=[f"g{i}" for i in range(general)],
                           generator=torch.Generator().manual_seed(seed))  # fmt: skip


@pytest.mark.parametrize(("share", "train", "count"), [(0.1, 48, 5), (0.1, 44, 4), (0.0, 50, 0), (0.5, 7, 4), (1.0, 20, 20)])
def test_exactly_the_share_without_repetition(share, train, count):
    policy = make({"method": "replay", "share": share})
    found = policy.records(context(train, 30))
    assert len(found) == len(set(found)) == count and set(found) <= {f"g{i}" for i in range(30)}
    assert found == policy.records(context(train, 30))
    assert count in (0, 20) or found != policy.records(context(train, 30, seed=1))


def test_more_than_there_are_is_refused():
    with pytest.raises(UserError, match="16 general records are asked for and there are 15"):
        make("replay:share=0.5").records(context(32, 15))


def test_general_records_may_come_from_a_file(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text("".join(f'{{"question": "What is {i}?", "answer": "Number {i}."}}\n' for i in range(9)), encoding="utf-8")
    found = make({"method": "replay", "share": 0.5, "source": str(file)}).records(context(8, 0))
    assert len(found) == 4 and all(record.response.startswith("Number") for record in found)


def test_the_training_itself_is_plain(tmp_path, llama_folder):
    assert same(run(tmp_path / "a", llama_folder).after, run(tmp_path / "b", llama_folder, "replay").after)
