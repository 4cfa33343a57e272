"""Wan 2.1 on several GPUs by Ulysses: every GPU has all tokens and a part of the heads.

torchrun --nproc-per-node 2 examples/ulysses.py "a red fox in the snow"
torchrun --nproc-per-node 2 examples/ulysses.py --tiny      # two processes on a CPU
"""

import argparse

import diffusers
import tiny_diffusers
import torch
import torch.distributed as dist
from diffusers.utils import export_to_video

import svg_ear_compile


def main() -> None:
    """Generate a video on all processes; the first one writes it and says what ran sparse."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a red fox in the snow")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    dist.init_process_group("gloo" if given.tiny else "nccl")
    rank = dist.get_rank()
    if given.tiny:
        torch.accelerator.device_count = lambda: 1  # diffusers counts GPUs, and a CPU is none
        pipe, call = tiny_diffusers.wan()
        options = tiny_diffusers.OPTIONS
    else:
        torch.cuda.set_device(rank)
        pipe = diffusers.WanPipeline.from_pretrained(
            "Wan-AI/Wan2.1-T2V-14B-Diffusers", torch_dtype=torch.bfloat16
        )
        pipe.to("cuda")
        call = {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 50}
        options = {}

    parallel = diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size())
    pipe.transformer.enable_parallelism(config=parallel)
    handle = svg_ear_compile.accelerate(pipe, density=0.2, options=options)
    # Every process has to start from the same noise.
    noise = torch.Generator("cpu").manual_seed(0)
    video = pipe(given.prompt, generator=noise, **call).frames[0]
    if rank == 0:
        if not given.tiny:
            export_to_video(video, "ulysses.mp4", fps=16)
        print(handle.report())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
