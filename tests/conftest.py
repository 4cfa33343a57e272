"""Hypothesis profiles; where Triton kernels run; compilation without Inductor, and its cost."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Triton reads this when it is imported, once for the whole process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# pytest listens to every logger that does not propagate, and PyTorch writes a full trace of each
# compilation (graphs as text, stacks, timings) as soon as somebody listens to this one.
if "TORCH_TRACE" not in os.environ:
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()
    trace.propagate = True

# A process that a test starts imports this tree, whatever is installed.
inherited = filter(None, [os.environ.get("PYTHONPATH")])
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *inherited])

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=10,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("dev", deadline=None, max_examples=60)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class _Faults(logging.Handler):
    """Raises what the pass has failed with: the net under it must not hide faults from tests."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            raise record.exc_info[1]


@pytest.fixture(autouse=True)
def _no_fault_is_caught(request: pytest.FixtureRequest) -> Iterator[None]:
    log, faults = logging.getLogger("svg_ear_compile.planning"), _Faults()
    if request.node.get_closest_marker("faults") is None:
        log.addHandler(faults)
    yield
    log.removeHandler(faults)


@pytest.fixture(autouse=True)
def _said_before_is_forgotten() -> None:
    """Lines that are logged once for a process are logged once for each test."""
    summary = sys.modules.get("svg_ear_compile.summary")
    if summary is not None:
        summary.say_once.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _guards_are_not_timed() -> Iterator[None]:
    """Dynamo flushes the processor's caches for every graph, to log how long its guards take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each graph runs as the pass leaves it; no session is left active."""
    from svg_ear_compile.kernels.call import UNBOUND, active_source

    torch.compiler.reset()
    monkeypatch.setattr(
        "svg_ear_compile.backend.compile_fx", lambda gm, inputs, **given: gm.forward
    )
    yield
    torch.compiler.reset()
    assert active_source() is UNBOUND


@pytest.fixture
def through_aot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph runs as AOTAutograd leaves it, those of `backend="inductor"` too."""
    from aot_only import leave_inductor_out

    torch.compiler.reset()
    leave_inductor_out(monkeypatch.setattr)


def pytest_collection_finish() -> None:
    """What is imported stays, and Dynamo collects what a compilation left."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure() -> None:
    """Libraries that look for leaks at the end see what was frozen."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
