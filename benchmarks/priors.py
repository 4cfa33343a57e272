"""What the priors of GPUs expect: tables for the documentation. None of it is a measurement."""

from __future__ import annotations

from svg_ear_compile.cost_model.calibration import Calibration
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.hardware import Hardware
from svg_ear_compile.cost_model.latency import break_even_tokens
from svg_ear_compile.cost_model.prior import prior
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.kernels.plan import AttentionPlan

GPUS = {
    "H100 SXM": Hardware("NVIDIA H100 80GB HBM3", "sm_90", 132, 1980_000, 2619_000, 5120),
    "H100 PCIe": Hardware("NVIDIA H100 PCIe", "sm_90", 114, 1755_000, 1593_000, 5120),
    "A100 40 GB": Hardware("NVIDIA A100-SXM4-40GB", "sm_80", 108, 1410_000, 1215_000, 5120),
    "A100 80 GB": Hardware("NVIDIA A100-SXM4-80GB", "sm_80", 108, 1410_000, 1593_000, 5120),
    "RTX 3090": Hardware("NVIDIA GeForce RTX 3090", "sm_86", 82, 1695_000, 9751_000, 384),
    "RTX 4090": Hardware("NVIDIA GeForce RTX 4090", "sm_89", 128, 2520_000, 10501_000, 384),
    "L40S": Hardware("NVIDIA L40S", "sm_89", 142, 2520_000, 9001_000, 384),
    "RTX 5090": Hardware("NVIDIA GeForce RTX 5090", "sm_120", 170, 2407_000, 14001_000, 512),
    "B200": Hardware("NVIDIA B200", "sm_100", 148, 1965_000, 3996_000, 8192),
    "B300": Hardware("NVIDIA B300", "sm_103", 148, 1965_000, 3996_000, 8192),
    "MI300X": Hardware("AMD Instinct MI300X", "gfx942", 304, 2100_000, 1300_000, 8192),
}
"""What the drivers of GPUs say of them."""


def prior_of(gpu: str) -> Calibration:
    """The prior of one of `GPUS`."""
    said = GPUS[gpu]
    return prior(Device("cuda", said.name, "", "", "", said.architecture), said)


def video(tokens: int, heads: int) -> AttentionShape:
    """Self-attention of a video: heads of 128 channels in bfloat16."""
    return AttentionShape(1, heads, heads, tokens, tokens, 128, "bfloat16")


def gpus_table() -> str:
    """From how many tokens on a video goes sparse by the prior of each GPU."""
    lines = [
        "| GPU | matrix products, TFLOP/s | memory, GB/s | uncertainty | sparse from |",
        "|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        known = prior_of(gpu)
        lines.append(
            f"| {gpu} | {known.roofs.flops['bfloat16']:.0f} | {known.roofs.bandwidth:.0f} | "
            f"{known.uncertainty:.0%} | {_from(known)} |"
        )
    return "\n".join(lines)


def _from(known: Calibration) -> str:
    """Fewest tokens for 12 and for 40 heads, in thousands."""
    least = [break_even_tokens(video(1, heads), AttentionPlan(), known) for heads in (12, 40)]
    if None in least:
        return "never"
    most, fewest = (f"{(tokens or 0) / 1000:.0f}" for tokens in least)
    return f"{most},000 to {fewest},000 tokens"
