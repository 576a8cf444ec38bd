"""Small pictures as inline SVG, readable in the dark and in print. Knows: lines, bars and intervals. Does not know: any run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]


def _scale(low: float, high: float, start: float, end: float) -> tuple[float, float]:
    factor = (end - start) / ((high - low) or 1.0)
    return factor, start - low * factor


def _svg(width: int, height: int, title: str, body: list[str]) -> str:
    inside = "".join(body)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{inside}</svg>'


def lines(series: dict[str, Points], title: str, across: str, up: str, width: int = 640, height: int = 260) -> str:
    """Draw curves with two labelled axes; the first series is drawn as the thin one."""
    points = [point for curve in series.values() for point in curve]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    top, bottom = max(ys), min(0.0, *ys)
    ax, bx = _scale(min(xs), max(xs), 48, width - 12)
    ay, by = _scale(bottom, top, height - 36, 14)
    body = []
    for step in range(5):
        value = bottom + (top - bottom) * step / 4
        y = value * ay + by
        body.append(f'<line class="grid" x1="48" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text x="42" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for value in (min(xs), (min(xs) + max(xs)) / 2, max(xs)):
        body.append(f'<text x="{value * ax + bx:.1f}" y="{height - 18}" text-anchor="middle">{value:.0f}</text>')
    body.append(f'<text x="{width / 2}" y="{height - 3}" text-anchor="middle">{escape(across)}</text>')
    for number, (name, curve) in enumerate(series.items()):
        path = " ".join(f"{x * ax + bx:.1f},{y * ay + by:.1f}" for x, y in curve)
        body.append(f'<polyline class="curve c{number}" points="{path}"/>')
        body += [
            f'<circle class="c{number}" cx="{x * ax + bx:.1f}" cy="{y * ay + by:.1f}" r="{3 if number else 0}"/>'
            for x, y in curve
        ]
        body.append(
            f'<text class="c{number}" x="{width - 14}" y="{26 + 15 * number}" text-anchor="end">{escape(name)}</text>'
        )
    return _svg(width, height, f"{title}: {up}", body)


def bars(values: Sequence[float], marked: Sequence[bool], title: str, width: int = 640, height: int = 170) -> str:
    """Draw one bar per value; marked ones in the strong colour."""
    top = max(values, default=0) or 1.0
    room = (width - 24) / max(len(values), 1)
    body = []
    for index, (value, mark) in enumerate(zip(values, marked, strict=True)):
        tall = value / top * (height - 44)
        x = 12 + index * room
        body.append(f'<rect class="{"strong" if mark else "weak"}" x="{x + 1:.1f}" y="{height - 24 - tall:.1f}" '
                    f'width="{max(room - 2, 1):.1f}" height="{max(tall, 1.5):.1f}"/>')  # fmt: skip
        if len(values) <= 12 or index % 5 == 0:
            body.append(f'<text x="{x + room / 2:.1f}" y="{height - 8}" text-anchor="middle">{index}</text>')
    return _svg(width, height, title, body)


def interval(low: float, middle: float, high: float, widest: float, good: str, width: int = 180) -> str:
    """Draw one interval around a middle, with a line at zero."""
    factor, shift = _scale(-widest, widest, 6, width - 6)
    a, m, b, zero = (value * factor + shift for value in (low, middle, high, 0.0))
    body = [
        f'<line class="grid" x1="{zero:.1f}" x2="{zero:.1f}" y1="1" y2="19"/>',
        f'<line class="whisker {good}" x1="{a:.1f}" x2="{b:.1f}" y1="10" y2="10"/>',
        f'<circle class="{good}" cx="{m:.1f}" cy="10" r="4"/>',
    ]
    return _svg(width, 20, f"{middle:+.3f}, from {low:+.3f} to {high:+.3f}", body)


def scatter(
    points: Sequence[tuple[str, float, float]], across: str, up: str, width: int = 640, height: int = 340
) -> str:
    """Draw named points and the front of those that no other beats on both axes (right is worse, up is better)."""
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    spread_x, spread_y = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    ax, bx = _scale(min(xs) - 0.1 * spread_x, max(xs) + 0.25 * spread_x, 56, width - 12)
    ay, by = _scale(min(ys) - 0.1 * spread_y, max(ys) + 0.1 * spread_y, height - 40, 12)
    best = front([(x, y) for _, x, y in points])
    path = " ".join(f"{x * ax + bx:.1f},{y * ay + by:.1f}" for x, y in best)
    body = [f'<polyline class="curve c0" points="{path}"/>',
            f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{escape(across)}</text>',
            f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">{escape(up)}</text>']  # fmt: skip
    for x in (min(xs), max(xs)):
        body.append(f'<text x="{x * ax + bx:.1f}" y="{height - 20}" text-anchor="middle">{x:+.3f}</text>')
    for y in (min(ys), max(ys)):
        body.append(f'<text x="52" y="{y * ay + by + 4:.1f}" text-anchor="end">{y:+.3g}</text>')
    for name, x, y in points:
        body.append(f'<circle class="c1" cx="{x * ax + bx:.1f}" cy="{y * ay + by:.1f}" r="5"/>')
        body.append(f'<text x="{x * ax + bx + 8:.1f}" y="{y * ay + by + 4:.1f}">{escape(name)}</text>')
    return _svg(width, height, f"{up} against {across}", body)


def front(points: Points) -> list[tuple[float, float]]:
    """Return the points that no other beats (less across, more up), from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best
