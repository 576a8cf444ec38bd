"""The tables beside an experiment's, from made-up cells."""

from types import SimpleNamespace

import numpy as np
import pytest

from selectune.experiment.beside import evenness, indicators
from selectune.experiment.columns import beats
from selectune.experiment.judging import FORGETTING, GAIN, Comparison, Interval, Outcome
from selectune.experiment.lines import EVERY_RECORD, MethodLine
from selectune.experiment.results import Row, Sheet
from selectune.experiment.store import Cell
from selectune.meter import Cost
from selectune.run import Benchmark, Item


def target(metric, score, higher, items=20):
    return Benchmark(name="target", role="target", metric=metric, higher_is_better=higher, score=score,
                     items=[Item(id=str(n), value=score) for n in range(items)])  # fmt: skip


def row(name, examples, loss, right, tokens, **cost):
    benchmarks = [target("answer_nll", loss, False), target("accuracy_normalised", right, True)]
    cell = Cell(table="entries", method=name, task="t", budget=0.1, seed=0, tokens=tokens, benchmarks=benchmarks,
                choose=Cost(stage="choose", **cost))  # fmt: skip
    nothing = Outcome((0,), np.zeros((1, 2)), np.zeros((1, 2)))
    return Row(MethodLine(name=name, examples=examples), [cell], nothing, Interval(-loss, -loss, -loss))


def sheet(*rows, task="t"):
    return Sheet("entries", task, 0.1, list(rows), rows[0].cells[0].benchmarks)


FULL = row(EVERY_RECORD, "all", 1.5, 0.6, 2000)
ROWS = (FULL, row("random", "random", 1.9, 0.5, 200), row("lobass", "lobass", 1.4, 0.3, 200, forward_tokens=9000, backward_tokens=512,
                                                            trainings=1))  # fmt: skip


def cells(lines, name):
    return [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {name} |")).strip("|").split("|")]


@pytest.mark.parametrize(
    ("gain", "forgetting", "said"),
    [(0.2, 0.2, "both"), (0.2, 0.0, "gain"), (0.0, 0.2, "forgetting"), (0.0, 0.0, "neither"), (-0.2, 0.0, "worse on gain"),
     (0.2, -0.2, "gain, worse on forgetting"), (-0.2, -0.2, "worse on both")],
)  # fmt: skip
def test_a_row_is_better_than_random_worse_or_not_told_from_it(gain, forgetting, said):
    plan = SimpleNamespace(protocol=SimpleNamespace(confidence=0.95))
    made = sheet(*ROWS)
    assert beats(made, ROWS[2], plan) == "–"
    for on, middle in ((GAIN, gain), (FORGETTING, forgetting)):
        made.against_random[on]["lobass"] = Comparison(Interval(middle - 0.1, middle, middle + 0.1), 0.01, 0.01)
    assert beats(made, ROWS[2], plan) == said
    for found in made.against_random.values():  # sure one by one, not after the correction
        found["lobass"] = found["lobass"]._replace(p_corrected=0.06)
    assert beats(made, ROWS[2], plan) == "neither"


def test_selectors_stand_on_one_sheet():
    lines = indicators(sheet(*ROWS), "loss")
    assert cells(lines, EVERY_RECORD)[1:3] == ["100.0%", "1.000"] and cells(lines, EVERY_RECORD)[7] == "nothing"
    assert cells(lines, "random")[1:3] == ["10.0%", "0.670"]  # exp(1.5 - 1.9)
    assert cells(lines, "lobass") == ["lobass", "10.0%", "1.105", "9,000", "512", "1", "4", "base, pool", "2", "2", "2"]
    assert cells(indicators(sheet(*ROWS), "choice"), "lobass")[2] == "0.500"
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["lobass", EVERY_RECORD, "random"]  # by gain
    assert indicators(sheet(*ROWS[1:]), "loss") == [] and indicators(sheet(FULL), "loss") == []


def test_methods_are_even_over_tasks_or_not():
    first = sheet(row("even", "random", 1.0, 0.5, 10), row("uneven", "random", 1.0, 0.9, 10), row("once", "random", 1.0, 0.9, 10))
    second = sheet(row("even", "random", 1.0, 0.5, 10), row("uneven", "random", 1.0, 0.3, 10), task="u")
    lines = evenness([first, second], {"t": ["choice", "loss"], "u": ["choice"]})
    assert cells(lines, "even")[1:] == ["50.0%", "0.0%", "0.00", "50.0%"]
    assert cells(lines, "uneven")[1:] == ["60.0%", "30.0%", "0.50", "30.0%"]
    assert not any("once" in line for line in lines)
    assert evenness([first, second], {"t": ["loss"], "u": ["loss"]}) == [] == evenness([first], {"t": ["choice"]})
