"""Models and calls of Wan's shape for `svg-ear tune`.

    svg-ear tune --model benchmarks.tuning.wan:small --density 0.2 --eager --out wan.json
    torchrun --nproc-per-node 8 -m svg_ear_compile.cli tune \\
        --model benchmarks.tuning.wan:full --target-speedup 1.8 --phases 3 --out wan14b-720p.json

The weights are random, since nothing is downloaded here: times are real, errors and so the choices
are not. With trained weights, record the calls of a pipeline instead:

    pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    calls = svg_ear_compile.capture_calls(
        pipe.transformer, lambda: pipe(prompt, num_inference_steps=50),
        keep=lambda index: index in (24, 50, 76),  # two forwards a step under guidance
    )
    return pipe.transformer, calls
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from svg_ear_compile import ModelCall

TIMESTEPS = (900.0, 600.0, 300.0)


def calls(
    frames: int, height: int, width: int, channels: int, text: tuple[int, int], device: str,
    dtype: torch.dtype,
) -> list[ModelCall]:  # fmt: skip
    """One call at each of `TIMESTEPS`; sizes are those of the latents."""
    found = []
    for seed, timestep in enumerate(TIMESTEPS):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        found.append(
            ModelCall(
                (normal(1, channels, frames, height, width),),
                {
                    "timestep": torch.tensor([timestep], device=device),
                    "encoder_hidden_states": normal(1, *text),
                    "return_dict": False,
                },
            )
        )
    return found


def _model(device: str, dtype: torch.dtype, **config: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    with torch.device(device):
        return WanTransformer3DModel(**config).to(dtype).eval().requires_grad_(False)


def small() -> tuple[WanTransformer3DModel, list[ModelCall]]:
    """Two layers, 2,304 tokens, for a CPU."""
    model = _model(
        "cpu", torch.float32, num_layers=2, num_attention_heads=2, attention_head_dim=64,
        in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=256, rope_max_seq_len=64,
    )  # fmt: skip
    return model, calls(9, 32, 32, 4, (7, 16), "cpu", torch.float32)


def full() -> tuple[WanTransformer3DModel, list[ModelCall]]:
    """Wan 2.1 14B at 720p and 81 frames: 75,600 tokens, 40 layers; 28 GB of weights."""
    model = _model("cuda", torch.bfloat16)
    return model, calls(21, 90, 160, 16, (512, 4096), "cuda", torch.bfloat16)


def six_layers() -> tuple[WanTransformer3DModel, list[ModelCall]]:
    """Six layers of Wan 2.1 1.3B at 480p and 81 frames: 32,760 tokens."""
    model = _model(
        "cuda", torch.bfloat16, num_layers=6, num_attention_heads=12, ffn_dim=8960,
    )  # fmt: skip
    return model, calls(21, 60, 104, 16, (512, 4096), "cuda", torch.bfloat16)
