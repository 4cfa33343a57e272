"""Tells who runs compiled models in several threads what PyTorch 2.11 then leaves eager.

Each call of a model that was compiled with ``fullgraph=True`` saves how Dynamo treats the frames
that it runs and puts it back. PyTorch 2.11 keeps that in one variable for all threads: where two
such calls overlap, the one that ends last puts back what the other had set, and Dynamo skips every
later frame. Behind a graph break stands a frame of its own.
"""

from __future__ import annotations

import logging
from typing import Any

from torch._C._dynamo import eval_frame
from torch.fx import GraphModule

from svg_ear_compile.summary import say_once


def warn_of_skipped_frames(gm: GraphModule) -> None:
    """Log a warning if the graph ends at a graph break that Dynamo does not go on behind."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break and _skips_frames():
        say_once(
            logging.WARNING,
            "What follows the graph break stays eager, its attention dense: compiled models ran in "
            "two threads at the same time, and PyTorch 2.11 compiles nothing behind a graph break "
            "from then on. Use PyTorch 2.12 or later, or a process for each model.",
        )


def _skips_frames() -> bool:
    dynamo: Any = eval_frame  # each release has other names
    if not hasattr(dynamo, "set_eval_frame_override"):
        return False
    states = dynamo._EvalFrameOverride
    # There is no way to read it. A thread that saves what is set here meanwhile saves no fault.
    before = dynamo.set_eval_frame_override(states.NONE)
    dynamo.set_eval_frame_override(before)
    return bool(before == states.SKIP)
