"""What was kept and left out, on the page: true numbers, nothing that a record says can break out, and a map of any pool."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from selectune import recipe as recipes
from selectune.data import Message, Record, records_from_file, records_to_file
from selectune.reporting import charts, examples, write_report
from selectune.reporting.projection import principal, project
from selectune.run import Run

EVIL = "</script><script>alert(1)</script> & <b>"


def a_run(folder, count=40, signals=("difficulty",), vectors=False, choice="ifd"):
    run = Run.create(folder / "run", recipes.parse({"data": {"train": "pool.jsonl"}, "examples": choice}))
    records = [Record("chat", (Message("user", f"{EVIL} question {i}"), Message("assistant", "word " * (i % 7 + 1))), source=f"/a/{i % 2}.jsonl",
                      line=i) for i in range(count)]  # fmt: skip
    run.path("data").mkdir()
    records_to_file(records, run.path("data", "train.jsonl"))
    values = {name: np.arange(count, dtype=float) * (number + 1) for number, name in enumerate(signals)}
    for column in values.values():
        column[1] = np.nan
    rank = np.where(np.arange(count) >= count - 10, count - 1 - np.arange(count), -1)
    table = {"key": [record.key for record in records], "source": [record.source for record in records],
             "line": [record.line for record in records], **values, "chosen": rank >= 0, "rank": rank}  # fmt: skip
    pd.DataFrame(table).to_parquet(run.path("scores.parquet"))
    run.write(
        "examples.json",
        {"method": {"method": "ifd", "fraction": 0.25}, "pool": count, "chosen": 10, "notes": ["one has no score"]},
    )
    if vectors:
        room = run.path("examples", "signals", "embedding-by-the-base-0123")
        room.mkdir(parents=True)
        turned = np.random.default_rng(0).standard_normal((count, 8)) * [9, 5, 1, 1, 1, 1, 1, 1]
        pd.DataFrame({"key": table["key"], "value": turned.tolist()}).to_parquet(room / "part-000000.parquet")
    return run


def points_of(page):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])


def test_the_page_tells_what_was_kept(tmp_path):
    page = write_report(a_run(tmp_path)).read_text(encoding="utf-8")
    section = page.split('id="examples"')[1].split("</section>")[0]
    assert "10 of 40 records (25.0 %)" in section and "one has no score" in section
    assert "alert(1)</script>" not in page.replace("&lt;", "<!").replace("\\u003c", "<!")  # what records say is text
    assert "<" not in re.search(r'application/json">(.*?)</script>', section, re.S)[1]  # as what it says of points is, whole
    found = points_of(section)
    assert found["signals"] == ["difficulty"] and len(found["points"]) == 40
    assert sum(point[2] for point in found["points"]) == 10
    assert found["points"][39][2] == 1 and found["points"][39][3].startswith(EVIL) and found["points"][39][6] == ["39"]
    assert found["points"][1][6] == ["–"]
    assert "lengths of question and answer" in section


def test_medians_sources_and_the_records_at_both_ends(tmp_path):
    found = examples.examples_of(a_run(tmp_path))
    (signal,) = found.signals
    assert signal.kept[1] == "34.5" and signal.dropped[1] == "15"  # of 30..39, and of 0, 2..29
    assert sorted(found.sources) == [("0.jsonl", 20, 5), ("1.jsonl", 20, 5)]
    assert [shown.rank for shown in found.kept] == list(range(1, 11)) and found.kept[0].signals == ["39"]
    assert [shown.signals[0] for shown in found.dropped] == ["29", "28", "27", "26", "25", "24", "6", "5", "4", "3", "2", "0"]
    assert all(shown.rank is None for shown in found.dropped)


def test_what_was_left_out_is_shown_once_where_the_first_signal_has_too_few_values():
    places, few = np.arange(20), np.where(np.arange(20) < 5, np.arange(20.0), np.nan)
    shown, how = examples._left_out(places, {"added coverage": few})
    assert shown == list(range(12)) and how == "the first by content"
    shown, how = examples._left_out(places, {"added coverage": few, "length": np.arange(20.0)})
    assert shown == [19, 18, 17, 16, 15, 14, 5, 4, 3, 2, 1, 0] and how == "the highest and the lowest by length"


def test_a_record_that_was_changed_is_shown_as_it_trained(tmp_path):
    run = a_run(tmp_path)
    records = records_from_file(run.path("data", "train.jsonl"))[30:]
    changed = [replace(one, messages=(one.messages[0], Message("assistant", f"anew {one.line}"))) for one in records]
    records_to_file(changed, run.path("data", "chosen.jsonl"))
    found = examples.examples_of(run)
    assert [shown.response for shown in found.kept] == [f"anew {line}" for line in range(39, 29, -1)]
    assert not any("anew" in shown.response for shown in found.dropped)


def test_points_stand_where_they_are_drawn(tmp_path):
    found = examples.examples_of(a_run(tmp_path, vectors=True))
    assert found.plane.of == "embedding by the base" and 0.8 < found.plane.share < 1
    data = json.loads(found.data.replace("\\u003c", "<"))
    drawn = re.findall(r"M([\d.]+) ([\d.]+)h0", found.map)
    assert sorted((float(x), float(y)) for x, y in drawn) == sorted((point[0], point[1]) for point in data["points"])
    strong = re.search(r'class="dots d1"[^>]* d="([^"]*)"', found.map)[1]
    assert strong.count("M") == 10


def test_more_points_than_a_picture_holds_are_sampled_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MOST", 25)
    run = a_run(tmp_path, vectors=True)
    page = write_report(run).read_text(encoding="utf-8")
    assert len(points_of(page)["points"]) == 25 and "25 of 40 records are drawn" in page
    assert write_report(run).read_text(encoding="utf-8") == page


@pytest.mark.parametrize(("count", "signals"), [(11, ()), (12, ("a", "b", "c"))])
def test_any_pool_can_be_drawn(tmp_path, count, signals):
    found = examples.examples_of(a_run(tmp_path, count, signals))
    assert found.drawn == count and len(found.signals) == len(signals)
    if not signals:
        assert found.dropped_by == "the first by content" and len(found.dropped) == 1


def test_without_a_choice_the_page_says_so(tmp_path):
    run = a_run(tmp_path)
    for file in ("scores.parquet", "examples.json"):
        run.path(file).unlink()
    assert "has not finished" in write_report(run).read_text(encoding="utf-8").split('id="examples"')[1].split("</section>")[0]
    every = a_run(tmp_path / "every", choice="all")
    every.path("scores.parquet").unlink()
    assert "Every record of the training data" in write_report(every).read_text(encoding="utf-8")


def test_principal_components_are_numpys():
    draw = np.random.default_rng(2)
    values = draw.standard_normal((50, 6)) * [5, 3, 1, 1, 1, 1]
    places, share = principal(values)
    centred = values - values.mean(0)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(places) == pytest.approx(np.abs(left[:, :2] * spread[:2]))
    assert share == pytest.approx((spread[:2] ** 2).sum() / (spread**2).sum())
    assert principal(np.ones((4, 1)))[0].shape == (4, 2) and principal(-values)[0] == pytest.approx(-places)


def test_constant_and_missing_signals_do_no_harm(tmp_path):
    lengths = np.array([[3.0, 5.0], [4.0, 9.0], [8.0, 2.0]])
    signals = {"same": np.ones(3), "none": np.full(3, np.nan), "some": np.array([np.nan, 1.0, 2.0])}
    plane = project(["a", "b", "c"], signals, lengths, tmp_path / "nothing")
    assert np.isfinite(plane.places).all() and plane.of.startswith("same, none, some, lengths")


def test_a_band_marks_what_lies_outside():
    picture = charts.dots(
        [("above", (0.3, 0.4, 0.5)), ("in", (0.1, 0.25, 0.3)), ("be<low", (-0.2, 0.0, 0.2))], (0.1, 0.2, 0.3), "gain", "band"
    )
    assert (
        picture.count('<circle class="good"')
        == picture.count('<circle class="bad"')
        == picture.count('<circle class="plain"')
        == 1
    )
    assert "be&lt;low" in picture and "above: +0.4" in picture
    assert charts.dots([], (0.0, 0.0, 0.0), "gain", "band")
