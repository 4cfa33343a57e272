"""The benchmark over several GPUs: what is counted, what is shown, and a run on CPUs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aot_only import leave_inductor_out
from process_groups import spawn

from benchmarks.context_parallel import __main__ as command
from benchmarks.context_parallel import measure
from benchmarks.context_parallel.layouts import Layout, Shape, amounts, layouts, misfit, sizes
from benchmarks.context_parallel.models import SIZES, shape_of
from benchmarks.context_parallel.report import counted_table, measured_table, section, write_plot

WAN, HUNYUAN = (shape_of(SIZES[name]) for name in ("wan14b-720p", "hunyuan-720p"))


def test_shapes_are_those_of_the_models() -> None:
    assert Shape(40, 75600, 128) == WAN
    assert Shape(24, 118800, 128) == HUNYUAN


def test_groups_grow_by_doubling_and_end_at_the_one_asked_for() -> None:
    assert sizes(1) == [1]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(6) == [1, 2, 4, 6]
    assert [(x.ring, x.ulysses) for x in layouts(8, 40)] == [(1, 8), (8, 1), (2, 4)]
    assert [(x.ring, x.ulysses) for x in layouts(24, 40)] == [(1, 24), (24, 1), (3, 8)]
    assert [(x.ring, x.ulysses) for x in layouts(3, 40)] == [(1, 3), (3, 1)]
    assert all(layout.gpus == n for n in range(1, 20) for layout in layouts(n, 24))


@pytest.mark.parametrize(
    ("layout", "shape", "part"),
    [
        (Layout(1, 8), HUNYUAN, None),
        (Layout(2, 8), HUNYUAN, None),
        (Layout(1, 16), HUNYUAN, "take 1, 2, 3, 4, 6, 8, 12 or 24, and give the rest to the ring"),
        (Layout(32, 1), WAN, "32 GPUs do not divide 75,600 tokens"),
        (Layout(1, 1), Shape(7, 11, 32), None),
    ],
)
def test_what_a_group_does_not_divide_is_said(
    layout: Layout, shape: Shape, part: str | None
) -> None:
    sentence = misfit(layout, shape)
    if part is None:
        assert sentence is None
        return
    assert sentence is not None
    assert part in sentence
    with pytest.raises(ValueError, match=re.escape(sentence)):
        amounts(layout, shape)


@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("ulysses", [1, 2, 4])
def test_amounts_are_those_of_an_exchange_written_out(ring: int, ulysses: int) -> None:
    shape, gpus = Shape(8, 96, 32), ring * ulysses
    owner = {(n, h): n // (96 // gpus) for n in range(96) for h in range(8)}  # of an element
    heads = {(n, h) for n in range(96 // ring) for h in range(8 // ulysses)}  # of GPU 0, exchanged
    exchanged = sum(owner[at] != 0 for at in heads)
    others = {(n, h) for n in range(96 // ring, 96) for h in range(8 // ulysses)}  # round the ring
    found = amounts(Layout(ring, ulysses), shape)
    # Queries, keys and values come to GPU 0; as many outputs come back as went out.
    assert found.received == 32 * 2 * (4 * exchanged + 2 * len(others))
    assert (found.heads, found.tokens, found.calls) == (8 // ulysses, 96 // ring, ring)
    assert found.clustered * 2 * 96 * 8 // gpus == found.calls * 2 * found.tokens * found.heads


def record() -> dict[str, Any]:
    def row(ring: int, ulysses: int, density: float, median: float) -> dict[str, Any]:
        return {
            "gpus": ring * ulysses, "ring": ring, "ulysses": ulysses, "density": density,
            "samples_seconds": [median - 0.01, median, median + 0.02],
            "communication": 0.1, "peak_bytes": 3 << 30, "error": 2e-3,
            "sparse_layers": 0 if density == 1 or ring == 4 else 4,
        }  # fmt: skip

    return {
        "device": "a GPU", "versions": {"torch": "2"}, "model": "wan14b-720p", "layers": 4,
        "left": ["One sentence."],
        "rows": [
            row(*degrees, density, seconds / (degrees[0] * degrees[1]) ** 0.5)
            for degrees in ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (2, 2))
            for density, seconds in ((1.0, 0.8), (0.2, 0.4))
        ],
    }  # fmt: skip


def test_measured_rows_are_compared_with_one_gpu() -> None:
    lines = measured_table(record()).splitlines()
    assert len(lines) == 2 + 12
    assert lines[3] == (
        "| 1 | one GPU | 0.2 | 0.400 (0.390 to 0.420) | 2.00x | 1.00 | 10.0% | 3.0 | 2.0e-03 |"
    )
    assert "| 4 | ring | 0.2 (stayed dense) |" in lines[-3]
    assert lines[-1].startswith("| 4 | ring 2 × Ulysses 2 | 0.2 | 0.200 ")
    assert "| 4.00x | 0.50 |" in lines[-1]


def test_the_section_shows_records_and_says_where_there_is_none(tmp_path: Path) -> None:
    assert "has been measured with this command yet" in section(tmp_path, tmp_path)
    records = tmp_path / "context_parallel"
    records.mkdir()
    (records / "wan14b-720p.json").write_text(json.dumps(record()))
    shown = section(tmp_path, tmp_path)
    assert "measured with this command yet" not in shown
    assert "One sentence." in shown
    assert "(context_parallel/wan14b-720p.png)" in shown
    write_plot(record(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_larger_groups_are_counted_or_said_not_to_fit() -> None:
    shown = counted_table(["hunyuan-720p"], [8, 16])
    assert "| hunyuan-720p | 8 | Ulysses | 3 × 118,800 | 1 | 1x |" in shown
    assert "| hunyuan-720p | 16 | ring 2 × Ulysses 8 | 3 × 59,400 | 2 | 2x |" in shown
    assert "hunyuan-720p: Ulysses over 16 GPUs does not divide 24 heads" in shown


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> None:
    monkeypatch.setattr("sys.argv", ["context_parallel", "--out", str(out), *more])
    command.main()


def test_more_gpus_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for gpus, words in (("99", "this host has"), ("0", "must be at least 1")):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, "--gpus", gpus)
        assert words in capsys.readouterr().err


def test_a_run_that_was_cut_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Layout] = []

    def fake(task: command.Task, folder: Path) -> list[dict[str, Any]]:
        made.append(task.layout)
        for density in task.densities:
            (folder / f"one-{density:g}.pt").touch()
        return [
            row for row in record()["rows"]
            if (row["ring"], row["ulysses"]) == (task.layout.ring, task.layout.ulysses)
        ]  # fmt: skip

    monkeypatch.setattr(command, "run", fake)
    given = ["--tiny", "--densities", "0.2", "--gpus"]
    run(monkeypatch, tmp_path, *given, "2")
    assert made == [Layout(1, 1), Layout(1, 2), Layout(2, 1)]
    run(monkeypatch, tmp_path, *given, "4")
    assert made[3:] == [Layout(1, 4), Layout(4, 1), Layout(2, 2)]
    assert json.loads((tmp_path / "tiny.json").read_text())["rows"] == record()["rows"]
    (tmp_path / "one-0.2.pt").unlink()  # nothing to compare with: all is measured again
    run(monkeypatch, tmp_path, *given, "1")
    assert made[6:] == [Layout(1, 1)]


def through_aot(rank: int, worker: Callable[..., None], *args: Any) -> None:
    leave_inductor_out()
    worker(rank, *args)


@pytest.mark.slow
def test_a_small_model_on_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ulysses over processes runs in tests of its own.
    def rings(gpus: int, heads: int) -> list[Layout]:
        return [layout for layout in layouts(gpus, heads) if layout.ulysses == 1]

    monkeypatch.setattr(command, "layouts", rings)
    monkeypatch.setattr(
        measure.mp, "spawn",
        lambda worker, args, nprocs: spawn(through_aot, (worker, *args), nprocs),
    )  # fmt: skip
    given = ["--tiny", "--gpus", "2", "--layers", "1", "--densities", "0.3", "--repeats", "2"]
    run(monkeypatch, tmp_path, *given)
    path = tmp_path / "tiny.json"
    written = json.loads(path.read_text())
    rows = written["rows"]
    assert [(r["ring"], r["ulysses"], r["density"]) for r in rows] == [
        (*degrees, density) for degrees in ((1, 1), (2, 1)) for density in (1.0, 0.3)
    ]
    for row in rows:
        assert row["finite"]
        assert len(row["samples_seconds"]) == 2
        assert (row["communication"] > 0) == (row["gpus"] > 1)
        assert row["sparse_layers"] == (row["density"] < 1)
        assert row["error"] < (1e-4 if row["ring"] == 1 or row["density"] == 1 else 0.1)
        assert (row["error_to_dense"] > 1e-4) == (row["density"] < 1)
