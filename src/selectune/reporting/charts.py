"""Small pictures as inline SVG, readable in the dark, in print and by a screen reader.

Knows: lines, bars, intervals, points and heat maps; their colours come from the page's style. Does not know: any run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]
WIDTH = 760
CLOUD = 520  # height of a cloud of points
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 46  # room around a chart, for its labels


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from ``low`` to ``high``, about so many."""
    rough = (high - low) / about
    if rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(number * step, 12) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thin(points: Points, most: int = 300) -> list[tuple[float, float]]:
    """Return at most so many points, each the mean of its neighbours."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def front(points: Points) -> list[tuple[float, float]]:
    """Return the points that no other beats (less across, more up), from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def lines(series: Mapping[str, Points], title: str, across: str, up: str, marked: tuple[float, str] | None = None) -> Markup:
    """Draw curves over labelled axes: the first thin, the others strong with their points; optionally one marked place."""
    curves = {name: thin(curve) for name, curve in series.items() if curve}
    if not curves:
        return Markup()
    height = 300
    xs, ys = zip(*(point for curve in curves.values() for point in curve))
    low = 0.0 if min(ys) < 0.6 * max(ys) else min(ys) - 0.1 * (max(ys) - min(ys))
    x_at, y_at = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT), _scale(low, max(ys), height - BOTTOM, TOP)
    body = _grid(x_at, y_at, ticks(min(xs), max(xs), 6), ticks(low, max(ys)), across, up, height)
    if marked:
        at = x_at(marked[0])
        body.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        body.append(_text(at - 6 if at > WIDTH / 2 else at + 6, TOP + 12, marked[1], "end" if at > WIDTH / 2 else "start"))
    for index, curve in enumerate(curves.values()):
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in curve)
        body.append(f'<polyline class="curve c{index}" points="{path}"/>')
        if index:
            body += [f'<circle class="c{index}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4"/>' for x, y in curve]
    body += _legend([(f"c{index}", name) for index, name in enumerate(curves)])
    said = "; ".join(f"{name} from {curve[0][1]:.3f} to {curve[-1][1]:.3f}" for name, curve in curves.items())
    return _svg(WIDTH, height, f"{title}, {up} by {across}", said, body)


def bars(
    values: Sequence[float | None], marked: Sequence[bool], title: str, across: str, up: str, legend: tuple[str, str]
) -> Markup:
    """Draw one bar per value, marked ones strong; without values, a strip that shows only the marks."""
    known = [value for value in values if value is not None]
    height = 220 if known else 104
    x_at = _scale(0, len(values), LEFT, WIDTH - RIGHT)
    y_at = _scale(0, max(known, default=1.0) or 1.0, height - BOTTOM, TOP)
    body = _grid(x_at, y_at, [], ticks(0, max(known)) if known else [], across, up if known else "", height)
    every = 1 if len(values) <= 16 else 5
    for index, (value, mark) in enumerate(zip(values, marked, strict=True)):
        top = min(y_at(1.0 if not known else value or 0.0), height - BOTTOM - 1.5)
        body.append(f'<rect class="{"strong" if mark else "weak"}" x="{x_at(index) + 1.5:.1f}" y="{top:.1f}" rx="1.5" '
                    f'width="{max(x_at(1) - x_at(0) - 3, 1):.1f}" height="{height - BOTTOM - top:.1f}"/>')  # fmt: skip
        if index % every == 0:
            body.append(_text((x_at(index) + x_at(index + 1)) / 2, height - BOTTOM + 17, str(index), "middle"))
    body += _legend([("strong", legend[0]), ("weak", legend[1])])
    said = f"{legend[0]}: {', '.join(str(index) for index, mark in enumerate(marked) if mark) or 'none'}"
    return _svg(WIDTH, height, title, said, body)


