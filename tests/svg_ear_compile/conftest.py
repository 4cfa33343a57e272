"""What the operator carries out, and compilation from the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from session_models import Heard
from torch._C._dynamo import eval_frame

from svg_ear_compile.kernels import source_calls
from svg_ear_compile.kernels.call import UNBOUND, active_source


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled yet."""
    torch.compiler.reset()
    yield
    # Whatever a test does, no session outlives its forward.
    assert active_source() is UNBOUND
    if hasattr(eval_frame, "set_eval_frame_override"):  # see overlapping_calls.py
        eval_frame.set_eval_frame_override(eval_frame._EvalFrameOverride.NONE)


@pytest.fixture
def calls(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call as the operator carries it out."""
    seen: list[Any] = []
    monkeypatch.setattr(source_calls, "active_source", lambda: Heard(seen))
    return seen
