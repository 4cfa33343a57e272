"""Compiles models in place, block by block where the class names its blocks, and undoes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or a module inside of it, is compiled."""
    return any(
        isinstance(inner, OptimizedModule) or inner._compiled_call_impl is not None
        for inner in module.modules()
    )


def has_repeated_blocks(module: nn.Module) -> bool:
    """Whether diffusers compiles this model's blocks one by one."""
    kinds = getattr(module, "_repeated_blocks", None) or ()
    return hasattr(module, "compile_repeated_blocks") and any(
        type(inner).__name__ in kinds for inner in module.modules()
    )


class CompiledInPlace:
    """Models compiled in place: their repeated blocks where the class names them, else the whole.

    Args:
        models: models that are not compiled.
        how: arguments of `torch.compile` for each.
    """

    def __init__(self, models: Iterable[nn.Module], how: Iterable[Mapping[str, Any]]) -> None:
        self._whole: dict[nn.Module, Any] = {}
        self._blocks: dict[nn.Module, Any] = {}
        try:
            for model, given in zip(models, how, strict=True):
                self._compile(model, given)
        except BaseException:
            self.undo()
            raise

    def _compile(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        if not has_repeated_blocks(model):
            model.compile(**given)
            self._whole[model] = model._compiled_call_impl
            return
        try:
            model.compile_repeated_blocks(**given)  # type: ignore[operator]
        finally:
            self._blocks |= {
                inner: inner._compiled_call_impl
                for inner in model.modules()
                if inner._compiled_call_impl is not None
            }

    def undo(self) -> None:
        """Make the models run as before, where nobody else has compiled them meanwhile."""
        for module, compiled in (self._whole | self._blocks).items():
            if module.__dict__.get("_compiled_call_impl") is compiled:
                del module._compiled_call_impl

    @property
    def blocks_are_intact(self) -> bool:
        """Whether every block is still compiled as it was here."""
        return all(
            module.__dict__.get("_compiled_call_impl") is compiled
            for module, compiled in self._blocks.items()
        )
