"""Uninitialised memory is NaN, so that what is never written fails; the interpreter made faster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreter_caches import look_for_no_overflow, remember_promotions, remember_types


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, the largest integer, or True in every element."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor if tensor.is_complex() else tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """Poison what torch.empty, torch.empty_like and Tensor.new_empty return."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            return poison(make(*args, **kwargs))

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield


@pytest.fixture(autouse=True, scope="session")
def interpreter_that_remembers() -> Iterator[None]:
    """Types and promotions are remembered, and triton.language is replaced once a launch.

    Triton's interpreter replaces it in each call of a function in a kernel, which takes
    milliseconds. What a launch has replaced stays so until its end: within one launch the first
    call of each kind of module is enough.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    language = (interpreter.tl, interpreter.tl.core)
    replaced: set[frozenset[int]] = set()

    def replace_once(function: Any) -> Any:
        seen = (x for x in function.__globals__.values() if x is language[0] or x is language[1])
        modules = frozenset(map(id, seen))
        if modules in replaced:
            return None
        replaced.add(modules)
        return replace(function)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        remember_types(patch)
        remember_promotions(patch)
        look_for_no_overflow(patch)
        yield
