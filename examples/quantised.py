"""Wan 2.1 with linear layers in 8 bits by torchao: quantise first, accelerate last.

pip install torchao
python examples/quantised.py "a red fox in the snow"
python examples/quantised.py --tiny      # random tiny weights on a CPU
"""

import argparse

import diffusers
import tiny_diffusers
import torch
from diffusers.utils import export_to_video
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import svg_ear_compile


def main() -> None:
    """Generate a video, and say what ran sparse."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a red fox in the snow")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    if given.tiny:
        pipe, call = tiny_diffusers.wan()
        options = tiny_diffusers.OPTIONS
    else:
        pipe = diffusers.WanPipeline.from_pretrained(
            "Wan-AI/Wan2.1-T2V-14B-Diffusers", torch_dtype=torch.bfloat16
        )
        call = {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 50}
        options = {}

    quantize_(pipe.transformer.blocks, Int8WeightOnlyConfig())
    if not given.tiny:
        pipe.to("cuda")
    handle = svg_ear_compile.accelerate(pipe, density=0.2, options=options)
    video = pipe(given.prompt, **call).frames[0]
    if not given.tiny:
        export_to_video(video, "quantised.mp4", fps=16)
    print(handle.report())


if __name__ == "__main__":
    main()
