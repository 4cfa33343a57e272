"""Compilation without Inductor, for tests of what happens around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from svg_ear_compile.kernels.call import UNBOUND, active_source


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each graph runs as the pass leaves it; no session is left active."""
    torch.compiler.reset()
    monkeypatch.setattr(
        "svg_ear_compile.backend.compile_fx", lambda gm, inputs, **given: gm.forward
    )
    yield
    torch.compiler.reset()
    assert active_source() is UNBOUND
