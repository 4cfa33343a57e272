"""The forms that a sanitizer looks at all run."""

from __future__ import annotations

from typing import get_args

import torch
from attention_cases import needs_interpreter

from benchmarks import memcheck
from svg_ear_compile.kernels.plan import Compensation


def test_all_forms_are_there_and_the_first_ones_are_plain():
    calls = list(memcheck.calls())
    assert len(set(calls)) == len(calls)
    first = calls[: 2 * len(get_args(Compensation))]
    assert {c.implementation for c in first} == {"hopper", "triton"}
    assert not any(c.has_kinds for c in first)


@needs_interpreter
def test_a_form_runs(monkeypatch):
    monkeypatch.setattr(memcheck, "HEADS", 2)
    monkeypatch.setattr(memcheck, "KV_HEADS", 1)
    monkeypatch.setattr(memcheck, "QUERIES", 77)
    monkeypatch.setattr(memcheck, "KEYS", 93)
    monkeypatch.setattr(memcheck, "WRITTEN", 30)
    call = memcheck.Call("triton", 64, "gaussian", 0.2, True)
    assert memcheck.run(call, torch.device("cpu"))
