"""Runs a model once through Dynamo and a backend of ours, beside whatever the user compiled."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

_RUNS_ONCE: ContextVar[bool] = ContextVar("svg_ear_runs_once", default=False)


def runs_once() -> bool:
    """Whether a model is being run by `run_once` here."""
    return _RUNS_ONCE.get()


def run_once(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Callable[..., Any],
) -> Any:
    """What the model returns, run without gradients on graphs that `backend` was given.

    Args:
        model: an `nn.Module`, compiled or not, or a function.
        args, kwargs: its inputs.
        backend: as `torch.compile` takes it.
    """
    target = getattr(model, "_orig_mod", model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # Dynamo keeps what it compiled on the code object: one of its own leaves the user's alone.
    fresh = types.FunctionType(call.__code__.replace(), globals(), "traced", None, call.__closure__)
    # Frames after a graph break are the model's own code objects: at its limit Dynamo runs them
    # eagerly, and their attention would never reach the backend.
    unlimited = torch._dynamo.config.patch(
        recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
    )
    token = _RUNS_ONCE.set(True)
    try:
        with torch.no_grad(), unlimited:
            return torch.compile(fresh, backend=backend)(*args, **kwargs)
    finally:
        _RUNS_ONCE.reset(token)
