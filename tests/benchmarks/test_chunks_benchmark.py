"""The benchmark of several query chunks in one call, on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.attention import chunks


def test_a_tiny_record_has_every_mode_at_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chunks", "--tiny", "--repeats", "2", "--out", str(tmp_path)])
    chunks.main()
    rows = json.loads((tmp_path / "chunks.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == [*chunks.MODES] * 2
    assert all(len(row["samples_ms"]) == 2 for row in rows)
    for row in rows:
        if row["mode"] in ("masked", "flex"):
            assert row["error"] < 1e-5  # the same attention
    (gate, error), *_ = ((row["gate"], row["error"]) for row in rows if row["mode"] == "sparse")
    assert 1e-5 < error < 0.2
    assert gate < 1e-2
    assert "GATE" not in capsys.readouterr().out


def test_long_chunks_need_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["chunks", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        chunks.main()
    assert "--tiny runs on a CPU" in capsys.readouterr().err
