"""`python -m benchmarks.attention.launches`: launches and host time of one call, without a graph.

For each shape: a cold call, one that recomputes clusters from those of the call before, one that
reuses clusters and block mask, and the replay of a captured graph of the second. Host time is that
of the call on an idle GPU, without a wait; beside it stands the time of the device. Prints every
kernel of the recomputed call with its number of launches and its microseconds. Needs a GPU.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.attention.inputs import inputs_of
from benchmarks.provenance import provenance, where
from svg_ear_compile.cost_model.timing import busy_ms
from svg_ear_compile.kernels.gpu.captured_graphs import is_worth_while
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import captured_attention, sparse_attention

DEFAULT_SHAPES = "sweep-8k,sweep-16k,wan1.3b-480p,wan14b-720p"
_REPEATS = 30
_SHOWN = ("cold", "recomputed", "reused")
_PRINTED = re.compile(
    r"(?P<shape>\S+) (?P<call>\w+): (?P<launches>\d+) launches, host (?P<host>\d+) us, "
    r"kernels (?P<kernels>[\d.]+) ms, calls back to back (?P<calls>[\d.]+) ms"
)


def device_kernels(call: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kernel, copy and fill that one call runs on the device."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {
        event.key: (event.count, event.self_device_time_total)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


def host_us(call: Callable[[], object]) -> float:
    """Median microseconds that the host needs to issue a call to an idle device."""
    samples = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    return statistics.median(samples)


def lines_of(shape: str) -> Iterable[str]:
    """What is printed for one shape."""
    inputs = inputs_of(shape, "cuda", torch.bfloat16)
    q, k, v = inputs.q, inputs.k, inputs.v
    kinds, plan = exact_at_ends(q, k, 0, inputs.text), AttentionPlan()
    cold = sparse_attention(q, k, v, plan, kinds=kinds)
    warm = (cold.queries.centroids, cold.keys.centroids)
    captured = captured_attention(q.device)
    calls: dict[str, Callable[[], object]] = {
        "cold": lambda: sparse_attention(q, k, v, plan, kinds=kinds),
        "recomputed": lambda: sparse_attention(q, k, v, plan, kinds=kinds, centroids=warm),
        "reused": lambda: sparse_attention(
            q, k, v, plan, kinds=kinds, centroids=warm, blocks=cold.blocks
        ),
    }
    if is_worth_while(q):
        calls["captured"] = lambda: captured(q, k, v, plan, kinds=kinds, centroids=warm)
    for name, call in calls.items():
        for _ in range(3):
            call()
        found = device_kernels(call)
        launches = sum(count for count, _ in found.values())
        busy = sum(us for _, us in found.values()) / 1e3
        yield (
            f"{shape} {name}: {launches} launches, host {host_us(call):.0f} us, "
            f"kernels {busy:.3f} ms, calls back to back "
            f"{statistics.median(busy_ms(call, 5)):.3f} ms"
        )
        if name == "recomputed":
            slowest_first = sorted(found.items(), key=lambda item: -item[1][1])
            yield from (
                f"{us:10.1f} us {count:3d} x {key[:70]}" for key, (count, us) in slowest_first
            )


def table(printed: str) -> str:
    """What `main` printed, without single kernels, as Markdown; its first line says where."""
    said, *lines = printed.splitlines()
    rows = [
        "| shape | call | launches | host, ms | kernels, ms | calls back to back, ms |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        found = _PRINTED.match(line)
        if found is not None and found["call"] in _SHOWN:
            host = float(found["host"]) / 1e3
            cells = [*found.group("shape", "call", "launches"), f"{host:.1f}"]
            rows.append(f"| {' | '.join([*cells, *found.group('kernels', 'calls')])} |")
    return "\n".join([f"{said.partition(', commit')[0]}; default plan, density 0.2.", "", *rows])


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("launches are counted on a GPU; on a CPU tests/kernels/test_launches.py does")
    made = provenance()
    print(f"{where([made])}, commit {made['commit']}: python -m benchmarks.attention.launches")
    for shape in given.shapes.split(","):
        for line in lines_of(shape):
            print(line, flush=True)


if __name__ == "__main__":
    main()
