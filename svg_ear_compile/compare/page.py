"""The page of a comparison: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from html import escape
from importlib import resources
from typing import Any

from svg_ear_compile.compare.comparison import LEAST_NOISE, Clip, Comparison, Key, Spread
from svg_ear_compile.compare.figures import Figures, finite, flicker
from svg_ear_compile.compare.frontier import COLOURS, frontier_of
from svg_ear_compile.compare.setting import DENSE, Setting
from svg_ear_compile.compare.sheets import Layout, difference_sheets_of, gain_of, sheets_of
from svg_ear_compile.digits import three_digits

SIZE_LIMIT = 32 * 2**20
"""Bytes of pictures in a page, about: smaller pictures first, then fewer clips; one of each setting
at least."""

_WIDTHS = (640, 480, 384, 320)


def page_of(found: Comparison, size_limit: int = SIZE_LIMIT) -> str:
    """The whole page, whose pictures take about `size_limit` bytes at most."""
    shown = _shown_clips(found, size_limit)
    script = _template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    recommended = found.recommended
    clips = len(found.pairs)
    filled = {
        "style": _template("page.css"),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "data": _in_script({**shown, **_facts(found)}),
        "headline": _headline(found),
        "why": escape(recommended.why[0].upper() + recommended.why[1:]) + ".",
        "code": escape(recommended.setting.code()),
        "frontier": frontier_of(found),
        "table": _table(found),
        "rule": _rule(found),
        "conditions": _conditions(found),
        "shown": _shown_sentence(len(shown["clips"]), clips, shown["layout"]),
        "gain": str(shown["gain"]),
    }
    # One pass: what is filled in is never searched for places again.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], _template("page.html"))


def _template(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _in_script(data: dict[str, Any]) -> str:
    """JSON that nothing in it can end the script element that holds it."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown_clips(found: Comparison, size_limit: int) -> dict[str, Any]:
    """Sheets of as many clips as the limit allows, and how they lie."""
    keys = found.pairs
    dense = found.clips[DENSE.name]
    first = keys[0]
    gain = gain_of((found.clips[s.name][first].frames, dense[first].frames) for s in found.settings)
    for width in _WIDTHS:
        layout = Layout.of(dense[first].frames, width)
        group = _group(found, first, layout, gain)
        size = _bytes(group)
        if size * len(keys) <= size_limit:
            break
    groups = [group]
    for key in keys[1:]:
        if size + _bytes(groups[-1]) > size_limit:
            break
        groups.append(_group(found, key, layout, gain))
        size += _bytes(groups[-1])
    return {"layout": layout.to_json(), "gain": gain, "clips": groups}


def _group(found: Comparison, key: Key, layout: Layout, gain: int) -> dict[str, Any]:
    """What the players show of one prompt and seed: a clip, differences and curves by setting."""
    dense = found.clips[DENSE.name][key].frames

    def entry(setting: Setting) -> dict[str, Any]:
        clip = found.clips[setting.name][key]
        different = setting is not DENSE
        return {
            "sheets": sheets_of(clip.frames, layout),
            "differences": difference_sheets_of(clip.frames, dense, layout, gain)
            if different
            else [],
            "curves": _curves(clip, found.clips[DENSE.name][key]),
        }

    return {
        "prompt": found.prompts[key[0]],
        "seed": key[1],
        "settings": [entry(setting) for setting in found.all_settings],
    }


def _curves(clip: Clip, dense: Clip) -> dict[str, list[float | None]]:
    """Values by frame; None where there is none or where it is infinite."""
    if clip.figures is None:
        return {"psnr": [], "ssim": [], "flicker": [None, *flicker(dense.frames), None]}
    return {
        "psnr": [finite(value) for value in clip.figures.psnr_frames],
        "ssim": list(clip.figures.ssim_frames),
        "flicker": [None, *clip.figures.flicker_frames, None],
    }


def _bytes(group: dict[str, Any]) -> int:
    return sum(len(s) for e in group["settings"] for s in (*e["sheets"], *e["differences"]))


def _facts(found: Comparison) -> dict[str, Any]:
    names = [setting.name for setting in found.all_settings]
    best = names.index(found.recommended.setting.name)
    return {"names": names, "recommended": best, "fps": found.fps, "colours": COLOURS}


def _headline(found: Comparison) -> str:
    """The recommendation in a line."""
    setting = found.recommended.setting
    if setting is DENSE:
        return "Stay with <b>dense</b> attention"
    summary = found.summary(setting)
    assert summary.speedup is not None, "only the dense setting has none"
    assert summary.psnr is not None, "only the dense setting has none"
    worst = summary.psnr.least
    picture = f"{worst:.1f}&nbsp;dB in the worst clip" if math.isfinite(worst) else "equal frames"
    return (
        f"Use <b>{escape(setting.name)}</b>: {summary.speedup.median:.2f}&nbsp;× as fast, {picture}"
    )


