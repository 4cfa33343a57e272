"""Wan 2.1 14B, text to video at 720p.

python examples/wan.py "a red fox in the snow"
python examples/wan.py --tiny      # random tiny weights on a CPU
"""

import argparse

import diffusers
import tiny_diffusers
import torch
from diffusers.utils import export_to_video

import svg_ear_compile


def main() -> None:
    """Generate a video, and say what ran sparse."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a red fox in the snow")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--out", default="wan.mp4")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    if given.tiny:
        pipe, call = tiny_diffusers.wan()
        options = tiny_diffusers.OPTIONS
    else:
        pipe = diffusers.WanPipeline.from_pretrained(
            "Wan-AI/Wan2.1-T2V-14B-Diffusers", torch_dtype=torch.bfloat16
        )
        pipe.to("cuda")
        call = {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 50}
        options = {}

    handle = svg_ear_compile.accelerate(pipe, density=given.density, options=options)
    video = pipe(given.prompt, **call).frames[0]
    if not given.tiny:
        export_to_video(video, given.out, fps=16)
    print(handle.report())


if __name__ == "__main__":
    main()
