"""Compiles a pipeline's models for one setting and gives them back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

import svg_ear_compile
from svg_ear_compile.compare.setting import Setting

if TYPE_CHECKING:
    from svg_ear_compile.session import Session


class Compiled:
    """Models compiled for one setting; `session` is None for the dense one."""

    def __init__(self, session: Session | None) -> None:
        self._session = session

    def start(self) -> None:
        """End the last generation: one of a single step does not end by itself."""
        if self._session is not None:
            self._session.reset()

    def density(self) -> float | None:
        """Mean over the layers that ran sparse in the last generation, None if none did."""
        layers = [] if self._session is None else self._session.report()
        reached = [layer.density for layer in layers if layer.density is not None]
        return sum(reached) / len(reached) if reached else None


@contextmanager
def compiled_for(modules: Mapping[str, nn.Module], setting: Setting) -> Iterator[Compiled]:
    """Compile `modules` in place for `setting` inside the with block.

    Repeated blocks are compiled one by one where the class names them, the whole model otherwise.
    Raises:
        ValueError: a model is compiled already, or has no timestep argument.
    """
    for name, module in modules.items():
        if isinstance(module, OptimizedModule) or any(
            inner._compiled_call_impl is not None for inner in module.modules()
        ):
            raise ValueError(
                f"the pipeline's {name} is compiled already: return it from make as it is, compare "
                "compiles it for each setting"
            )
    torch.compiler.reset()
    dense = setting.options is None
    how = {"backend": "inductor" if dense else "svg_ear", "options": dict(setting.options or {})}
    try:
        for module in modules.values():
            if has_repeated_blocks(module):
                module.compile_repeated_blocks(**how)  # type: ignore[operator]
            else:
                module.compile(**how)
        if dense:
            yield Compiled(None)
            return
        with svg_ear_compile.bind(*modules.values(), dense_steps=setting.dense_steps) as session:
            yield Compiled(session)
    finally:
        for module in modules.values():
            for inner in module.modules():
                inner.__dict__.pop("_compiled_call_impl", None)


def has_repeated_blocks(module: nn.Module) -> bool:
    """Whether diffusers compiles this model's blocks one by one."""
    kinds = getattr(module, "_repeated_blocks", None) or ()
    return hasattr(module, "compile_repeated_blocks") and any(
        type(inner).__name__ in kinds for inner in module.modules()
    )
