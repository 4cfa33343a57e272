"""MiniMax-H3, text to video with sound: one sequence of text, sound and video.

python examples/minimax_h3.py "a red fox in the snow"
python examples/minimax_h3.py --tiny      # random tiny weights on a CPU
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
    parser.add_argument("--out", default="minimax_h3.mp4")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    # Text comes first, then two channels of 40 sound tokens a second: these stay exact.
    options: dict[str, Any] = {"exact_tokens": ":1000"}
    if given.tiny:
        pipe, call = tiny_diffusers.minimax_h3()
        options = tiny_diffusers.OPTIONS | {"exact_tokens": ":423"}
    else:
        manager = diffusers.ComponentsManager()
        manager.enable_auto_cpu_offload(device="cuda")
        pipe = diffusers.ModularPipeline.from_pretrained(
            "MiniMaxAI/MiniMax-H3", components_manager=manager
        )
        pipe.load_components(dtype=torch.bfloat16)
        call = {"prompt": given.prompt, "num_frames": 124, "num_inference_steps": 30}

    handle = svg_ear_compile.accelerate(pipe, density=0.2, options=options)
    made = pipe(**call)
    if not given.tiny:
        export_to_video(made.get("videos")[0], given.out, fps=24)
    print(handle.report())


if __name__ == "__main__":
    main()
