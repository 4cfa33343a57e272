"""The inputs of a model's forwards, recorded while a pipeline runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class ModelCall:
    """The inputs of one forward of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def record_calls(
    model: nn.Module, run: Callable[[], object], *, keep: Callable[[int], bool] = lambda index: True
) -> list[ModelCall]:
    """The inputs of a model's forwards while something else runs it, e.g. a diffusers pipeline.

        calls = record_calls(pipe.transformer, lambda: pipe(prompt), keep=lambda i: i % 10 == 5)

    Args:
        model: what `run` calls.
        run: calls the model.
        keep: which forwards are kept, by their number; their tensors are copied.
    """
    calls: list[ModelCall] = []
    seen = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if keep(seen):
            copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            calls.append(ModelCall(*copied))
        seen += 1

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls
