"""The fuzzer of files and options: a few hundred cases are clean, and it finds faults put back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz import inputs
from svg_ear_compile import settings
from svg_ear_compile.checkpoint import Checkpoint
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import calibration as calibrations
from svg_ear_compile.cost_model import json_record
from svg_ear_compile.kernels import checked

CASES = 400


def test_mutated_inputs_are_used_or_refused_in_a_sentence() -> None:
    found = inputs.run(CASES, 5)
    assert [said for outcomes in found.values() for said in outcomes.failures] == []
    for kind, outcomes in found.items():
        assert outcomes.accepted + outcomes.refused == CASES / len(found)
        assert outcomes.refused > 0.5 * CASES / len(found), kind
        assert outcomes.accepted > 0, kind
        assert outcomes.slowest_s < inputs.LIMIT_S


def _without_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked.Range, "refusal", lambda self, value: None)


def _raw_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_record, "printable", str)
    monkeypatch.setattr(settings, "printable", str)


def _python_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_record, "parse", json.loads)


def _no_check_of_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "check", lambda found: found)


def _no_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrations, "_checksum", lambda data: None)
    monkeypatch.setattr(Checkpoint, "_checksum", lambda self, key, value: None)


def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LIMIT_S", 1e-5)


@pytest.mark.parametrize(
    ("put_back", "kind"),
    [
        (_without_ranges, "options"),
        (_without_ranges, "budget"),
        (_raw_messages, "budget"),
        (_python_errors, "budget"),
        (_no_check_of_budgets, "budget"),
        (_no_checksum, "calibration"),
        (_no_checksum, "checkpoint"),
        (_slow, "checkpoint"),
    ],
)
def test_a_fault_that_is_put_back_is_found(
    put_back: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back(monkeypatch)
    # Most faults show at once.
    assert any(inputs.run(cases, 7, [kind])[kind].failures for cases in (50, 1000))


def test_the_same_seed_gives_the_same_cases_and_leaves_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/before")
    handlers = list(logging.getLogger("svg_ear_compile").handlers)
    first, second = (inputs.run(80, 3) for _ in range(2))
    assert [(f.accepted, f.refused) for f in first.values()] == [
        (f.accepted, f.refused) for f in second.values()
    ]
    assert inputs.os.environ["XDG_CACHE_HOME"] == "/before"
    assert logging.getLogger("svg_ear_compile").handlers == handlers


def test_the_record_is_of_ten_thousand_clean_cases() -> None:
    record = json.loads(Path(inputs.RECORD).read_text())
    assert record["cases"] >= 10_000
    for outcomes in record["outcomes"].values():
        assert outcomes["failures"] == []
        assert outcomes["slowest_s"] < inputs.LIMIT_S
