"""`python -m benchmarks.attention.cache --out DIR`: one chunk of new tokens against longer caches.

A call attends from the tokens of a chunk to those of all chunks so far. Timed are dense attention,
sparse attention that clusters all keys anew, and sparse attention that keeps the clusters of cached
keys: in the first denoising step of a chunk, in a later one, in one that labels all keys because
their labels are stale, and in one that reuses the block mask. Every sparse result passes the gate
before it is timed. ``--tiny`` uses short caches on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.attention.data import video_like
from benchmarks.attention.gate import definition_rows, passes, relative_error
from benchmarks.attention.inputs import Inputs
from benchmarks.attention.measure import dense_baselines, stage_ms, time_ms
from benchmarks.provenance import provenance, where
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.kept_clusters import CachedKeys, KeptClusters
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import sparse_attention

HEADS, HEAD_DIM, CHUNK = 40, 128, 4680  # three latent frames of Wan 14B at 480p
CHUNKS = (1, 2, 4, 8, 16, 24, 32)  # that are attended to; 32 are 149,760 keys
TINY = (2, 32, 192, (1, 3))  # heads, head dim, chunk and chunks
Sizes = tuple[int, int, int, tuple[int, ...]]
MODES = ("anew", "first step", "later step", "all labelled", "reused")
_SAMPLED_ROWS = 48


def kept_of(result: Result) -> KeptClusters:
    """The clusters of a result as a session remembers them."""
    assert result.identities is not None
    centroids = result.keys.centroids.to(result.out.dtype)
    return KeptClusters(result.identities, result.keys.labels.to(torch.int16), centroids)


def sparse_calls(inputs: Inputs, plan: AttentionPlan) -> dict[str, Callable[[], Result]]:
    """A sparse call for each of `MODES` that a cache of this length has; k ends with the chunk."""
    q, k, v = inputs.q, inputs.k, inputs.v
    chunk = q.shape[2]

    def anew() -> Result:
        return sparse_attention(q, k, v, plan, cache=CachedKeys(None, chunk, True, 0))

    before = k.shape[2] - chunk
    first = anew
    calls: dict[str, Callable[[], Result]] = {"anew": anew}
    if before:
        cold = CachedKeys(None, chunk, True, 0)
        cached = sparse_attention(q, k[:, :, :before], v[:, :, :before], plan, cache=cold)
        growing = CachedKeys(kept_of(cached), chunk, True, 1)
        first = calls["first step"] = lambda: sparse_attention(q, k, v, plan, cache=growing)
    now = first()
    centroids = (now.queries.centroids, now.keys.centroids)
    staying = CachedKeys(kept_of(now), chunk, False, 2)
    calls["later step"] = lambda: sparse_attention(
        q, k, v, plan, centroids=centroids, cache=staying
    )
    stale = dataclasses.replace(staying, labels_all=True)
    calls["all labelled"] = lambda: sparse_attention(
        q, k, v, plan, centroids=centroids, cache=stale
    )
    again = calls["later step"]()
    of_again = (again.queries.centroids, again.keys.centroids)
    calls["reused"] = lambda: sparse_attention(
        q,
        k,
        v,
        plan,
        centroids=of_again,
        blocks=again.blocks,
        cache=CachedKeys(None, chunk, False, 3),
    )
    return calls


def rows_of(
    inputs: Inputs, plan: AttentionPlan, repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for dense attention and one for each sparse mode, at one length of the cache."""
    q, k, v = inputs.q, inputs.k, inputs.v
    keys, on_gpu = k.shape[2], q.is_cuda
    dense = dense_baselines(inputs, repeats)
    best = min(dense, key=lambda name: statistics.median(dense[name]))
    dense_ms = statistics.median(dense[best])
    rows: list[dict[str, Any]] = [
        {"keys": keys, "mode": "dense", "backend": best, "samples_ms": dense[best]}
    ]
    say(f"{keys:>7,} keys: dense {best} {dense_ms:.2f} ms")
    wanted = F.scaled_dot_product_attention(q, k, v)
    sampled = torch.randint(
        q.shape[2], (_SAMPLED_ROWS,), generator=torch.Generator().manual_seed(1)
    )
    head = (0, q.shape[1] - 1)
    for mode, call in sparse_calls(inputs, plan).items():
        result = call()
        error = relative_error(result.out, wanted)
        defined = definition_rows(q, k, v, result, plan, head, sampled)
        gate = relative_error(result.out[head][sampled], defined)
        row: dict[str, Any] = {"keys": keys, "mode": mode, "gate": gate, "error": error}
        if result.excess is not None:
            row["excess"] = result.excess.item()
        rows.append(row)
        if not passes(gate, error, plan):
            say(f"{'':14s}{mode:12s} GATE FAILED, error {gate:.2e}")
            continue  # no time for a wrong result
        row["samples_ms"] = time_ms(call, repeats, on_gpu)
        row["speedup"] = dense_ms / statistics.median(row["samples_ms"])
        if on_gpu:
            row["stages_ms"] = stage_ms(call, repeats)
        say(
            f"{'':14s}{mode:12s} {statistics.median(row['samples_ms']):8.2f} ms "
            f"{row['speedup']:5.2f}x  error {error:.3f}"
        )
    return rows


