"""The pipeline that is compared: what `make` may return, and one generation of it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from svg_ear_compile.compare.frames import Frames, frames_of
from svg_ear_compile.kernels.checked import shown
from svg_ear_compile.pipeline_calls import denoisers


@dataclass(frozen=True)
class Generated:
    """One clip and what it took.

    Attributes:
        frames: see `Frames`.
        seconds: wall-clock time of the whole call of the pipeline.
        peak_bytes: most device memory allocated during it, over all GPUs; None without one.
        compiled: whether a graph was compiled meanwhile.
    """

    frames: Frames
    seconds: float
    peak_bytes: int | None
    compiled: bool


class Pipeline:
    """What `make` returned, checked: `made`, and `modules`, its denoising models by name."""

    def __init__(self, made: Any) -> None:
        """Check what `make` returned: a pipeline, or a pair of it and keyword arguments.

        Raises:
            TypeError: it is neither; the message says what is missing.
        """
        pipeline: Any = made
        given: Any = {}
        if isinstance(made, tuple) and len(made) == 2:
            pipeline, given = made
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise TypeError(f"make must return (pipeline, keyword arguments), got {shown(given)}")
        kind = type(pipeline).__name__
        if isinstance(pipeline, (type, nn.Module)) or not callable(pipeline):
            raise TypeError(
                f"make must return a pipeline that is called with a prompt, got {_what(pipeline)}"
            )
        self.modules = denoisers(pipeline, None)
        if not self.modules:
            raise TypeError(f"the pipeline {kind} holds no model that is called with a timestep")
        self.given = dict(given)
        self.made = pipeline
        self._takes = self._checked_signature(kind)
        # diffusers draws a bar of its own over ours.
        quieten = getattr(pipeline, "set_progress_bar_config", None)
        if quieten is not None:
            quieten(disable=True)

    def _checked_signature(self, kind: str) -> frozenset[str]:
        parameters = inspect.signature(self.made).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "prompt" not in parameters and not anything:
            raise TypeError(f"the pipeline {kind} takes no prompt")
        found = set(parameters)
        if not found & {"generator", "seed"}:
            if not anything:
                raise TypeError(f"the pipeline {kind} takes neither generator nor seed")
            found.add("generator")
        for name in ("prompt", "generator", "seed"):
            if name in self.given:
                raise TypeError(f"make gives the call {name}, which compare gives itself")
        for name in self.given:
            if name not in parameters and not anything:
                raise TypeError(f"make gives the call {name}, which {kind} does not take")
        return frozenset(found)

    def generate(self, prompt: str, seed: int, on_step: Callable[[int], None]) -> Generated:
        """Generate one clip; `on_step` hears of every finished step where the pipeline tells."""
        call: dict[str, Any] = {}
        if "output_type" in self._takes:
            call["output_type"] = "np"
        if "callback_on_step_end" in self._takes:
            call["callback_on_step_end"] = _step_listener(on_step)
        call |= {"prompt": prompt, **self.given}
        if "seed" in self._takes:
            call["seed"] = seed
        if "generator" in self._takes:
            call["generator"] = torch.Generator().manual_seed(seed)
        graphs = _graphs_compiled()
        _settle()
        if torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        with torch.no_grad():
            result = self.made(**call)
        _settle()
        seconds = time.perf_counter() - started
        compiled = _graphs_compiled() > graphs
        return Generated(frames_of(result), seconds, _peak_bytes(), compiled)


def check_make(make: object) -> None:
    """Raise unless the argument is a function without arguments that may return a pipeline.

    Raises:
        TypeError: it is something else, such as the pipeline itself.
    """
    if not callable(make) or isinstance(make, nn.Module) or denoisers(make, None):
        raise TypeError(
            f"make must be a function that returns a pipeline, as in compare(lambda: pipe, ...), "
            f"got {_what(make)}"
        )


def _what(made: Any) -> str:
    if isinstance(made, nn.Module):
        return f"the model {type(made).__name__}"
    if isinstance(made, tuple):
        return f"a tuple of {len(made)}"
    return f"the class {made.__name__}" if isinstance(made, type) else shown(made)


def _step_listener(on_step: Callable[[int], None]) -> Callable[..., Any]:
    def listen(pipeline: Any, step: int, timestep: Any, callback_kwargs: Any) -> Any:
        on_step(step + 1)
        return callback_kwargs

    return listen


def _graphs_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


def _settle() -> None:
    """Wait for every GPU in use."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def _peak_bytes() -> int | None:
    if not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
