"""Compiles models in place, block by block where the class names its blocks, and undoes it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or a module inside of it, is compiled."""
    return any(
        isinstance(inner, OptimizedModule) or inner._compiled_call_impl is not None
        for inner in module.modules()
    )


def compile_in_place(module: nn.Module, **how: Any) -> None:
    """Compile the repeated blocks one by one where the class names them, else the whole model.

    Args:
        module: a model that is not compiled.
        how: arguments of `torch.compile`.
    """
    if has_repeated_blocks(module):
        module.compile_repeated_blocks(**how)  # type: ignore[operator]
    else:
        module.compile(**how)


def undo_compilation(module: nn.Module) -> None:
    """Make the module and every module inside of it run as if they had never been compiled."""
    for inner in module.modules():
        inner.__dict__.pop("_compiled_call_impl", None)


def has_repeated_blocks(module: nn.Module) -> bool:
    """Whether diffusers compiles this model's blocks one by one."""
    kinds = getattr(module, "_repeated_blocks", None) or ()
    return hasattr(module, "compile_repeated_blocks") and any(
        type(inner).__name__ in kinds for inner in module.modules()
    )
