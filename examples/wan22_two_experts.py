"""Wan 2.2 A14B, whose two experts take turns: one session serves both.

python examples/wan22_two_experts.py "a red fox in the snow"
python examples/wan22_two_experts.py --tiny      # random tiny weights on a CPU
"""

import argparse

import diffusers
import tiny_diffusers
import torch
from diffusers.utils import export_to_video

import svg_ear_compile


def main() -> None:
    """Generate a video, and say what each expert ran sparse."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a red fox in the snow")
    parser.add_argument("--out", default="wan22.mp4")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    if given.tiny:
        pipe, call = tiny_diffusers.wan22()
        options = tiny_diffusers.OPTIONS
    else:
        pipe = diffusers.WanPipeline.from_pretrained(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16
        )
        pipe.enable_model_cpu_offload()  # one expert on the GPU at a time
        call = {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 40}
        call |= {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
        options = {}

    handle = svg_ear_compile.accelerate(pipe, density=0.2, options=options)
    video = pipe(given.prompt, **call).frames[0]
    if not given.tiny:
        export_to_video(video, given.out, fps=16)
    for model in handle.report().models:
        print(model)


if __name__ == "__main__":
    main()
