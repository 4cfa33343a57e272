"""SVG-EAR sparse attention for video transformers, as a `torch.compile` backend.

    model = torch.compile(model, backend="svg_ear", options={"density": 0.15})

That line needs no import. `accelerate` compiles and binds all models of a pipeline in one call.
Underneath, `bind` gives a compiled model a session, which knows its layers and denoising steps.
`explain` lists every attention call of a model with its plan and the reason for it. `calibrate`
measures a device, `tune` measures a model and makes a budget for it, `compare` shows the effect of
a setting on the clips of a pipeline.
"""

import warnings
from typing import Any

import torch

from svg_ear_compile.accelerate import Accelerated, accelerate
from svg_ear_compile.accelerated_report import AccelerationReport
from svg_ear_compile.backend import svg_ear
from svg_ear_compile.calibrating import calibrate
from svg_ear_compile.capture import ModelCall, capture_calls
from svg_ear_compile.compare import compare
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.explain import Explanation, explain
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.session import Session, bind
from svg_ear_compile.settings import Settings
from svg_ear_compile.summary import NotSparseError
from svg_ear_compile.torch_version import warn_if_untried
from svg_ear_compile.tuning import TuningSettings, tune

__all__ = [
    "Accelerated",
    "AccelerationReport",
    "AttentionPlan",
    "Budget",
    "Explanation",
    "ModelCall",
    "NotSparseError",
    "Session",
    "Settings",
    "TuningSettings",
    "__version__",
    "accelerate",
    "bind",
    "calibrate",
    "capture_calls",
    "compare",
    "explain",
    "svg_ear",
    "tune",
]

__version__ = "0.2.0"  # pyproject.toml reads it here

warn_if_untried(torch.__version__)

# The entry point of an installed package registers the name, and a second registration would fail.
# A clone that is not installed has no entry point.
if "svg_ear" not in torch.compiler.list_backends():
    torch._dynamo.register_backend(svg_ear)


_FORMER_NAMES: dict[str, Any] = {"Binding": Session, "record_calls": capture_calls}


def __getattr__(name: str) -> object:
    if name in _FORMER_NAMES:
        found = _FORMER_NAMES[name]
        warnings.warn(f"{name} is called {found.__name__} now", DeprecationWarning, stacklevel=2)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
