"""The tables of README.md and docs/ are those that the code and the records make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.attention.summary import rows_of, summary_table


def row(clusters: str, density: float, tokens: int = 75600, **more: Any) -> dict[str, Any]:
    """A row of the attention benchmark, as far as the tables read it."""
    return {
        "shape": "wan14b-720p", "clusters": clusters, "form": "centroid", "density": density,
        "size": [1, 40, tokens, 128], "dense_backend": "cudnn", "samples_ms": [70.0],
        "dense_samples_ms": {"cudnn": [200.0]}, "speedup": 200 / 70, "extra_memory": 0.4,
        "cold_samples_ms": [100.0, 100.0],
        "attend_over_dense_rate": 0.8, "other_stages_over_dense": 0.07, **more,
    }  # fmt: skip


def measured(rows: list[dict[str, Any]], what: str) -> str:
    """The last cell of the line of the summary that names `what`."""
    (line,) = (line for line in summary_table({"rows": rows}).splitlines() if what in line)
    return line.split(" | ")[-1].removesuffix(" |")


def test_the_summary_says_what_was_measured_and_what_was_not() -> None:
    rows = [row("300/1000", 0.2)]
    assert measured(rows, "Wan 14B, centroid form: useful rate") == "0.80 / not measured"
    assert measured(rows, "HunyuanVideo, centroid form") == "not measured / not measured"
    assert measured([], "extra peak memory") == "not measured"


def test_rows_of_forms_that_are_gone_are_left_out() -> None:
    gone = [row("300/1000", 0.2, 1, form=form) for form in ("first_order", "second_order")]
    assert rows_of({"rows": [row("300/1000", 0.2), *gone]}) == [row("300/1000", 0.2)]


def test_calls_that_reuse_blocks_stand_beside_the_others() -> None:
    reused = row(
        "300/1000", 0.2, gate=1e-4, error=0.1, dense_tflops=580.0,
        reused_samples_ms=[50.0], reused_stages_ms={"attend": 44, "sort": 6},
    )  # fmt: skip
    assert measured([reused], "Wan 14B, centroid form: whole operator").startswith(
        "2.86x (reused 4.00x) / not"
    )
    assert measured([reused], "all stages but attend").startswith("7.0% (reused 3.0%) / not")
    record = {
        "device": "a GPU", "versions": {"torch": "2", "triton": "3"}, "cuda": "13", "commit": "c",
        "roofs": {"tflops": 700.0, "gb_per_second": 4000.0}, "rows": [reused],
    }  # fmt: skip
    assert "| 2.86x | 4.00x | 2.00x |" in tables.other_attention_table(record)
    default = {**reused, "clusters": "default", "form": "gaussian", "stages_ms": {}}
    assert "| 0.80 | 7.0% | 0.40 | 0.100 |" in tables.attention_table({**record, "rows": [default]})


def test_a_row_whose_gate_failed_is_not_measured() -> None:
    failed = row("300/1000", 0.2)
    del failed["samples_ms"]
    assert (
        measured([failed], "Wan 14B, centroid form: whole operator")
        == "not measured / not measured"
    )


@pytest.mark.parametrize(
    ("speedups", "warm", "cold"),
    [
        ({8192: 0.9, 16384: 1.2, 65536: 2.5}, "16,384", "65,536"),
        ({8192: 1.1, 16384: 0.9, 65536: 2.5}, "65,536", "65,536"),
        ({16384: 1.1, 65536: 2.5}, "16,384, shorter ones not measured", "65,536"),
        ({16384: 0.5}, "none measured does", "none measured does"),
        ({}, "not measured", "not measured"),
    ],
)
def test_the_shortest_length_that_pays_is_followed_by_none_that_does_not(
    speedups: dict[int, float], warm: str, cold: str
) -> None:
    rows = [
        row("default", 0.2, tokens, samples_ms=[200 / x], cold_samples_ms=[400 / x])
        for tokens, x in speedups.items()
    ]
    slow = [row("default", 0.2, tokens, samples_ms=[900.0], form="flex") for tokens in speedups]
    assert measured(rows + slow, "fewest tokens") == f"{warm} (cold: {cold})"


def test_what_to_expect_pairs_dense_and_sparse_times_of_one_device() -> None:
    rows = [
        row("default", 0.2, tokens, shape=shape, form="gaussian")
        for tokens, shape in [
            (75600, "wan14b-720p"), (119056, "hunyuan-720p"), (32760, "wan1.3b-480p"),
            (17776, "cogvideox-5b"),
        ]
    ]  # fmt: skip
    gib = 2**30
    forward = {
        "device": "a GPU",
        "rows": [
            {"model": "wan14b-720p", "samples_seconds": samples, "options": options,
             "peak_bytes": peak}
            for samples, options, peak in [
                ([0.9, 1.0, 1.1], {}, 7 * gib), ([0.3], {"density": 0.1}, 9 * gib),
                ([0.5], {"density": 0.2}, 8 * gib),
            ]
        ],
    }  # fmt: skip
    found = tables.expectations_table({"device": "a GPU", "rows": rows}, [forward], [])
    assert found.startswith("a GPU, density 0.2")
    assert (
        "| Wan 2.1 14B, 720p | 75,600 | 200.0 → 70.0 ms (**2.9x**) | 1.00 → 0.50 s (**2.0x**) "
        "| 7.0 → 8.0 GiB |  |" in found.splitlines()
    )
    with pytest.raises(ValueError, match="several devices"):
        tables.expectations_table({"device": "another", "rows": rows}, [forward], [])


def test_the_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    assert tables.main() == 0


def test_a_stale_page_is_named_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- /one -->\nafter\n")
    (tmp_path / "README.md").write_text("no table\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "tables", lambda: {"one": lambda folder: f"new, {folder.name}"})
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    assert tables.main() == 1
    assert "docs/page.md is not up to date" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tables"])
    assert tables.main() == 0
    assert page.read_text() == "before\n<!-- one -->\nnew, docs\n<!-- /one -->\nafter\n"
    assert (tmp_path / "README.md").read_text() == "no table\n"


PAIR = "<!-- a -->\n<!-- /a -->\n"


@pytest.mark.parametrize(
    ("pages", "complaint"),
    [
        (["", ""], "one pair of markers 'a', have 0"),
        (["<!-- a -->\n", "<!-- /a -->\n"], "one pair of markers 'a', have 0"),
        ([PAIR, PAIR], "one pair of markers 'a', have 2"),
        ([PAIR + PAIR, ""], "one pair of markers 'a', have 2"),
        ([PAIR, "<!-- b -->\n<!-- /b -->\n"], "no table is called 'b', there are a"),
    ],
)
def test_markers_that_do_not_fit_the_tables(pages: list[str], complaint: str) -> None:
    texts = {Path(f"page{i}.md"): text for i, text in enumerate(pages)}
    with pytest.raises(ValueError, match=complaint):
        tables.fill(texts, {"a": lambda folder: "| a |"})
