"""Dense and sparse clips of Wan 2.1 side by side, on a page that needs no network.

python examples/compare.py --out compared      # then open compared/index.html
python examples/compare.py --tiny --out compared
"""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import tiny_diffusers
import torch

import svg_ear_compile


def wan() -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of every call."""
    pipe = diffusers.WanPipeline.from_pretrained(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16
    )
    return pipe.to("cuda"), {"num_frames": 81, "num_inference_steps": 50}


def main() -> None:
    """Generate clips under every setting, and say which one is recommended."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()

    make, options = (tiny_diffusers.wan, tiny_diffusers.OPTIONS) if given.tiny else (wan, {})
    found = svg_ear_compile.compare(
        make,
        given.prompt or ["a red fox in the snow"],
        given.out,
        settings=[{"density": density, **options} for density in (0.1, 0.2, 0.3)],
        seeds=1 if given.tiny else 3,
        on_progress=lambda what, done, total: print(f"{done} of {total}: {what}"),
    )
    print(found.recommended.why)
    print(found.page)


if __name__ == "__main__":
    main()
