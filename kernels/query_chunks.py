"""`torch.ops.svg_ear.query_chunks`: chunks of queries that see the same keys, told by a mask.

Models that make a video chunk by chunk are trained, and fill their caches, by calls over several
chunks at once: every query sees the keys of its own chunk and of earlier ones, maybe of a window of
chunks, maybe of a first one for ever. Such a call is one call for each chunk of queries, each plain
attention to the keys that its chunk sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svg_ear_compile.kernels.padding import NEGLIGIBLE, words_of

MOST_CHUNKS = 64
"""A mask of more chunks is any mask: its call is left whole."""

_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class QueryChunk:
    """Successive queries that see the same keys.

    Attributes:
        queries: their places.
        keys: from the first to the last key that one of the samples and heads sees.
        sees_all: every sample and head sees all of these keys.
        new: largest number of keys of a sample and head that the chunk before does not see.
    """

    queries: slice
    keys: slice
    sees_all: bool
    new: int


@torch.library.custom_op(
    "svg_ear::query_chunks", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def query_chunks(mask: Tensor, is_padding: Tensor) -> tuple[Tensor, Tensor]:
    """Split the queries of a mask into chunks, each of which sees the same keys.

    Waits for the device; like proofs of padding, the results are not kept, see `key_padding`.

    Args:
        mask: see `key_padding`.
        is_padding: () bool on the CPU; a mask of padding is not looked at.

    Returns:
        spans (`MOST_CHUNKS`, 5) int64 on the CPU, see `chunks_of`, and (B|1, H|1, `MOST_CHUNKS`,
        N_k) bool, the keys that each chunk sees. There are no chunks if the mask is padding, has
        values that are neither kept nor left out, has more chunks, or a chunk that sees no keys.
    """
    batch, heads, _, tokens = mask.shape
    spans = torch.full((MOST_CHUNKS, 5), -1)
    # Not filled: nobody reads the keys of chunks that there are not.
    keys = mask.new_empty(batch, heads, MOST_CHUNKS, tokens, dtype=torch.bool)
    starts = None if is_padding or 0 in mask.shape else _starts(mask)
    if starts is None:
        return spans, keys
    count = len(starts)
    seen = mask[:, :, starts.to(mask.device)]
    keys[:, :, :count] = seen if mask.dtype == torch.bool else seen == 0
    seen = keys[:, :, :count]
    before = seen.roll(1, 2)
    before[:, :, 0] = False
    some, every = seen.flatten(0, 1).any(0), seen.flatten(0, 1).all(0)  # [R, N]
    new = (seen & ~before).sum(-1).flatten(0, 1).amax(0)  # [R]
    first, last = some.int().argmax(-1), tokens - some.flip(-1).int().argmax(-1)
    is_whole = every.sum(-1) == last - first
    if not seen.any(-1).all():
        return spans, keys
    found = torch.stack([first, last, is_whole, new], 1)
    spans[:count, 0], spans[:count, 1:] = starts, found.cpu()
    return spans, keys


@query_chunks.register_fake
def _(mask: Tensor, is_padding: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, _, tokens = mask.shape
    return (
        torch.empty(MOST_CHUNKS, 5, dtype=torch.int64, device="cpu"),
        mask.new_empty(batch, heads, MOST_CHUNKS, tokens, dtype=torch.bool),
    )


def chunks_of(spans: Tensor, queries: int) -> list[QueryChunk]:
    """The chunks of so many queries; none if a mask has no chunks.

    Args:
        spans: (R, 5) int64 on the CPU: for each chunk its first query, the first key and the end of
            the keys, and the other attributes of `QueryChunk`; -1 where there is none.
    """
    found = [row for row in spans.tolist() if row[0] >= 0]
    ends = [row[0] for row in found[1:]] + [queries] * bool(found)
    return [
        QueryChunk(slice(start, end), slice(first, last), bool(sees_all), new)
        for (start, first, last, sees_all, new), end in zip(found, ends, strict=True)
    ]


def _starts(mask: Tensor) -> Tensor | None:
    """(R,) int64 on the CPU, the first query of each chunk; None where there are no chunks."""
    additive = mask.dtype != torch.bool
    is_mask = torch.ones((), dtype=torch.bool, device=mask.device)
    changes = [torch.ones(1, dtype=torch.bool, device=mask.device)]
    for first in range(0, mask.shape[2], _ROWS_AT_A_TIME):
        part = mask[:, :, first : first + _ROWS_AT_A_TIME + 1]
        taken = part == 0 if additive else part
        if additive:
            is_mask &= (taken | (part <= NEGLIGIBLE)).all()
        words = words_of(taken)
        changes.append((words[:, :, 1:] != words[:, :, :-1]).any(-1).flatten(0, 1).any(0))
    changed = torch.cat(changes)[: mask.shape[2]] & is_mask
    starts = changed.cpu().nonzero()[:, 0]
    return starts if 0 < len(starts) <= MOST_CHUNKS else None