def measure(
    heads: int,
    dim: int,
    chunk: int,
    chunks: Sequence[int],
    plan: AttentionPlan,
    repeats: int,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The record: rows of caches of so many chunks, the new one among them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = video_like(1, heads, max(chunks) * chunk, dim, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    for count in sorted(chunks):
        until = count * chunk
        inputs = Inputs(
            f"{until} keys", q[:, :, until - chunk : until], k[:, :, :until], v[:, :, :until]
        )
        rows += rows_of(inputs, plan, repeats, say)
    return {
        **provenance(), "heads": heads, "head_dim": dim, "chunk": chunk, "density": plan.density,
        "rows": rows,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Milliseconds of every mode by the length of the cache, as Markdown."""
    by_keys: dict[int, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        by_keys.setdefault(row["keys"], {})[row["mode"]] = row
    modes = ("dense", *MODES)
    lines = [
        f"{where([record])}; {record['chunk']:,} queries, {record['heads']} heads × "
        f"{record['head_dim']}, density {record['density']:g}.",
        "",
        f"| keys | {' | '.join(f'{mode}, ms' for mode in modes)} | dense over later step "
        "| error, anew / later step |",
        "|---" * (3 + len(modes)) + "|",
    ]
    for keys, rows in by_keys.items():
        ms = {
            mode: statistics.median(row["samples_ms"])
            for mode, row in rows.items()
            if "samples_ms" in row
        }
        cells = [f"{ms[mode]:.2f}" if mode in ms else "" for mode in modes]
        ratio = f"{ms['dense'] / ms['later step']:.2f}x" if "later step" in ms else ""
        errors = " / ".join(
            f"{rows[mode]['error']:.3f}" for mode in ("anew", "later step") if mode in rows
        )
        lines.append(f"| {keys:,} | {' | '.join([*cells, ratio, errors])} |")
    return "\n".join(lines)


def run(
    description: str | None, file: str, sizes: Sizes, tiny: Sizes,
    measured: Callable[..., dict[str, Any]], shown: Callable[[dict[str, Any]], str],
) -> None:  # fmt: skip
    """The command line of a benchmark of chunks: parse, measure, write, print the table.

    Args:
        description: of the command.
        file: name of the record in the folder that ``--out`` names.
        sizes, tiny: heads, head dim, tokens of a chunk and numbers of chunks, on a GPU and with
            ``--tiny``.
        measured, shown: `measure` and `table`, or others like them.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="few short chunks on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("these lengths need a GPU (--tiny runs on a CPU)")
    record = measured(
        *(tiny if given.tiny else sizes), AttentionPlan(density=given.density), given.repeats,
        "cpu" if given.tiny else "cuda", lambda line: print(line, flush=True),
    )  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / file).write_text(json.dumps(record, indent=1))
    print(shown(record))


def main() -> None:
    """Write `cache.json`."""
    run(__doc__, "cache.json", (HEADS, HEAD_DIM, CHUNK, CHUNKS), TINY, measure, table)


if __name__ == "__main__":
    main()
