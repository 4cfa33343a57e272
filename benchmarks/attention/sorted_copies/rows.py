"""One row of the table: the gate first, then the times."""

from __future__ import annotations

import math
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.gate import relative_error
from benchmarks.attention.sorted_copies.bench import Bench, Present
from benchmarks.attention.sorted_copies.pages import PageCopies, Scales, scales_of
from benchmarks.attention.sorted_copies.variants import DIM, VARIANTS, Variant
from svg_ear_compile.cost_model.timing import busy_ms
from svg_ear_compile.kernels.gpu.attention import query_tiles

# Largest relative difference from the present kernel on the same rounded inputs: what differs is
# the order of sums, and with e4m3 values the rounding of weights, 2**-4 at most, 0.02 on average.
GATES = {False: 8e-3, True: 5e-2}

_SAMPLE_MS = 40


class ClockLog:
    """Clock in MHz of the GPU's multiprocessors over time, read by `nvidia-smi` beside the run."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        asked = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        self.reader = subprocess.Popen(
            [*asked, "-lms", str(_SAMPLE_MS)], stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.reader.stdout is not None
        for line in self.reader.stdout:
            if line.strip().isdigit():
                self.samples.append((time.monotonic(), float(line)))

    def close(self) -> None:
        """End the reading process."""
        self.reader.kill()

    def since(self, began: float) -> float | None:
        """Median clock since a `time.monotonic`, its first fifth of a second left out."""
        found = [mhz for at, mhz in list(self.samples) if at > began + 0.2]
        return statistics.median(found) if found else None


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of calls back to back on a busy GPU."""
    return statistics.median(busy_ms(call, repeats))


def measure(
    bench: Bench, name: str, repeats: int, dense_ms: float, dense_out: Tensor, clocks: ClockLog
) -> dict[str, Any]:
    """A row of the table; "present" is the kernel as it is."""
    variant = VARIANTS.get(name)
    routed = bench.routed(variant)
    tokens = bench.q.shape[2]
    correction = bench.correction(routed)
    weight = torch.empty_like(correction)
    dense_flop = 4.0 * bench.q.shape[1] * tokens**2 * DIM
    row: dict[str, Any] = {"name": name, "density": bench.plan.density}
    present_tiles = query_tiles(routed.q_sorted, tokens, 192)
    scales = scales_of(bench.k, bench.v, variant)
    present = Present(bench, routed, variant, scales)
    present.make_lists()
    want = present.attend(present_tiles, correction, weight)
    if variant is None:
        row["error"] = relative_error(want, dense_out)
        row["lists_ms"] = median_ms(present.make_lists, repeats)

        def call() -> Tensor:
            return present.attend(present_tiles, correction, weight)
    else:
        row |= asdict(variant)
        want_weight = weight.clone()
        tiles = query_tiles(routed.q_sorted, tokens, 64 * variant.consumers)
        copies = PageCopies(bench.q, bench.k, bench.v, routed, variant)
        copies.make(scales)
        copies.make_lists()
        row["empty_places"] = copies.empty_share()

        def call() -> Tensor:
            return copies.attend(scales, tiles, correction, weight, bench.scale)

        weight.fill_(math.nan)
        got = call().clone()
        if variant.copied:
            row["gate"] = relative_error(got, want)
            row["weight_gate"] = relative_error(weight, want_weight)
            row["error"] = relative_error(got, dense_out)
            row["same_twice"] = bool(torch.equal(got, call()))
            if not (row["gate"] < GATES[variant.v8] and row["same_twice"]):
                return row  # no time for a wrong result
        row |= prepass_ms(copies, scales, variant, repeats)
    began = time.monotonic()
    row["attend_ms"] = median_ms(call, repeats)
    row["sm_mhz"] = clocks.since(began)
    row["together_ms"] = sum(row[part] for part in row if part.endswith("_ms"))
    useful = 4.0 * bench.pairs(routed) * DIM / row["attend_ms"]
    row["useful_tflops"] = useful / 1e9
    row["over_dense_rate"] = useful / (dense_flop / dense_ms)
    return row


def prepass_ms(
    copies: PageCopies, scales: Scales, variant: Variant, repeats: int
) -> dict[str, float]:
    """Milliseconds of what has to run before the attend stage."""
    found = {
        "lists_ms": median_ms(copies.make_lists, repeats),
        "copies_ms": median_ms(lambda: copies.make(scales), repeats),
    }
    if variant.k8:
        found["scales_ms"] = median_ms(lambda: scales_of(copies.k, copies.v, variant), repeats)
    return found


def said(row: dict[str, Any]) -> str:
    """A row as one line."""
    if "density" not in row:
        return f"{row['name']:22s} {row['dense_ms']:.2f} ms, {row['dense_tflops']:.0f} TF/s"
    text = f"{row['name']:22s} d={row['density']:.2f} "
    if "failed" in row:
        return text + "FAILED: " + row["failed"]
    if "gate" in row:
        text += f"gate {row['gate']:.1e} weights {row['weight_gate']:.1e} "
    if "attend_ms" not in row:
        return text + f"WRONG (same twice: {row['same_twice']})"
    text += f"attend {row['attend_ms']:6.2f} ms at {row['sm_mhz']} MHz, "
    text += f"useful {row['useful_tflops']:4.0f} TF/s = {row['over_dense_rate']:.3f} of dense, "
    if "empty_places" in row:
        text += f"empty {row['empty_places']:.1%}, "
        text += f"work {row['useful_tflops'] / (1 - row['empty_places']):.0f} TF/s, "
    times = [f"{part[:-3]} {row[part]:.2f}" for part in row if part.endswith("_ms")]
    return text + " ".join(times) + (f", error {row['error']:.4f}" if "error" in row else "")