def heat(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str, up: str) -> Markup:
    """Draw shares from 0 to 1 as a grid, the first row below, the darkest cell the largest share."""
    most = max((value for row in values for value in row), default=0.0)
    wide, high, top = (WIDTH - LEFT - RIGHT) / max(len(columns), 1), 18, 34
    bottom = top + high * len(rows)
    body = [_text(4, 16, up, "start", "title")]
    every = 1 if len(rows) <= 16 else 5
    for index, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = bottom - high * (index + 1)
        if index % every == 0:
            body.append(_text(LEFT - 8, y + high - 5, name, "end"))
        for column, (matrix, value) in enumerate(zip(columns, row, strict=True)):
            shade = f'class="strong" opacity="{0.12 + 0.88 * value / most:.3f}"' if value else 'class="weak" opacity="0.2"'
            body.append(f'<rect {shade} x="{LEFT + wide * column + 1:.1f}" y="{y + 1:.1f}" width="{max(wide - 2, 1):.1f}" '
                        f'height="{high - 2}" rx="1.5"><title>{escape(f"{name}, {matrix}: {value:.4%}")}</title></rect>')  # fmt: skip
    for column, matrix in enumerate(columns):
        x, y = LEFT + wide * (column + 0.5), bottom + 14
        body.append(f'<g transform="rotate(-35 {x:.1f} {y:.1f})">{_text(x, y, matrix, "end")}</g>')
    body += _legend([("weak", "0 %"), ("strong", f"{most * 100:.3g} %")])
    room = round(4.5 * max(map(len, columns), default=0)) + 30
    return _svg(WIDTH, bottom + room, title, f"largest share {most:.3%}", body)


def interval(low: float, middle: float, high: float, widest: float, tone: str, limit: float | None = None) -> Markup:
    """Draw one interval around its middle between ``-widest`` and ``widest``, with a line at zero and one at a limit."""
    at = _scale(-widest, widest, 8, 212)
    body = [f'<line class="zero" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="0" y2="24"/>']
    if limit is not None and abs(limit) < widest:
        body.append(f'<line class="limit" x1="{at(limit):.1f}" x2="{at(limit):.1f}" y1="0" y2="24"/>')
    body.append(f'<line class="whisker {tone}" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="12" y2="12"/>')
    body.append(f'<circle class="{tone}" cx="{at(middle):.1f}" cy="12" r="5"/>')
    return _svg(220, 24, f"{middle:+.3f}, from {low:+.3f} to {high:+.3f}", "", body)


def axis(widest: float, scale: float = 1.0) -> Markup:
    """Draw the axis that :func:`interval` is read by; its numbers are multiplied by ``scale``."""
    at = _scale(-widest, widest, 8, 212)
    places = [place for place in ticks(-widest, widest, 6) if 12 <= at(place) <= 208]
    body = [_text(at(place), 13, _signed(place * scale), "middle") for place in places]
    body += [f'<line class="grid" x1="{at(place):.1f}" x2="{at(place):.1f}" y1="18" y2="24"/>' for place in places]
    return _svg(220, 24, "Scale of the intervals below", "", body)


@dataclass(frozen=True)
class Spot:
    """A named point with an interval on both axes."""

    name: str
    x: tuple[float, float, float]
    """Low, middle, high."""
    y: tuple[float, float, float]


