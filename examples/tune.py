"""A budget that is tuned on Wan 2.1: how sparse each layer may be in each phase of the denoising.

python examples/tune.py --out wan.json          # an hour or more; run it again to go on
python examples/tune.py --tiny --out tiny.json  # random tiny weights on a CPU

handle = svg_ear_compile.accelerate(pipe, budget="wan.json")
"""

import argparse
from pathlib import Path

import diffusers
import tiny_diffusers
import torch

import svg_ear_compile


def main() -> None:
    """Capture forwards of a generation, tune on them, write the budget and use it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", default="a red fox in the snow")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    if given.tiny:
        pipe, call = tiny_diffusers.wan()
        tried = svg_ear_compile.TuningSettings(densities=(0.2, 0.5), phases=2, compiler="eager")
    else:
        pipe = diffusers.WanPipeline.from_pretrained(
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16
        )
        pipe.to("cuda")
        call = {"num_frames": 81, "num_inference_steps": 50}
        tried = svg_ear_compile.TuningSettings(phases=3)

    # A few forwards tell enough: of the reference branch, early, in the middle and late.
    forwards = 2 * call["num_inference_steps"]
    kept = {0, forwards // 2, forwards - 2}
    calls = svg_ear_compile.capture_calls(
        pipe.transformer, lambda: pipe(given.prompt, **call), keep=lambda i: i in kept
    )
    checkpoint = given.out.with_suffix(".checkpoint")
    budget = svg_ear_compile.tune(
        pipe.transformer, calls, density=given.density, settings=tried, checkpoint=checkpoint
    )
    budget.save(given.out)

    with svg_ear_compile.accelerate(pipe, budget=given.out) as handle:
        pipe(given.prompt, **call)
        print(handle.report())


if __name__ == "__main__":
    main()
