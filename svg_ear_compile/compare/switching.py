"""Compiles a pipeline's models for one setting and gives them back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

import svg_ear_compile
from svg_ear_compile.compare.setting import Setting
from svg_ear_compile.in_place import CompiledInPlace, is_compiled

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
        if is_compiled(module):
            raise ValueError(
                f"the pipeline's {name} is compiled already: return it from make as it is, compare "
                "compiles it for each setting"
            )
    torch.compiler.reset()
    dense = setting.options is None
    how = {"backend": "inductor" if dense else "svg_ear", "options": dict(setting.options or {})}
    compiled = CompiledInPlace(modules.values(), [how] * len(modules))
    try:
        if dense:
            yield Compiled(None)
            return
        with svg_ear_compile.bind(*modules.values(), dense_steps=setting.dense_steps) as session:
            yield Compiled(session)
    finally:
        compiled.undo()
