"""`python -m benchmarks.attention --out DIR`: sparse attention against the fastest dense attention.

Every sparse result passes the gate (sampled rows against the float64 definition) before it is
timed. Prints a table and writes every raw sample as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.data import video_like
from benchmarks.attention.gate import definition_rows, relative_error
from svg_ear_compile.kernels.gpu.attention import sparse_attention
from svg_ear_compile.kernels.plan import AttentionPlan

# name: (B, H, video tokens, text tokens, D)
SHAPES = {
    "wan14b-720p": (1, 40, 75600, 0, 128),
    "hunyuan-720p": (1, 24, 118800, 256, 128),
    "wan1.3b-480p": (1, 12, 32760, 0, 128),
    "cogvideox-5b": (2, 48, 17550, 226, 64),
    **{f"sweep-{n // 1000}k": (1, 24, n, 0, 128) for n in (8192, 16384, 65536, 131072, 300000)},
}
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "default": None,
}


def time_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls by device events, after two warm-up calls."""
    call()
    call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def stage_ms(call: Callable[[], object]) -> dict[str, float]:
    """Device milliseconds of one call by kernel name, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        if event.self_device_time_total > 0:
            name = event.key if event.key.endswith("_kernel") else event.key[:60]
            found[name] = found.get(name, 0.0) + event.self_device_time_total / 1000
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def dense_baselines(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> dict[str, list[float]]:
    """Raw milliseconds of every dense backend that takes these inputs."""
    samples = {}
    for name, backend in DENSE.items():

        def call(backend: SDPBackend | None = backend) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        samples[name] = time_ms(call, repeats)
    return samples


def measure_shape(
    name: str, densities: list[float], forms: list[str], clusters: list[str], repeats: int
) -> list[dict[str, object]]:
    """Rows of one shape: dense baselines once, then every plan, gate first."""
    batch, heads, tokens, text_tokens, dim = SHAPES[name]
    q, k, v = video_like(batch, heads, tokens, dim, text=text_tokens)
    text = (0, text_tokens)
    dense = dense_baselines(q, k, v, repeats)
    best = min(dense, key=lambda n: statistics.median(dense[n]))
    dense_ms = statistics.median(dense[best])
    dense_out = F.scaled_dot_product_attention(q, k, v)
    flop = 4.0 * batch * heads * (tokens + text_tokens) ** 2 * dim
    held = 4 * q.numel() * q.element_size()
    print(
        f"{name}: dense {best} {dense_ms:.2f} ms = {flop / dense_ms / 1e9:.0f} TFLOP/s", flush=True
    )
    sampled = torch.randint(
        0, tokens + text_tokens, (48,), generator=torch.Generator().manual_seed(1)
    )
    rows = []
    for count in clusters:
        fixed = {} if count == "default" else dict(
            zip(("q_clusters", "k_clusters"), map(int, count.split("/")), strict=True)
        )  # fmt: skip
        for form in forms:
            for density in densities:
                plan = AttentionPlan(density=density, compensation=form, **fixed)  # type: ignore[arg-type]
                cold = sparse_attention(q, k, v, plan, text=text)
                warm = (cold.queries.centroids, cold.keys.centroids)

                def call(plan: AttentionPlan = plan, warm: tuple[Tensor, Tensor] = warm) -> object:
                    return sparse_attention(q, k, v, plan, text=text, centroids=warm)

                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                result = sparse_attention(q, k, v, plan, text=text, centroids=warm)
                torch.cuda.synchronize()
                # The output is one of the four tensors, not extra.
                extra = torch.cuda.max_memory_allocated() - before - held // 4
                head = (0, heads - 1)
                want = definition_rows(q, k, v, result, plan, text, head, sampled)
                gate = relative_error(result.out[head][sampled], want)
                row: dict[str, object] = {
                    "shape": name, "clusters": count, "form": form, "density": density,
                    "gate": gate, "dense_backend": best, "dense_samples_ms": dense,
                    "dense_tflops": flop / dense_ms / 1e9,
                }  # fmt: skip
                rows.append(row)
                if not gate < 1e-2:
                    print(f"  {count} {form} {density}: GATE FAILED, error {gate:.2e}", flush=True)
                    continue
                samples = time_ms(call, repeats)
                cold_ms = time_ms(lambda plan=plan: sparse_attention(q, k, v, plan, text=text), 2)
                stages = stage_ms(call)
                ms = statistics.median(samples)
                attend_ms = stages.get("attend_kernel", float("nan"))
                reached = float(result.exact_pairs) / (batch * heads * tokens**2)
                exact_area = float(result.exact_pairs) / (batch * heads) + text_tokens * (
                    2 * tokens + text_tokens
                )
                useful = exact_area * 4.0 * batch * heads * dim / attend_ms / 1e9
                error = relative_error(result.out[:, :4], dense_out[:, :4])
                row |= {
                    "samples_ms": samples, "cold_ms": cold_ms, "stages_ms": stages, "error": error,
                    "density_reached": reached, "extra_memory": extra / held,
                    "useful_tflops": useful, "speedup": dense_ms / ms,
                    "attend_over_dense_rate": useful / (flop / dense_ms / 1e9),
                    "rest_share": (sum(stages.values()) - attend_ms) / dense_ms,
                    "q_sizes": [float(x) for x in torch.std_mean(result.queries.sizes.float())],
                    "k_sizes": [float(x) for x in torch.std_mean(result.keys.sizes.float())],
                }  # fmt: skip
                print(
                    f"  {count:9s} {form:11s} d={density:.2f} ({reached:.3f}) op {ms:7.2f} ms "
                    f"{dense_ms / ms:5.2f}x attend {attend_ms:7.2f} ms {useful:4.0f} TF/s "
                    f"({row['attend_over_dense_rate']:.2f}) rest {row['rest_share']:6.1%} "
                    f"cold {statistics.median(cold_ms):7.2f} err {error:.3f} gate {gate:.1e} "
                    f"mem {extra / held:.2f}",
                    flush=True,
                )
                print("     " + ", ".join(f"{n} {t:.2f}" for n, t in list(stages.items())[:9]))
    return rows


def main() -> None:
    """Parse the command line, measure, write `attention.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="wan14b-720p,hunyuan-720p,wan1.3b-480p,cogvideox-5b")
    parser.add_argument("--densities", default="0.1,0.2")
    parser.add_argument("--forms", default="centroid,first_order")
    parser.add_argument("--clusters", default="300/1000,default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.time()
    rows = []
    for shape in args.shapes.split(","):
        densities = [float(d) for d in args.densities.split(",")]
        rows += measure_shape(
            shape, densities, args.forms.split(","), args.clusters.split(","), args.repeats
        )
        torch.cuda.empty_cache()
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda,
        "commit": described.stdout.strip(), "seconds": time.time() - start, "rows": rows,
    }  # fmt: skip
    (args.out / "attention.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
