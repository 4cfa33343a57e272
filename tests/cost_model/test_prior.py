"""Priors: roofs against datasheets, decisions at the lengths of videos, what is not known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.priors import GPUS, prior_of, video
from svg_ear_compile.cost_model import device_profile, hardware
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.hardware import Hardware, hardware_of, rated
from svg_ear_compile.cost_model.latency import break_even_tokens, dense_ms, pays, sparse_ms
from svg_ear_compile.cost_model.prior import H200, prior
from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.kernels.plan import AttentionPlan

# TFLOP/s of dense 16-bit products with float32 sums, of float32, and GB/s.
DATASHEETS = {
    "H100 SXM": (989.4, 66.9, 3352),
    "H100 PCIe": (756, 51.2, 2039),
    "A100 40 GB": (312, 19.5, 1555),
    "A100 80 GB": (312, 19.5, 2039),
    "RTX 3090": (71, 35.6, 936),
    "RTX 4090": (165.2, 82.6, 1008),
    "L40S": (362, 91.6, 864),
    "RTX 5090": (209.5, 104.8, 1792),
    "B200": (2250, 75, 8000),
    "B300": (2250, 75, 8000),
    "MI300X": (1307.4, 163.4, 5300),
}
# Fewest heads of 128 with which a video of 8k, 16k, 32k and 75k tokens goes sparse; "-" never.
SPARSE = {
    "H100 SXM": "- 24 12 12",
    "H100 PCIe": "- 12 12 12",
    "A100 40 GB": "- - 12 12",
    "A100 80 GB": "- 40 12 12",
    "RTX 3090": "12 12 12 12",
    "RTX 4090": "- 12 12 12",
    "L40S": "- - 12 12",
    "RTX 5090": "40 12 12 12",
    "B200": "- - - -",
    "B300": "- - - -",
    "MI300X": "- - - -",
}


@pytest.mark.parametrize("gpu", GPUS)
def test_the_roofs_are_those_of_the_datasheet(gpu: str) -> None:
    matrix, single, bandwidth = DATASHEETS[gpu]
    found, roofs = rated(GPUS[gpu]), prior_of(gpu).roofs
    assert found is not None
    assert found.matrix == pytest.approx(matrix, rel=0.02)
    # Datasheets give float32 at the highest clock, which no GPU holds.
    assert found.single == pytest.approx(single, rel=0.08)
    assert found.bandwidth == pytest.approx(bandwidth, rel=0.03)
    # What large products and copies reach is less, as on the H200.
    assert 0.6 * found.matrix < roofs.flops["bfloat16"] == roofs.flops["float16"] <= found.matrix
    assert roofs.flops["float32"] < found.single
    assert 0.8 * found.bandwidth < roofs.bandwidth < found.bandwidth


@pytest.mark.parametrize("gpu", GPUS)
def test_a_video_goes_sparse_where_the_prior_less_its_uncertainty_says_that_it_pays(
    gpu: str,
) -> None:
    known, plan = prior_of(gpu), AttentionPlan()
    for tokens, fewest in zip((8192, 16384, 32760, 75600), SPARSE[gpu].split(), strict=True):
        found = [heads for heads in (12, 24, 40) if pays(video(tokens, heads), plan, known)]
        assert found == [h for h in (12, 24, 40) if fewest != "-" and h >= int(fewest)], tokens


def test_uncertainty_counts_against_a_sparse_call() -> None:
    known, shape, plan = prior_of("RTX 4090"), video(10240, 12), AttentionPlan()
    dense, sparse = dense_ms(shape, known), sparse_ms(shape, plan, known, "cold").total
    margin = dense / sparse - 1.0
    assert 0.0 < margin < 0.5
    assert not pays(shape, plan, known)
    assert pays(shape, plan, replace(known, uncertainty=margin - 0.01))
    assert not pays(shape, plan, replace(known, uncertainty=margin + 0.01))


def test_the_prior_of_the_measured_gpu_repeats_its_record() -> None:
    device = Device("cuda", H200.name, "", "", "", H200.architecture)
    record, guessed = device_profile.load(device), prior(device, H200)
    assert (record.origin, record.uncertainty) == ("recorded", 0.15)
    assert guessed.roofs.bandwidth == pytest.approx(record.roofs.bandwidth)
    for dtype in ("bfloat16", "float32"):
        assert guessed.roofs.flops[dtype] == pytest.approx(record.roofs.flops[dtype])
    for dim in (64, 128):
        shape = replace(video(32760, 12), head_dim=dim)
        assert dense_ms(shape, guessed) == pytest.approx(dense_ms(shape, record))
        for start in ("cold", "warm", "reused"):
            times = [sparse_ms(shape, AttentionPlan(), p, start) for p in (record, guessed)]
            assert times[0].stages == pytest.approx(times[1].stages)


@pytest.mark.parametrize(
    "said",
    [
        None,
        Hardware("Quadro GV100", "sm_70", 80, 1627_000, 848_000, 4096),
        Hardware("AMD Radeon RX 7900 XTX", "gfx1100", 48, 2500_000, 1249_000, 384),
        Hardware("NVIDIA A100 without clocks", "sm_80", 108, 0, 0, 5120),
    ],
)
def test_nothing_pays_on_a_gpu_of_which_nothing_is_known(said: Hardware | None) -> None:
    known = prior(Device("cuda", "New", "2.13.0", "", "", said.architecture if said else ""), said)
    assert known.uncertainty is None
    assert break_even_tokens(video(32760, 12), AttentionPlan(density=0.05), known) is None
    name = said.architecture if said else "such a GPU"
    assert known.basis == f"unknown: nothing was measured on {name}"


def test_a_prior_names_its_architecture_and_its_uncertainty() -> None:
    assert prior_of("H100 PCIe").basis == "prior for sm_90, not calibrated, uncertain by 20%"
    assert prior_of("RTX 5090").basis == "prior for sm_120, not calibrated, uncertain by 50%"
    assert prior_of("MI300X").basis == "prior for gfx942, not calibrated, uncertain by 100%"


def test_the_prior_of_a_cpu_is_late_rather_than_early() -> None:
    known = prior(Device("cpu", "never seen", "2.13.0", "", ""))
    shape = AttentionShape(1, 24, 24, 1, 1, 128, "float32")
    tokens = break_even_tokens(shape, AttentionPlan(), known)
    assert tokens is not None
    assert 6_000 <= tokens <= 15_000
    assert known.basis == "prior, not calibrated, uncertain by 50%"


def test_the_facts_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(
        name="NVIDIA A100-SXM4-40GB", multi_processor_count=108, clock_rate=1410_000,
        memory_clock_rate=1215_000, memory_bus_width=5120,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    monkeypatch.setattr(hardware, "architecture", lambda device: "sm_80")
    assert hardware_of(torch.device("cuda")) == GPUS["A100 40 GB"]
    del said.memory_clock_rate
    silent = hardware_of(torch.device("cuda"))
    assert silent is not None
    assert rated(silent) is None
    assert hardware_of(torch.device("cpu")) is None
