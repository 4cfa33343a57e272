"""The frontier of a comparison as an SVG: picture against seconds, one mark for each setting."""

from __future__ import annotations

import math
from html import escape

from svg_ear_compile.compare.comparison import Comparison, Spread
from svg_ear_compile.compare.setting import DENSE, Setting
from svg_ear_compile.digits import three_digits

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 34, 48
COLOURS = 8
"""Colours that the page's style sheet has for settings, as ``--s0`` to ``--s7``."""


def frontier_of(found: Comparison) -> str:
    """The drawing, styled by the page: median seconds, median PSNR, and their ranges."""
    psnrs = {s.name: found.summary(s).psnr for s in found.settings}
    known = [v for p in psnrs.values() if p for v in (p.least, p.greatest) if math.isfinite(v)]
    seconds = {s.name: found.summary(s).seconds for s in found.all_settings}
    low = min([*known, found.floor_db]) - 2
    high = max([*known, found.floor_db]) + 2
    x = _Axis(0, 1.06 * max(s.greatest for s in seconds.values()), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP)

    parts = [_grid(x, y), _floor(found.floor_db, y), _dense(seconds[DENSE.name].median, x)]
    best = found.recommended.setting
    for index, setting in enumerate(found.settings):
        psnr = psnrs[setting.name]
        assert psnr is not None, "only the dense setting has none"
        parts.append(_mark(setting, index, seconds[setting.name], psnr, setting is best, x, y))
    described = "; ".join(_words(s, seconds[s.name], psnrs[s.name]) for s in found.settings)
    return (
        f'<svg class="frontier" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="PSNR against seconds. {escape(described, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


class _Axis:
    """Maps values to pixels, and knows where its ticks go."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        """The pixel of a value; infinite values lie at the upper end."""
        fraction = 1.0 if math.isinf(value) else (value - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values."""
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def _grid(x: _Axis, y: _Axis) -> str:
    lines = []
    for tick in y.ticks():
        at = y.at(tick)
        lines.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        lines.append(_text(_LEFT - 8, at + 4, f"{tick:g}", "tick", "end"))
    for tick in x.ticks():
        lines.append(_text(x.at(tick), _HEIGHT - _BOTTOM + 20, f"{tick:g}", "tick", "middle"))
    lines.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - 8
    lines.append(_text(right, bottom, "seconds of one generation (less is better)", "tick", "end"))
    lines.append(_text(8, 16, "PSNR in dB (more is better)", "tick", "start"))
    return "".join(lines)


def _floor(floor_db: float, y: _Axis) -> str:
    at = y.at(floor_db)
    line = f'<path class="floor" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
    return line + _text(_LEFT + 6, at - 5, f"floor {floor_db:g} dB", "note", "start")


def _dense(seconds: float, x: _Axis) -> str:
    at = x.at(seconds)
    line = f'<path class="dense" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
    return line + _text(at - 6, _TOP + 10, f"dense {three_digits(seconds)} s", "note", "end")


def _mark(
    setting: Setting, index: int, seconds: Spread, psnr: Spread, best: bool, x: _Axis, y: _Axis
) -> str:
    """A dot with its ranges as thin lines, ringed and named in bold if it is the recommended."""
    left, top = x.at(seconds.median), y.at(psnr.median)
    ranges = (
        f'<path d="M{x.at(seconds.least):.1f} {top:.1f}H{x.at(seconds.greatest):.1f}'
        f'M{left:.1f} {y.at(psnr.least):.1f}V{y.at(psnr.greatest):.1f}"/>'
    )
    ring = f'<circle class="ring" cx="{left:.1f}" cy="{top:.1f}" r="11"/>' if best else ""
    # On the side with more room: names may be long.
    right_half = left > _WIDTH / 2
    beside, anchor = (-16, "end") if right_half else (16, "start")
    name = _short(setting.name) + (" ★" if best else "")
    return (
        f'<g style="--c:var(--s{index % COLOURS})"><title>{escape(_words(setting, seconds, psnr))}'
        f'</title>{ranges}{ring}<circle class="dot" cx="{left:.1f}" cy="{top:.1f}" r="6"/>'
        + _text(left + beside, top - 8, name, "name best" if best else "name", anchor)
        + "</g>"
    )


def _words(setting: Setting, seconds: Spread, psnr: Spread | None) -> str:
    assert psnr is not None, "only the dense setting has none"
    picture = f"{psnr.median:.1f} dB" if math.isfinite(psnr.median) else "equal to dense"
    return f"{setting.name}: {picture} in {three_digits(seconds.median)} s"


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
