"""Long loops are seen, within one another too; on a terminal only."""

import dataclasses
import io

import pytest
from rich.console import Console

from selectune import progress
from selectune.models import load_base
from selectune.parameters import Selection
from selectune.parameters.factors.search import Table
from selectune.parameters.factors.trial import trial
from selectune.progress import watched
from tests.contracts.test_parameters import context


@pytest.fixture
def seen(monkeypatch):
    found = io.StringIO()
    terminal = Console(file=found, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "CONSOLE", terminal)
    monkeypatch.setattr("selectune.parameters.factors.search.CONSOLE", terminal)
    return found


def test_loops_within_loops_are_seen_and_nothing_is_left(seen):
    pairs = [(one, other) for one in watched("ab", "outside", False) for other in watched(iter("cd"), "inside", False, total=2)]
    assert pairs == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert "outside" in seen.getvalue() and "inside" in seen.getvalue() and seen.getvalue().endswith("\x1b[2K")
    assert list(watched([1], "one only", False)) == [1] and list(watched([1, 2], "in silence", True)) == [1, 2]
    assert "one only" not in seen.getvalue() and "in silence" not in seen.getvalue()


def test_a_short_training_is_seen_within_a_search(seen, llama_folder):
    base = load_base(llama_folder)
    asked = dataclasses.replace(context(base), quiet=False)
    last = Selection.of(base.model, [base.anatomy.blocks[-1].parameters[0]])
    with Table(lambda steps: trial(asked, last, steps=steps, learning_rate=1e-3).losses[-1], expected=2, quiet=False) as worth:
        worth(1)
        assert "a short training" not in seen.getvalue()
        worth(3)
    assert "trying" in seen.getvalue() and "a short training" in seen.getvalue()
