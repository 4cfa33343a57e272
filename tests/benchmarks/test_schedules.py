"""The study of schedules: densities of steps, times of calls, what is compared at equal time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.fidelity import schedules
from benchmarks.fidelity.schedules import SCHEDULES, CallTimes, Schedule, compared, recorded_times
from benchmarks.fidelity.times import WAN
from benchmarks.video_dit.zoo import MODELS

TIMES = CallTimes(100.0, ((0.1, 30.0), (0.2, 50.0)), ((0.1, 20.0), (0.2, 40.0)))


def test_a_schedule_has_a_front_and_a_level() -> None:
    assert Schedule("x").densities(0.2, 3) == (0.2, 0.2, 0.2)
    assert Schedule("x", ((0.25, 2.0),)).densities(0.2, 4) == (0.4, 0.2, 0.2, 0.2)
    assert Schedule("x", ((0.5, float("inf")),)).densities(0.2, 4) == (1.0, 1.0, 0.2, 0.2)
    assert Schedule("x", ((0.5, 8.0),)).densities(0.2, 2) == (1.0, 0.2)
    two = Schedule("x", ((0.25, 3.0), (0.25, 2.0)))
    assert two.densities(0.25, 4) == (0.75, 0.5, 0.25, 0.25)
    for schedule in SCHEDULES:
        assert len(schedule.densities(0.1, 7)) == 7


def test_times_are_linear_between_and_beyond_what_was_measured() -> None:
    assert TIMES.at(0.15, 0.0) == pytest.approx(40.0)
    assert TIMES.at(0.15, 1.0) == pytest.approx(30.0)
    assert TIMES.at(0.05, 0.5) == pytest.approx(15.0)
    assert TIMES.at(0.3, 0.0) == pytest.approx(70.0)
    assert TIMES.at(0.9, 0.0) == TIMES.at(1.0, 0.0) == 100.0
    assert TIMES.of((1.0, 0.1), 0.0) == pytest.approx(65.0)


def test_recorded_times_rise_with_the_density_and_fall_with_reuse() -> None:
    for name, times in recorded_times().items():
        found = [times.at(density, 0.0) for density in (0.05, 0.1, 0.2, 0.3, 1.0)]
        assert found == sorted(found), name
        assert all(times.at(d, 1.0) < times.at(d, 0.0) for d in (0.05, 0.1, 0.2)), name
    assert WAN in recorded_times()


def test_schedules_are_compared_at_the_times_of_the_usual_recipe() -> None:
    def row(schedule: Schedule, level: float, db: float) -> dict[str, object]:
        densities = schedule.densities(level, 5)
        return {
            "schedule": {"name": schedule.name}, "level": level, "densities": densities,
            "reused": 0.0, "psnr": [db - 1, db + 1],
        }  # fmt: skip

    even, usual = SCHEDULES[:2]
    rows = [row(usual, 0.1, 20.0), row(usual, 0.2, 25.0)]
    rows += [row(even, level, 100 * level) for level in (0.1, 0.2, 0.3, 0.4)]
    table = compared({"rows": rows}, {"a shape": TIMES}).splitlines()
    # One dense step of five: 44 and 60 ms a call, where an even density is 0.17 and 0.25.
    assert table[2] == "| schedule | dB at 44.0 ms a call | dB at 60.0 ms a call |"
    assert table[4] == "| first fifth dense | 20.0 | 25.0 |"
    name, first, second = (cell.strip() for cell in table[5].strip("|").split("|"))
    assert name == "even"
    assert 16 < float(first) < 18
    assert 24 < float(second) < 26


@pytest.mark.parametrize("guidance", ["1", "3"])
def test_a_run_is_recorded_and_goes_on_where_it_was(
    guidance: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    small = replace(MODELS["self"].shrunk(), weights=tmp_path / "weights", long=(4, 36, 36))
    small.build().save(small.weights)
    monkeypatch.setattr(schedules, "MODELS", {"self": small})
    given = ["--steps", "4", "--guidance", guidance, "--seeds", "1", "--out", str(tmp_path)]
    schedules.main([*given, "--levels", "0.2"])
    path = tmp_path / f"self-4-{guidance}.json"
    rows = json.loads(path.read_text())["rows"]
    assert [row["schedule"]["name"] for row in rows] == [s.name for s in SCHEDULES]
    assert rows[1]["area"] == pytest.approx(1 + 3 * 0.2)
    assert all(len(row["psnr"]) == 1 for row in rows)
    capsys.readouterr()
    schedules.main([*given, "--levels", "0.2,0.3"])
    assert json.loads(path.read_text())["rows"][: len(rows)] == rows
    said = capsys.readouterr().out
    assert "even, 0.3" in said
    assert "even, 0.2" not in said
    assert WAN in said
