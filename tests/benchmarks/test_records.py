"""Records are renewed in order, each on a GPU of its own, within the time."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.records import RECORDS, Record, Run


def test_names_are_unique_and_every_module_is_there():
    assert len({record.name for record in RECORDS}) == len(RECORDS)
    modules = re.findall(r"-m ((?:benchmarks|svg_ear_compile)[\w.]*)", str(RECORDS))
    assert len(modules) >= 12
    assert all(importlib.util.find_spec(module) for module in modules)


def ran(tmp_path: Path, gpus: int, minutes: float, *given: Record) -> dict[str, str]:
    run = Run(tmp_path / "a folder", gpus, minutes)
    run.all_of(given)
    return {name: how.split(",")[0] for name, how in run.outcomes.items()}


def seen(tmp_path: Path, name: str) -> str:
    return (tmp_path / "a folder" / f"{name}.log").read_text().strip()


@pytest.fixture(autouse=True)
def _all_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_record_sees_its_gpus_and_the_folder(tmp_path):
    show = "echo $CUDA_VISIBLE_DEVICES && touch {out}/$CUDA_VISIBLE_DEVICES.json"
    both, one = Record("both", 0.1, show, 2), Record("one", 0.1, show)
    assert ran(tmp_path, 2, 1.0, one, both) == {"both": "done", "one": "done"}
    assert seen(tmp_path, "both") == "0,1"
    assert seen(tmp_path, "one") in ("0", "1")
    assert (tmp_path / "a folder" / "0,1.json").exists()


def test_records_keep_to_the_gpus_that_they_were_given(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    show = "echo $CUDA_VISIBLE_DEVICES"
    ran(tmp_path, 2, 1.0, Record("both", 0.1, show, 2))
    ran(tmp_path, 1, 1.0, Record("one", 0.1, show))
    assert [seen(tmp_path, name) for name in ("both", "one")] == ["3,5", "3"]


def test_two_gpus_work_side_by_side(tmp_path):
    # Each waits for the other one.
    meet = "touch {out}/%s; until [ -e {out}/%s ]; do sleep 0.01; done"
    given = [Record(n, 0.2, meet % (n, m)) for n, m in (("left", "right"), ("right", "left"))]
    assert set(ran(tmp_path, 2, 1.0, *given).values()) == {"done"}


def test_what_fails_or_has_no_place_is_said(tmp_path):
    outcomes = ran(
        tmp_path, 1, 0.05,
        Record("fails", 0.01, "false | cat"),
        Record("hangs", 0.002, "sleep 60 & wait"),
        Record("long", 1.0, "true"),
        Record("wide", 0.01, "true", 2),
    )  # fmt: skip
    assert outcomes == {
        "fails": "failed (1)", "hangs": "stopped", "long": "no time left", "wide": "needs 2 GPUs",
    }  # fmt: skip


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(records.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("sys.argv", ["records", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        records.main()
    assert "there is no GPU here" in capsys.readouterr().err
