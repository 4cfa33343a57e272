"""The stacking benchmark at a size that a CPU takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.stacking import __main__ as command
from benchmarks.stacking.neighbours import NEIGHBOURS, Neighbour
from benchmarks.stacking.report import table


def _breaks(pipe: object) -> None:
    raise RuntimeError("no such kernel")


@pytest.mark.slow
def test_rows_are_measured_and_a_row_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_aot: None
) -> None:
    monkeypatch.setitem(NEIGHBOURS, "broken", Neighbour("broken", _breaks))
    rows = "broken,float8,lora"
    command.main(["--tiny", "--steps", "2", "--rows", rows, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "tiny.json").read_text())
    broken, lora = record["rows"]  # FP8 is left out on a CPU
    assert broken["error"] == "RuntimeError: no such kernel"
    assert (lora["sparse"]["sparse_layers"], lora["sparse"]["layers"]) == (2, 2)
    assert lora["dense"]["finite"]
    assert lora["sparse"]["finite"]
    assert 0 < lora["relative_error"] < 0.1


def test_the_table_compares_each_row_with_dense_and_with_dense_alone() -> None:
    def side(seconds: float, gib: int) -> dict[str, object]:
        return {"seconds": seconds, "peak_bytes": gib << 30, "sparse_layers": 3, "layers": 4}

    record = {
        "rows": [
            {"name": "alone", "title": "alone", "dense": side(8, 2), "sparse": side(4, 3),
             "relative_error": 0.25},
            {"name": "int8", "title": "int8", "dense": side(6, 1), "sparse": side(2, 2),
             "relative_error": 0.5},
            {"name": "lora", "title": "a LoRA", "error": "ImportError: no peft"},
        ]
    }  # fmt: skip
    alone, int8, lora = table(record).splitlines()[2:]
    assert alone == "| alone | 8.00 | 4.00 | **2.00x** | 2.00x | 2.0 → 3.0 | 3 of 4 | 25.0% |"
    assert int8 == "| int8 | 6.00 | 2.00 | **3.00x** | 4.00x | 1.0 → 2.0 | 3 of 4 | 50.0% |"
    assert "did not run: ImportError: no peft" in lora


@pytest.mark.parametrize(
    ("given", "said"), [(["--rows", "alone,fp4"], "fp4: there are alone"), ([], "no GPU here")]
)
def test_mistakes_are_one_line(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main([*given, "--out", str(tmp_path)])
    assert said in capsys.readouterr().err
