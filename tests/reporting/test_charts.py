"""Pictures: what they show is what they were given, and every text in them is escaped."""

import itertools
import random
import re

import pytest

from selectune.reporting import charts, wording
from selectune.reporting.charts import Spot, front, thin, ticks


def test_the_front_is_what_no_other_point_beats():
    draw = random.Random(3)
    points = [(draw.randrange(30), draw.randrange(30)) for _ in range(60)]
    unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    found = front(points)
    assert set(found) == unbeaten and found == sorted(found)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.37, 0.02), (3.1, 2800), (1e-6, 3e-6), (2, 2)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert found and len(found) <= 12
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    steps = {round((b - a) / (high - low), 6) for a, b in itertools.pairwise(found)}
    assert len(steps) <= 1


def test_thinning_keeps_the_mean():
    points = [(x, (x * 37) % 11) for x in range(1200)]
    kept = thin(points, 300)
    assert len(kept) == 300
    assert sum(y for _, y in kept) / 300 == pytest.approx(sum(y for _, y in points) / 1200)


def test_bars_and_lines_escape_and_describe():
    picture = charts.lines({"<loss>": [(1, 2.0), (2, 1.0)], "dev": [(2, 1.5)]}, "Loss", "step", "nats", (2, "kept"))
    assert "<loss>" not in picture and "&lt;loss&gt;" in picture and 'role="img"' in picture
    assert charts.lines({"none": []}, "Loss", "step", "nats") == ""
    picture = charts.bars([1.0, 3.0, 2.0], [False, True, False], "Blocks", "block", "score", ("trained", "frozen"))
    assert len(re.findall(r"<rect", picture)) == 3 and "trained: 1" in picture
    heights = [float(value) for value in re.findall(r'<rect[^>]* height="([\d.]+)"', picture)]
    assert heights[1] == max(heights) and heights[1] / heights[0] == pytest.approx(3, rel=0.02)


def test_points_with_one_place_or_no_spread_can_be_drawn():
    spot = Spot("a & b", (0.1, 0.1, 0.1), (0.0, 0.0, 0.0))
    assert "a &amp; b" in charts.scatter([spot, spot], "across", "up")


def test_words_for_times_and_sizes():
    assert [wording.duration(value) for value in (8.31, 59.96, 861, 7500)] == ["8.3 s", "1 min 00 s", "14 min 21 s", "2 h 05 min"]
    assert [wording.size(value) for value in (512, 2048, 3 * 2**20, 6.44 * 2**30)] == ["512 B", "2.0 KiB", "3.0 MiB", "6.44 GiB"]
