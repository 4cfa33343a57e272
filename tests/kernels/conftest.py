"""Fill uninitialised memory with NaN, so that elements that are never written fail a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


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
