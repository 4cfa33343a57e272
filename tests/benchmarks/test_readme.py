"""The README's tables are those that the code and the records make."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import readme
from benchmarks.attention.targets import rows_of, targets_table


def row(clusters: str, density: float, tokens: int = 75600, **more: Any) -> dict[str, Any]:
    """A row of the attention benchmark, as far as the README reads it."""
    return {
        "shape": "wan14b-720p", "clusters": clusters, "form": "centroid", "density": density,
        "size": [1, 40, tokens, 128], "dense_backend": "cudnn", "samples_ms": [70.0],
        "dense_samples_ms": {"cudnn": [200.0]}, "speedup": 200 / 70, "extra_memory": 0.4,
        "cold_samples_ms": [100.0, 100.0],
        "attend_over_dense_rate": 0.8, "rest_share": 0.07, **more,
    }  # fmt: skip


def measured(rows: list[dict[str, Any]], what: str) -> str:
    """The last cell of the line of the targets' table that names `what`."""
    (line,) = (line for line in targets_table({"rows": rows}).splitlines() if what in line)
    return line.split(" | ")[-1].removesuffix(" |")


def test_targets_say_what_was_measured_and_what_was_not() -> None:
    rows = [row("300/1000", 0.2)]
    assert measured(rows, "Wan 14B, centroid form: useful rate") == "0.80 / not measured"
    assert measured(rows, "HunyuanVideo, centroid form") == "not measured / not measured"
    assert measured([], "extra peak memory") == "not measured"


def test_rows_of_forms_that_are_gone_are_left_out() -> None:
    gone = [row("300/1000", 0.2, 1, form=form) for form in ("first_order", "second_order")]
    assert rows_of({"rows": [row("300/1000", 0.2), *gone]}) == [row("300/1000", 0.2)]


def test_calls_that_take_blocks_over_stand_beside_the_others() -> None:
    later = row(
        "300/1000", 0.2, gate=1e-4, error=0.1, dense_tflops=580.0,
        taken_over_samples_ms=[50.0], taken_over_stages_ms={"attend": 44, "sort": 6},
    )  # fmt: skip
    assert measured([later], "Wan 14B, centroid form: whole op").startswith(
        "2.86x (blocks taken over 4.00x) / not"
    )
    assert measured([later], "everything but").startswith("7.0% (blocks taken over 3.0%) / not")
    record = {
        "device": "a GPU", "versions": {"torch": "2", "triton": "3"}, "cuda": "13", "commit": "c",
        "roofs": {"tflops": 700.0, "gb_per_second": 4000.0}, "rows": [later],
    }  # fmt: skip
    assert "| 2.86x (blocks taken over 4.00x, cold 2.00x) |" in readme.attention_table(record)


def test_a_row_whose_gate_failed_is_not_measured() -> None:
    failed = row("300/1000", 0.2)
    del failed["samples_ms"]
    assert measured([failed], "Wan 14B, centroid form: whole op") == "not measured / not measured"


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
    assert measured(rows + slow, "fewest tokens") == f"{warm} (clustered afresh: {cold})"


def test_the_readme_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    assert readme.main() == 0


def test_a_table_without_its_markers_is_missed() -> None:
    with pytest.raises(ValueError, match="one pair of markers 'models'"):
        readme.fill("<!-- reasons -->\n<!-- /reasons -->\n", "models", "| a |")
