"""What PyTorch 2.11 leaves eager after compiled calls of two threads is said."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from svg_ear_compile import overlapping_calls

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "without_inductor")
SAID = "What follows the graph break stays eager"


def breaks(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


def said(caplog: pytest.LogCaptureFixture, whole: bool = False) -> bool:
    with caplog.at_level(logging.WARNING, "svg_ear_compile"), torch.no_grad():
        torch.compile(torch.relu if whole else breaks, backend="svg_ear")(torch.ones(3))
    return SAID in caplog.text


@pytest.mark.parametrize("skips", [True, False])
def test_only_a_graph_break_that_dynamo_stops_at_is_warned_of(
    skips: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlapping_calls, "_skips_frames", lambda: skips)
    assert not said(caplog, whole=True)
    assert said(caplog) == skips


def test_calls_that_overlap_are_told_from_others(caplog: pytest.LogCaptureFixture) -> None:
    turns = {"first": threading.Event(), "second": threading.Event()}

    @torch.compiler.disable
    def take_turns() -> None:  # the call that began first ends first
        if threading.current_thread() is first:
            turns["first"].set()
            assert turns["second"].wait(60)
        elif first.is_alive():
            turns["second"].set()
            first.join(60)

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        def run(*args: object) -> object:
            take_turns()
            return gm.forward(*args)

        return run

    double = torch.compile(lambda x: x * 2, backend=backend, fullgraph=True)
    first = threading.Thread(target=lambda: double(torch.ones(3)))
    double(torch.ones(3))  # compiled
    assert not said(caplog)
    first.start()
    assert turns["first"].wait(60)
    double(torch.ones(3))
    assert not first.is_alive()
    torch.compiler.reset()
    # Later releases have no such variable, and Dynamo goes on.
    assert said(caplog) == hasattr(eval_frame, "set_eval_frame_override")
