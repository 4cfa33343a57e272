"""What the priors of GPUs expect: tables for the documentation. None of it is a measurement.

The times of the H200 are predicted from its recorded profile.
"""

from __future__ import annotations

from dataclasses import replace

from svg_ear_compile.cost_model import device_profile
from svg_ear_compile.cost_model.calibration import Calibration, Efficiency
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.hardware import Hardware, rated
from svg_ear_compile.cost_model.latency import break_even_tokens, dense_ms, sparse_ms
from svg_ear_compile.cost_model.prior import H200, PORTABLE_ATTEND, prior
from svg_ear_compile.cost_model.stages import AttentionShape, dense_amount, sparse_amounts
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
        known, sheet = prior_of(gpu), rated(GPUS[gpu])
        assert sheet is not None
        lines.append(
            f"| {gpu} | {sheet.matrix:.0f} | {sheet.bandwidth:.0f} | "
            f"{known.uncertainty:.0%} | {_from(known)} |"
        )
    return "\n".join(lines)


def _from(known: Calibration) -> str:
    """Fewest tokens for 40 and for 12 heads, in thousands."""
    least = [break_even_tokens(video(1, heads), AttentionPlan(), known) for heads in (12, 40)]
    if None in least:
        return "never"
    most, fewest = (f"{(tokens or 0) / 1000:.0f}" for tokens in least)
    return f"{fewest},000 to {most},000 tokens"


_LONG = (1 << 17, 1 << 20)
"""Tokens of the long sequences whose stages are listed."""


def h200() -> Calibration:
    """The recorded profile of the H200."""
    return device_profile.load(Device("cuda", "NVIDIA H200", "", "", "", "sm_90"))


def with_own_kernel(gpu: str) -> Calibration:
    """The prior of a GPU if its attend stage kept to its roofs as well as the H200's does."""
    known, record = prior_of(gpu), h200()
    there = prior(record.device, H200)
    stages = {
        name: {
            **found,
            "attend": Efficiency(
                there.stages[name]["attend"].flops,
                found["attend"].bytes / PORTABLE_ATTEND,
                found["attend"].launches,
            ),
        }
        for name, found in known.stages.items()
    }
    # The tiles of that kernel are taken to be those of Hopper.
    device = replace(known.device, architecture=record.device.architecture)
    return replace(known, device=device, stages=stages)


def long_sequences_table() -> str:
    """Work and expected milliseconds of every stage of a long call: 24 heads, density 0.2."""
    profiles = [h200(), prior_of("B200"), with_own_kernel("B200"), prior_of("MI300X")]
    lines = [
        "| tokens | stage | TFLOP | GB | H200 | B200 | B200, a kernel of its own | MI300X |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plan = AttentionPlan()
    for tokens in _LONG:
        shape = video(tokens, 24)
        amounts = {"dense": dense_amount(shape), **sparse_amounts(shape, plan, profiles[0].device)}
        times = [
            {"dense": dense_ms(shape, known), **sparse_ms(shape, plan, known).stages}
            for known in profiles
        ]
        for stage, amount in amounts.items():
            work = f"{amount.flops / 1e12:,.1f} | {amount.bytes / 1e9:,.0f}"
            taken = " | ".join(f"{each[stage]:,.0f}" for each in times)
            lines.append(f"| {tokens:,} | {stage} | {work} | {taken} |")
        whole = [f"{t.pop('dense') / sum(t.values()):.1f}x" for t in times]
        lines.append(f"| {tokens:,} | **dense over sparse** | | | " + " | ".join(whole) + " |")
    return "\n".join(lines)


def long_lists_table() -> str:
    """Bytes of the tables between the stages, of one head at density 0.2."""
    lines = [
        "| tokens | clusters of queries × keys | scores of a head | key list of a head |",
        "|---|---|---|---|",
    ]
    plan = AttentionPlan()
    for tokens in (1 << 17, 1 << 18, 1 << 19, 1 << 20):
        q_clusters, k_clusters = plan.clusters(tokens, tokens)
        scores = 3 * 4 * q_clusters * k_clusters
        listed = 4 * q_clusters * plan.density * tokens
        lines.append(
            f"| {tokens:,} | {q_clusters:,} × {k_clusters:,} | {scores / 1e9:.2f} GB | "
            f"{listed / 1e9:.2f} GB |"
        )
    return "\n".join(lines)
