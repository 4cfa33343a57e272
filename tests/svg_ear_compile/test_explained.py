"""The text of a report: what is put together, and how it fits a terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformer_models import TOKENS, stack, wan

from svg_ear_compile import explain
from svg_ear_compile.explain import Explanation
from svg_ear_compile.explained import grouped
from svg_ear_compile.planning import GraphReport, SiteReport


@pytest.fixture(scope="module")
def site() -> SiteReport:
    model, inputs = stack()
    return explain(model, *inputs, options={"min_tokens": TOKENS}).sites[0]


def named(site: SiteReport, *names: str) -> list[SiteReport]:
    return [
        replace(site, site=name, layer=name.partition("#")[0], bound_by=f"w{i}")
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([f"blocks.{i}.attn1" for i in range(30)], [("blocks.0-29.attn1", 30)]),
        (["blocks.0.attn", "blocks.2.attn"], [("blocks.*.attn", 2)]),
        (["a.attn1", "a.attn2"], [("a.attn1", 1), ("a.attn2", 1)]),
        (["b.0.attn", "b.0.attn#2"], [("b.0.attn", 1), ("b.0.attn#2", 1)]),
        (["b.0.attn#2", "b.1.attn#2"], [("b.0-1.attn#2", 2)]),
        (["up.0.1.x", "up.0.2.x", "up.0.3.x"], [("up.0.1-3.x", 3)]),
        (["up.0.0.x", "up.0.1.x", "up.1.0.x", "up.1.1.x"], [("up.*.*.x", 4)]),
        (["up.0.0.x", "up.1.1.x"], [("up.*.*.x", 2)]),
        (["", ""], [("(function)", 2)]),
        (["7"], [("7", 1)]),
    ],
)
def test_names_that_differ_in_numbers_are_one_entry(
    names: list[str], wanted: list[tuple[str, int]], site: SiteReport
) -> None:
    found = grouped(named(site, *names))
    assert [(each.name, each.count) for each in found] == wanted


def test_layers_that_differ_in_anything_else_are_apart(site: SiteReport) -> None:
    first, second, third = named(site, "blocks.0", "blocks.1", "blocks.2")
    other = replace(second, sentence="otherwise")
    found = grouped([first, other, third])
    assert [(each.name, each.count) for each in found] == [("blocks.*", 2), ("blocks.1", 1)]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_lines_fit_and_names_are_whole(width: int, site: SiteReport) -> None:
    name = "up_blocks.3.motion_modules.1.transformer_blocks.0.very_long_attention_processor.attn1"
    model, inputs, kwargs = wan()
    graphs = explain(model, *inputs, options={"min_tokens": 64}, **kwargs).graphs
    found = Explanation([*graphs, GraphReport(named(site, name))], model="Wan")
    lines = found.text(width).splitlines()
    assert f"1 × {name}" in lines
    assert max(len(line) for line in lines if name not in line) <= width
    assert {"2 × blocks.0-1.attn1", "2 × blocks.0-1.attn2"} <= set(lines)
    text = " ".join(found.text(width).split())
    assert text.startswith("Wan: 5 attention calls in 2 graphs, 3 sparse.")
    assert (
        "Milliseconds: prior, not calibrated, uncertain by 50%; "
        "better: svg-ear calibrate --device cpu." in text
    )
    assert "dense, cross_attention: Queries and keys come from different tokens; text" in text
