"""The benchmark of growing caches on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.attention import cache


def test_a_tiny_record_has_every_mode_at_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cache", "--tiny", "--repeats", "2", "--out", str(tmp_path)])
    cache.main()
    record = json.loads((tmp_path / "cache.json").read_text())
    modes = {
        keys: [row["mode"] for row in record["rows"] if row["keys"] == keys] for keys in (192, 576)
    }
    assert modes[192] == ["dense", "anew", *cache.MODES[2:]]
    assert modes[576] == ["dense", *cache.MODES]
    assert all(len(row["samples_ms"]) == 2 for row in record["rows"])
    assert all(row["gate"] < 1e-2 for row in record["rows"] if row["mode"] != "dense")
    kept = [row["excess"] for row in record["rows"] if row["mode"] in cache.MODES[1:4]]
    assert len(kept) == 5
    assert "GATE" not in capsys.readouterr().out


def test_long_caches_need_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cache", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        cache.main()
    assert "--tiny runs on a CPU" in capsys.readouterr().err
