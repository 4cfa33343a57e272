"""SVG-EAR sparse attention for video transformers, as a `torch.compile` backend.

    model = torch.compile(model, backend="svg_ear", options={"density": 0.15})

Nothing has to be imported for that line. `bind` tells a compiled model's layers and denoising steps
apart, `explain` lists every attention and what was decided, `calibrate` measures a device, `tune` a
model, `compare` shows what a setting does to one's own clips.
"""

import warnings

import torch

from svg_ear_compile.backend import svg_ear
from svg_ear_compile.calibrating import calibrate
from svg_ear_compile.compare import compare
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.explain import Explanation, explain
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.recording import ModelCall, record_calls
from svg_ear_compile.session import Session, bind
from svg_ear_compile.settings import Settings
from svg_ear_compile.torch_version import warn_if_untried
from svg_ear_compile.tuning import TuningSettings, tune

__all__ = [
    "AttentionPlan",
    "Budget",
    "Explanation",
    "ModelCall",
    "Session",
    "Settings",
    "TuningSettings",
    "__version__",
    "bind",
    "calibrate",
    "compare",
    "explain",
    "record_calls",
    "svg_ear",
    "tune",
]

__version__ = "0.2.0"  # pyproject.toml reads it here

warn_if_untried(torch.__version__)

# An installed package is found by its entry point and a second registration of the name would fail;
# a clone that is not installed has no entry point.
if "svg_ear" not in torch.compiler.list_backends():
    torch._dynamo.register_backend(svg_ear)


def __getattr__(name: str) -> object:
    if name == "Binding":
        warnings.warn("Binding is called Session now", DeprecationWarning, stacklevel=2)
        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
