"""HunyuanVideo 1.5, text to video at 720p: text and video in one attention.

python examples/hunyuan_video.py "a red fox in the snow"
python examples/hunyuan_video.py --tiny      # random tiny weights on a CPU
"""

import argparse
from typing import Any

import diffusers
import tiny_diffusers
import torch
from diffusers.utils import export_to_video

import svg_ear_compile


def main() -> None:
    """Generate a video, and say what ran sparse."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a red fox in the snow")
    parser.add_argument("--out", default="hunyuan_video.mp4")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    options: dict[str, Any] = {}
    if given.tiny:
        pipe, call = tiny_diffusers.hunyuan_video()
        options = tiny_diffusers.OPTIONS
    else:
        pipe = diffusers.HunyuanVideo15Pipeline.from_pretrained(
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v", torch_dtype=torch.bfloat16
        )
        pipe.enable_model_cpu_offload()
        pipe.vae.enable_tiling()
        call = {"prompt": given.prompt, "num_frames": 121, "num_inference_steps": 50}

    handle = svg_ear_compile.accelerate(pipe, density=0.2, options=options)
    video = pipe(**call).frames[0]
    if not given.tiny:
        export_to_video(video, given.out, fps=24)
    print(handle.report())


if __name__ == "__main__":
    main()
