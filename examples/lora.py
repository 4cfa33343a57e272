"""Wan 2.1 with a LoRA, whose strength may change between calls.

python examples/lora.py --lora some/lora.safetensors "a red fox in the snow"
python examples/lora.py --tiny      # random tiny weights and a random LoRA on a CPU
"""

import argparse

import diffusers
import tiny_diffusers
import torch
from diffusers.utils import export_to_video
from peft import LoraConfig

import svg_ear_compile


def main() -> None:
    """Generate a video at half the strength of the LoRA, and say what ran sparse."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a red fox in the snow")
    parser.add_argument("--lora", help="a file, or a repository of the Hugging Face Hub")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    if given.tiny:
        pipe, call = tiny_diffusers.wan()
        options = tiny_diffusers.OPTIONS
        random = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(random, "style")
    else:
        pipe = diffusers.WanPipeline.from_pretrained(
            "Wan-AI/Wan2.1-T2V-14B-Diffusers", torch_dtype=torch.bfloat16
        )
        pipe.load_lora_weights(given.lora, adapter_name="style")
        pipe.to("cuda")
        call = {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 50}
        options = {}

    pipe.transformer.set_adapters("style", 0.5)
    handle = svg_ear_compile.accelerate(pipe, density=0.2, options=options)
    video = pipe(given.prompt, **call).frames[0]
    if not given.tiny:
        export_to_video(video, "lora.mp4", fps=16)
    print(handle.report())


if __name__ == "__main__":
    main()