def _table(found: Comparison) -> str:
    """One row for each setting: medians with their ranges beneath."""
    best = found.recommended.setting
    beside = best if best is not DENSE else found.settings[0]
    heads = (
        "Setting", "Density reached", "Seconds", "Speed-up", "PSNR, dB", "SSIM", "Flicker",
        "Peak memory", f"PSNR against {beside.name}, dB",
    )  # fmt: skip
    rows = []
    for index, setting in enumerate(found.all_settings):
        summary = found.summary(setting)
        dense = setting is DENSE
        density, peak = summary.density, summary.peak_bytes
        cells = (
            "1" if dense else "none went sparse" if density is None else f"{density:.3f}",
            _cell(summary.seconds, three_digits),
            _cell(summary.speedup, lambda v: f"{v:.2f}&nbsp;×"),
            _cell(summary.psnr, _decibels),
            _cell(summary.ssim, lambda v: f"{v:.4f}"),
            _cell(summary.flicker, lambda v: f"{v:.2f}&nbsp;×"),
            "not measured" if peak is None else f"{peak / 2**30:.2f} GiB",
            _cell(None if setting is beside else found.paired(setting, beside, _psnr), _signed),
        )  # fmt: skip
        colour = "var(--dense)" if dense else f"var(--s{(index - 1) % COLOURS})"
        star = ' <span class="star" title="recommended">★</span>' if setting is best else ""
        name = f'<th scope="row"><i style="--c:{colour}"></i>{escape(setting.name)}{star}</th>'
        row = "".join(
            f'<td data-head="{escape(head, quote=True)}"><span>{cell}</span></td>'
            for head, cell in zip(heads[1:], cells, strict=True)
        )
        rows.append(f"<tr{' class=best' if setting is best else ''}>{name}{row}</tr>")
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(spread: Spread | None, form: Callable[[float], str]) -> str:
    if spread is None:
        return "–"
    least, median, greatest = (form(v) for v in (spread.least, spread.median, spread.greatest))
    return median if least == greatest else f"{median}<small>{least} to {greatest}</small>"


def _psnr(figures: Figures) -> float:
    return figures.psnr


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal"


def _signed(value: float) -> str:
    return f"{value:+.1f}" if math.isfinite(value) else ("+∞" if value > 0 else "−∞")


def _rule(found: Comparison) -> str:
    return (
        "<p>The recommended setting is the fastest whose every clip has a PSNR of "
        f"{found.floor_db:g} dB or more against the dense clip of the same prompt and seed, if it "
        "is faster than dense by more than the noise.</p>"
        f"<p>Noise of the seconds: {100 * found.time_noise:.1f} % (range of the dense generations "
        f"over their median, {100 * LEAST_NOISE:g} % at least). {_repeats(found)}</p>"
    )


def _repeats(found: Comparison) -> str:
    """A sentence on clips of one prompt and seed that were generated twice, if any were."""
    known: dict[str, float] = {}
    for setting in found.all_settings:
        for clip in found.clips[setting.name].values():
            if clip.repeat_psnr is not None:
                known[setting.name] = min(clip.repeat_psnr, known.get(setting.name, math.inf))
    different = {name: value for name, value in known.items() if math.isfinite(value)}
    if different:
        each = ", ".join(f"{value:.1f} dB ({escape(name)})" for name, value in different.items())
        return (
            f"The same prompt and seed, generated twice, differ by {each}: smaller differences "
            "mean nothing."
        )
    if known:
        names = escape(", ".join(known))
        return f"The same prompt and seed, generated twice, gave equal frames ({names})."
    return ""


def _conditions(found: Comparison) -> str:
    clip = next(iter(found.clips[DENSE.name].values())).frames
    frames, height, width, _ = clip.shape
    prompts, seeds = len(found.prompts), ", ".join(map(str, found.seeds))
    rows = (
        ("clips", f"{frames} frames of {width} × {height}; {prompts} prompts; seeds {seeds}"),
        *found.conditions,
    )
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f"<dl>{cells}</dl>"


def _shown_sentence(shown: int, clips: int, layout: dict[str, int]) -> str:
    which = "all of them" if shown == clips else "more do not fit into the size of this page"
    return (
        f"The players show {shown} of {clips} pairs of prompt and seed ({which}) as lossy pictures "
        f"of {layout['width']} × {layout['height']} pixels. Every figure and the difference view "
        "come from raw frames."
    )