def scatter(spots: Sequence[Spot], across: str, up: str, up_scale: float = 1.0) -> Markup:
    """Draw named points with their intervals, and the front of those that none beats (left and up is better)."""
    height = 420
    (x_low, x_high), (y_low, y_high) = (_room([value for spot in spots for value in side(spot)]) for side in (_x, _y))
    x_at, y_at = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(y_low, y_high, height - BOTTOM, TOP)
    body = _grid(x_at, y_at, ticks(x_low, x_high, 6), ticks(y_low, y_high), across, up, height, up_scale)
    best = front([(spot.x[1], spot.y[1]) for spot in spots])
    steps = [(best[0][0], y_low)]
    for (x, y), (right, _) in zip(best, [*best[1:], (x_high, 0.0)], strict=True):
        steps += [(x, y), (right, y)]
    body.append(f'<polyline class="front" points="{" ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in steps)}"/>')
    taken = [(x_at(spot.x[1]) - 7, y_at(spot.y[1]) - 7, x_at(spot.x[1]) + 7, y_at(spot.y[1]) + 7) for spot in spots]
    for spot in spots:
        x, y = x_at(spot.x[1]), y_at(spot.y[1])
        tone = "strong" if (spot.x[1], spot.y[1]) in best else "weak"
        body.append(f'<line class="error" x1="{x_at(spot.x[0]):.1f}" x2="{x_at(spot.x[2]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<line class="error" x1="{x:.1f}" x2="{x:.1f}" y1="{y_at(spot.y[0]):.1f}" y2="{y_at(spot.y[2]):.1f}"/>')
        body.append(f'<circle class="{tone}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
    body += [_label(spot.name, x_at(spot.x[1]), y_at(spot.y[1]), taken) for spot in spots]
    body += _legend([("strong", "no other run beats it on both"), ("weak", "beaten")])
    said = "; ".join(f"{spot.name}: {_signed(spot.y[1] * up_scale)} at {_signed(spot.x[1])}" for spot in spots)
    return _svg(WIDTH, height, f"{up} against {across}", said, body)


def dots(
    rows: Sequence[tuple[str, tuple[float, float, float]]], band: tuple[float, float, float], across: str, legend: str
) -> Markup:
    """Draw named values with their intervals, one below the other, over a shaded band.

    Args:
        rows: name -> low, middle, high. band: the same, of what they are compared with.
    """
    left, high = 30 + round(7.2 * max((len(name) for name, _ in rows), default=0)), 22
    bottom = TOP + high * len(rows)
    values = [*band, *(value for _, row in rows for value in row)]
    low, top = min(values), max(values)
    air = 0.04 * (top - low) or 1.0
    at = _scale(low - air, top + air, left, WIDTH - RIGHT)
    body = [
        f'<rect class="band" x="{at(band[0]):.1f}" y="{TOP}" width="{max(at(band[2]) - at(band[0]), 1):.1f}" height="{bottom - TOP}"/>'
    ]
    body.append(f'<line class="mark" x1="{at(band[1]):.1f}" x2="{at(band[1]):.1f}" y1="{TOP}" y2="{bottom}"/>')
    for place in ticks(low, top, 6):
        body.append(
            f'<line class="{"zero" if place == 0 else "grid"}" x1="{at(place):.1f}" x2="{at(place):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
        body.append(_text(at(place), bottom + 17, _plain(place), "middle"))
    for number, (name, (less, middle, more)) in enumerate(rows):
        y = TOP + high * (number + 0.5)
        tone = "good" if middle > band[2] else "bad" if middle < band[0] else "plain"
        body.append(_text(left - 12, y + 4, name, "end", "name"))
        body.append(f'<line class="error" x1="{at(less):.1f}" x2="{at(more):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<circle class="{tone}" cx="{at(middle):.1f}" cy="{y:.1f}" r="5"/>')
    body.append(_text(left + (WIDTH - RIGHT - left) / 2, bottom + 38, across, "middle", "title"))
    body += _legend([("band", legend)])
    said = "; ".join(f"{name}: {_signed(middle)}" for name, (_, middle, _) in rows)
    return _svg(WIDTH, bottom + BOTTOM, f"{across} of each, beside the {legend}", said, body)


def cloud(groups: Mapping[str, Points], title: str, said: str) -> Markup:
    """Draw many points, those of the last group on top; each group is one line of dots, so ten thousand are drawn at once.

    Args:
        groups: name -> points from 0 to 1 on both axes. The first is drawn weak, the second strong.
    """
    height = CLOUD
    body = []
    for number, points in enumerate(groups.values()):
        size = 3.2 if sum(map(len, groups.values())) > 3000 else 4.6
        dots = "".join("M{:.1f} {:.1f}h0".format(*on_cloud(x, y)) for x, y in points)
        body.append(f'<path class="dots d{number}" stroke-width="{size + number}" d="{dots}"/>')
    body.append('<circle class="spot" r="7" cx="-20" cy="-20"/>')
    body += _legend(
        [(("weak", "strong")[number], f"{name} ({len(points):,})") for number, (name, points) in enumerate(groups.items())]
    )
    return _svg(WIDTH, height, title, said, body)


def on_cloud(x: float, y: float) -> tuple[float, float]:
    """Return where :func:`cloud` draws a point."""
    return 12 + x * (WIDTH - 24), CLOUD - 12 - y * (CLOUD - TOP - 12)


def standalone(picture: Markup) -> str:
    """Return a picture as a file of its own, with the colours of the pages."""
    head, _, rest = str(picture).partition(">")
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    named = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{named}><style>{style}</style>{rest}"


def _x(spot: Spot) -> tuple[float, float, float]:
    return spot.x


def _y(spot: Spot) -> tuple[float, float, float]:
    return spot.y


def _room(values: Sequence[float]) -> tuple[float, float]:
    """Return a range around the values and zero, with some air."""
    low, high = min(0.0, *values), max(0.0, *values)
    air = 0.08 * (high - low) or 1.0
    return low - air, high + air


def _label(name: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """Write a name beside its point, where it covers no other."""
    wide = 7.2 * len(name)
    places = [(x + 10, y - 6, "start"), (x + 10, y + 15, "start"), (x - 10, y - 6, "end"), (x - 10, y + 15, "end"),
              (x + 10, y - 20, "start"), (x + 10, y + 29, "start"), (x - 10, y - 20, "end"), (x - 10, y + 29, "end")]  # fmt: skip
    boxes = [
        (left - wide * (anchor == "end"), low - 11, left + wide * (anchor == "start"), low + 3) for left, low, anchor in places
    ]
    free = (
        i for i, box in enumerate(boxes) if box[0] > 0 and box[2] < WIDTH and not any(_overlap(box, other) for other in taken)
    )
    chosen = next(free, 0)
    taken.append(boxes[chosen])
    return _text(*places[chosen][:2], name, places[chosen][2], "name")


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    factor = (end - start) / ((high - low) or 1.0)
    return lambda value: start + (value - low) * factor


def _grid(
    x_at: Callable[[float], float], y_at: Callable[[float], float], xs: Iterable[float], ys: Iterable[float], across: str,
    up: str, height: int, up_scale: float = 1.0,
) -> list[str]:  # fmt: skip
    body = []
    for y in ys:
        kind = "zero" if y == 0 else "grid"
        body.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>')
        body.append(_text(LEFT - 8, y_at(y) + 4, _plain(y * up_scale), "end"))
    body += [_text(x_at(x), height - BOTTOM + 17, _plain(x), "middle") for x in xs]
    body.append(_text(LEFT + (WIDTH - RIGHT - LEFT) / 2, height - 8, across, "middle", "title"))
    body.append(_text(4, 16, up, "start", "title"))
    return body


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    body, right = [], float(WIDTH - RIGHT)
    for kind, name in reversed(entries):
        body.append(_text(right, 16, name, "end", "key"))
        right -= 7 * len(name) + 14
        body.append(f'<circle class="{kind}" cx="{right + 6:.1f}" cy="12" r="5"/>')
        right -= 14
    return body


def _plain(value: float) -> str:
    return f"{round(value, 10):,.10g}".replace("-", "\u2212")


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{round(value, 10):+.6g}".replace("-", "\u2212")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, title: str, said: str, body: list[str]) -> Markup:
    label = escape(f"{title}. {said}" if said else title)
    described = Markup("<desc>{}</desc>").format(said) if said else ""
    inside = Markup("".join(body))  # built above, every text of it escaped there
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}{}</svg>').format(
        width, height, label, title, described, inside
    )
