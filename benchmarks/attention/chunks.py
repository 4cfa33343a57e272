"""`python -m benchmarks.attention.chunks --out DIR`: several chunks of queries in one masked call.

Every query sees the keys of its own chunk and of all chunks before, as where a model that makes a
video chunk by chunk is trained or fills its cache. Timed are dense attention with that mask, dense
attention chunk by chunk, FlexAttention with a block mask, the operator, and the proof that the mask
has these chunks, which each run of a graph makes anew. The operator's last chunk passes the gate
before it is timed. ``--tiny`` uses short chunks on a CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.attention.cache import CHUNK, HEAD_DIM, HEADS, run
from benchmarks.attention.data import video_like
from benchmarks.attention.gate import definition_rows, passes, relative_error
from benchmarks.attention.measure import time_ms
from benchmarks.provenance import provenance, where
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.plan import AttentionPlan

CHUNKS = (4, 8, 16)  # in one call; 16 are 74,880 tokens
TINY = (2, 32, 96, (2, 3))  # heads, head dim, chunk and chunks
MODES = ("masked", "by chunk", "flex", "sparse", "proof")
_SAMPLED_ROWS = 48


class LastResult:
    """Source that runs calls as compiled and keeps the last result."""

    def __init__(self) -> None:
        self.result: Result | None = None

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        """See `CallSource`."""
        yield AttentionCall(request.plan)

    def finished(self, call: AttentionCall, result: Result) -> None:
        """See `CallSource`."""
        self.result = result


def proof(mask: Tensor) -> tuple[Tensor, ...]:
    """What a graph proves of a mask in every run: padding, then chunks."""
    padding = torch.ops.svg_ear.key_padding(mask)
    return (*padding, *torch.ops.svg_ear.query_chunks(mask, padding[2]))


def calls_of(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, plan: AttentionPlan
) -> dict[str, Callable[[], Any]]:
    """A call for each of `MODES`; q, k, v (B, H, N, D)."""
    tokens = q.shape[2]
    place = torch.arange(tokens, device=q.device) // chunk
    mask = (place[None] <= place[:, None])[None, None]  # [1, 1, N, N]
    blocks = create_block_mask(
        lambda b, h, i, j: j // chunk <= i // chunk, None, None, tokens, tokens,
        device=q.device.type,
    )  # fmt: skip
    flex = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    padding_keys, rows, is_padding, spans, keys = proof(mask)

    def by_chunk() -> Tensor:
        ends = [*range(chunk, tokens, chunk), tokens]
        return torch.cat(
            [
                F.scaled_dot_product_attention(
                    q[:, :, end - chunk : end], k[:, :, :end], v[:, :, :end]
                )
                for end in ends
            ],
            2,
        )

    def sparse() -> Tensor:
        out: Tensor = torch.ops.svg_ear.attention(
            q, k, v, mask, None, padding_keys, rows, is_padding, None, None, spans, keys,
            plan=plan.encode(),
        )[0]  # fmt: skip
        return out

    return {
        "masked": lambda: F.scaled_dot_product_attention(q, k, v, mask),
        "by chunk": by_chunk,
        "flex": lambda: flex(q, k, v, block_mask=blocks),
        "sparse": sparse,
        "proof": lambda: proof(mask),
    }


def rows_of(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, plan: AttentionPlan, repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each of `MODES`, at one number of chunks."""
    tokens, source = q.shape[2], LastResult()
    calls = calls_of(q, k, v, chunk, plan)
    wanted = calls["by chunk"]()
    sampled = torch.randint(chunk, (_SAMPLED_ROWS,), generator=torch.Generator().manual_seed(1))
    head = (0, q.shape[1] - 1)
    rows = []
    for mode, call in calls.items():
        row: dict[str, Any] = {"tokens": tokens, "mode": mode}
        rows.append(row)
        if mode != "proof":
            with calls_from(source):
                out = call()
            row["error"] = relative_error(out, wanted)
        if mode == "sparse":
            assert source.result is not None
            last = q[:, :, tokens - chunk :]
            defined = definition_rows(last, k, v, source.result, plan, head, sampled)
            row["gate"] = relative_error(out[head][tokens - chunk + sampled], defined)
            if not passes(row["gate"], row["error"], plan):
                say(f"{tokens:>7,} {mode:10s} GATE FAILED, error {row['error']:.2e}")
                continue  # no time for a wrong result
        row["samples_ms"] = time_ms(call, repeats, q.is_cuda)
        say(f"{tokens:>7,} {mode:10s} {statistics.median(row['samples_ms']):9.2f} ms")
    return rows


def measure(
    heads: int, dim: int, chunk: int, chunks: Sequence[int], plan: AttentionPlan, repeats: int,
    device: str, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The record: rows of calls of so many chunks."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = video_like(1, heads, max(chunks) * chunk, dim, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    for count in sorted(chunks):
        q, k, v = (x[:, :, : count * chunk].contiguous() for x in tensors)
        rows += rows_of(q, k, v, chunk, plan, repeats, say)
    return {
        **provenance(), "heads": heads, "head_dim": dim, "chunk": chunk, "density": plan.density,
        "rows": rows,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Milliseconds of every mode by the number of tokens, as Markdown."""
    by_tokens: dict[int, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        by_tokens.setdefault(row["tokens"], {})[row["mode"]] = row
    lines = [
        f"{where([record])}; chunks of {record['chunk']:,} tokens, {record['heads']} heads × "
        f"{record['head_dim']}, density {record['density']:g}.",
        "",
        f"| tokens | {' | '.join(f'{mode}, ms' for mode in MODES)} | error |",
        "|---" * (2 + len(MODES)) + "|",
    ]
    for tokens, rows in by_tokens.items():
        cells = [
            f"{statistics.median(rows[mode]['samples_ms']):.2f}"
            if "samples_ms" in rows[mode]
            else ""
            for mode in MODES
        ]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} | {rows['sparse']['error']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Write `chunks.json`."""
    run(__doc__, "chunks.json", (HEADS, HEAD_DIM, CHUNK, CHUNKS), TINY, measure, table)


if __name__ == "__main__":
    main()
