"""What the attention of this project set out to reach, beside what a record says was reached."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]
_PAPERS = "300/1000"  # clusters of the rows that the targets speak of
_NOT_MEASURED = "not measured"
_CENTROID, _FIRST_ORDER = ("3.0x / 4.6x", "4.0x / 6.5x"), ("2.7x / 3.9x", "3.6x / 5.6x")


def targets_table(record: dict[str, Any]) -> str:
    """Markdown: what, reach, strive for, measured; the two densities of a cell are 0.2 and 0.1.

    Args:
        record: of `python -m benchmarks.attention`, rows of Wan 14B and HunyuanVideo among them.

    Raises:
        KeyError: a row that a target speaks of is missing.
    """
    rows = {
        (r["shape"], r["clusters"], r["form"], r["density"]): r
        for r in record["rows"]
        if "samples_ms" in r
    }

    def pair(shape: str, form: str) -> tuple[Row, Row]:
        return rows[shape, _PAPERS, form, 0.2], rows[shape, _PAPERS, form, 0.1]

    wan, hunyuan = (
        {form: pair(shape, form) for form in ("centroid", "first_order")}
        for shape in ("wan14b-720p", "hunyuan-720p")
    )

    def rates(index: int) -> str:
        both = (wan[form][index]["attend_over_dense_rate"] for form in ("centroid", "first_order"))
        return " / ".join(f"{rate:.2f}" for rate in both)

    def speedups(found: tuple[Row, Row]) -> str:
        return " / ".join(f"{row['speedup']:.2f}x" for row in found)

    rest = " / ".join(f"{row['rest_share']:.1%}" for row in wan["centroid"])
    adds = " / ".join(
        f"{(_ms(first) - _ms(plain)) / _dense_ms(plain):.1%}"
        for first, plain in zip(wan["first_order"], wan["centroid"], strict=True)
    )
    memory = max(
        row["extra_memory"] for found in (*wan.values(), *hunyuan.values()) for row in found
    )
    lines = [
        ("attend, useful rate over dense, 0.2: centroid / first order", "0.78", "0.92", rates(0)),
        ("the same at 0.1", "0.70", "0.85", rates(1)),
        ("everything else, of the dense time, centroid form", "7 %", "3.5 %", rest),
        ("what the first-order form adds, of the dense time", "4 %", "2.5 %", adds),
        ("whole op over dense, Wan 14B, centroid form", *_CENTROID, speedups(wan["centroid"])),
        ("the same, first-order form", *_FIRST_ORDER, speedups(wan["first_order"])),
        ("the same, HunyuanVideo, centroid form", *_CENTROID, speedups(hunyuan["centroid"])),
        ("the same, first-order form", *_FIRST_ORDER, speedups(hunyuan["first_order"])),
        ("extra peak memory over the bytes of Q, K, V and output", "1.0", "0.5", f"{memory:.2f}"),
        ("fewest tokens at which density 0.2 beats dense", "16k", "8k", _shortest(record["rows"])),
        ("density 1 through the attend kernel over dense", "1.25x", "1.05x", _NOT_MEASURED),
    ]
    head = "| 300 / 1000 clusters, density 0.2 / 0.1 | reach | strive for | measured |"
    return "\n".join([head, "|---|---|---|---|", *(f"| {' | '.join(line)} |" for line in lines)])


def _shortest(rows: list[Row]) -> str:
    """The shortest sequence of head dim 128 in a record whose default clusters beat dense."""
    pays: dict[int, bool] = {}
    for row in rows:
        if row["clusters"] == "default" and row["density"] == 0.2 and row["size"][3] == 128:
            tokens = row["size"][2]
            pays[tokens] = pays.get(tokens, True) and row.get("speedup", 0.0) > 1
    shortest = min(pays)
    if pays[shortest]:
        return f"{_NOT_MEASURED} below {shortest:,} tokens, where it does"
    return f"{min(n for n, wins in pays.items() if wins):,}"


def _ms(row: Row) -> float:
    return statistics.median(row["samples_ms"])


def _dense_ms(row: Row) -> float:
    return statistics.median(row["dense_samples_ms"][row["dense_backend"]])
