"""SVG-EAR sparse attention for video transformers, as a `torch.compile` backend.

    model = torch.compile(model, backend="svg_ear", options={"density": 0.15})

Nothing has to be imported for that line. `bind` tells a compiled model's layers and denoising steps
apart, `explain` lists every attention and what was decided, `calibrate` measures a device, `tune` a
model, `compare` shows what a setting does to one's own clips.
"""

from svg_ear_compile.backend import svg_ear
from svg_ear_compile.binding import Binding, bind
from svg_ear_compile.calibrating import calibrate
from svg_ear_compile.compare import compare
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.explain import Explanation, explain
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.recording import ModelCall, record_calls
from svg_ear_compile.settings import Settings
from svg_ear_compile.tuning import TuningSettings, tune

__all__ = [
    "AttentionPlan",
    "Binding",
    "Budget",
    "Explanation",
    "ModelCall",
    "Settings",
    "TuningSettings",
    "bind",
    "calibrate",
    "compare",
    "explain",
    "record_calls",
    "svg_ear",
    "tune",
]
