"""Dynamo's tracing: runs a model once through a given backend, and tells which model is traced."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import Node

from svg_ear_compile.passes.module_path import by_subscripts, root_of

_RUNS = itertools.count()
_RUNS_ONCE: ContextVar[bool] = ContextVar("svg_ear_runs_once", default=False)


def runs_once() -> bool:
    """Whether `run_once` is running a model in this context."""
    return _RUNS_ONCE.get()


def run_once(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Callable[..., Any],
) -> Any:
    """Run a model once, compiled by `backend`, without gradients; returns its output.

    Args:
        model: an `nn.Module`, compiled or not, or a function.
        args, kwargs: its inputs.
        backend: a backend of `torch.compile`.
    """
    target = getattr(model, "_orig_mod", model)

    # Inputs of the graph are called as the model calls them, and handed on as they were given.
    names = _names(target, len(args))

    def call(**kwargs: Any) -> Any:
        rest = {name: value for name, value in kwargs.items() if name not in names}
        return target(*[kwargs[name] for name in names], **rest)

    # Dynamo caches compiled code by code object: a copy of it leaves the user's cache alone. Which
    # sizes were seen to change is remembered by name: a new one knows of no other model's sizes.
    code = call.__code__.replace(co_name=f"traced_{next(_RUNS)}")
    fresh = types.FunctionType(code, globals(), code.co_name, None, call.__closure__)
    # Frames after a graph break have code objects of the model. Beyond the recompile limit Dynamo
    # would run them eagerly, and their attention would not reach the backend.
    unlimited = torch._dynamo.config.patch(
        recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
    )
    token = _RUNS_ONCE.set(True)
    try:
        with torch.no_grad(), unlimited:
            given = dict(zip(names, args, strict=True))
            return torch.compile(fresh, backend=backend)(**given, **kwargs)
    finally:
        _RUNS_ONCE.reset(token)


def _names(target: Callable[..., Any], count: int) -> list[str]:
    """Names of the first arguments of a model, made up where its signature has none."""
    numbered = [f"args_{place}" for place in range(count)]
    try:
        signature = inspect.signature(target.forward if isinstance(target, nn.Module) else target)
    except (TypeError, ValueError):
        return numbered
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in signature.parameters.values() if p.kind in kinds]
    return named[:count] if len(named) >= count else numbered


def traced_module(node: Node) -> nn.Module | None:
    """The module that Dynamo is tracing, of which the node is a part; None if that does not show.

    Args:
        node: a node of the graph that a backend was just given.
    """
    stack = node.meta.get("nn_module_stack") or {"": ("L['self']", None)}
    root = root_of(by_subscripts(next(iter(stack.values()))[0]))
    try:
        found: Any = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:  # Dynamo traces nothing now: the graph was traced before
        return None
    for name, place, attribute in re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)", root):
        try:
            found = getattr(found, attribute) if attribute else found[int(place) if place else name]
        except KeyError:  # a global variable
            return None
    found = getattr(found, "__self__", found)  # of a method
    return found if isinstance(found, nn.Module) else None
