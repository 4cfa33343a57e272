"""Compiles a pipeline's models for one setting and gives them back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svg_ear_compile.accelerate import Accelerated, accelerate
from svg_ear_compile.compare.pipeline import Pipeline
from svg_ear_compile.compare.setting import Setting
from svg_ear_compile.in_place import CompiledInPlace, is_compiled


@contextmanager
def compiled_for(pipeline: Pipeline, setting: Setting) -> Iterator[Accelerated | None]:
    """Compile the models of `pipeline` in place for `setting` inside the with block.

    Repeated blocks are compiled one by one where the class names them, the whole model otherwise.
    Yields None for dense attention, which Inductor compiles.

    Raises:
        ValueError: a model is compiled already, or has no timestep argument.
    """
    for name, module in pipeline.modules.items():
        if is_compiled(module):
            raise ValueError(
                f"the pipeline's {name} is compiled already: return it from make as it is, compare "
                "compiles it for each setting"
            )
    torch.compiler.reset()
    if setting.options is not None:
        with accelerate(pipeline.made, **setting.arguments()) as handle:
            yield handle
        return
    models = pipeline.modules.values()
    compiled = CompiledInPlace(models, [{"backend": "inductor"}] * len(models))
    try:
        yield None
    finally:
        compiled.undo()
