"""Plots as inline SVG: no script, no font, nothing from elsewhere. Colours are the page's (classes s0 … s5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 44
_COLOURS = 6
_TICKS = 5
_LEAST = 1e-9


@dataclass(slots=True, frozen=True)
class Line:
    """`points` as (x, y), rising in x."""

    name: str
    points: Sequence[tuple[float, float]]
    has_dots: bool = False


def line_plot(lines: Sequence[Line], *, x_label: str, y_label: str, is_log_x: bool = False) -> str:
    """On a logarithmic x axis, points at 0 or below are left out. Empty when nothing is drawn."""
    shown = [
        Line(line.name, [(x, y) for x, y in line.points if _is_drawable(x, y, is_log_x=is_log_x)], line.has_dots)
        for line in lines
    ]
    shown = [line for line in shown if line.points]
    if not shown:
        return ""
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points]
    x_axis = _log_axis(min(xs), max(xs)) if is_log_x else _Axis(*_padded(min(xs), max(xs)), is_log=False)
    y_axis = _Axis(*_padded(0.0, max(ys)), is_log=False)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for number, line in enumerate(shown):
        places = [(_x(x_axis.share(x)), _y(y_axis.share(y))) for x, y in line.points]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<path class="line s{number % _COLOURS}" d="{path}"/>')
        if line.has_dots or len(places) == 1:
            parts += [f'<circle class="dot s{number % _COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return _svg("".join(parts)) + _legend([line.name for line in shown])


def bar_plot(bars: Sequence[tuple[str, float]], *, unit: str = "") -> str:
    """One bar a row, the longest one as wide as there is room. Empty without bars."""
    if not bars:
        return ""
    most = max(value for _, value in bars) or 1.0
    row, label_width = 24, 220
    rows = []
    for number, (name, value) in enumerate(bars):
        y = number * row + 4
        width = (WIDTH - label_width - 110) * value / most
        label = name if len(name) <= 34 else f"…{name[-33:]}"
        rows.append(
            f'<text x="{label_width - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="bar s0" x="{label_width}" y="{y}" width="{width:.1f}" height="16"/>'
            f'<text x="{label_width + width + 6:.1f}" y="{y + 13}">{number_text(value)}{escape(unit)}</text>'
        )
    return _svg("".join(rows), height=len(bars) * row + 8)


def number_text(value: float) -> str:
    """Three digits that matter."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(slots=True, frozen=True)
class _Axis:
    low: float
    high: float
    is_log: bool

    def share(self, value: float) -> float:
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            marks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            return [mark for mark in marks if self.low <= mark * (1 + 1e-9) and mark <= self.high * (1 + 1e-9)]
        step = _nice_step((self.high - self.low) / _TICKS)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _is_drawable(x: float, y: float, *, is_log_x: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (x > _LEAST or not is_log_x)


def _padded(low: float, high: float) -> tuple[float, float]:
    """What is hardly wider than a point is drawn as one."""
    if high - low > _LEAST * max(abs(low), abs(high), 1.0):
        return low, high
    return low, low + max(abs(low), 1.0)


def _log_axis(low: float, high: float) -> _Axis:
    return _Axis(low * 0.95, max(high * 1.05, low * 1.2), is_log=True)


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for tick in x_axis.ticks():
        x = _x(x_axis.share(tick))
        parts.append(f'<path class="grid" d="M{x:.1f},{_TOP}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number_text(tick)}</text>')
    for tick in y_axis.ticks():
        y = _y(y_axis.share(tick))
        parts.append(f'<path class="grid" d="M{_LEFT},{y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number_text(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT},{_TOP}V{bottom}H{right}"/>')
    middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
    parts.append(f'<text x="{middle_x:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 14 {middle_y:.0f})"'
    parts.append(f'<text x="14" y="{middle_y:.0f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _svg(inside: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">{inside}</svg>'


def _legend(names: Sequence[str]) -> str:
    entries = (
        f'<span><i class="key s{number % _COLOURS}"></i>{escape(name)}</span>' for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(entries)}</p>'
