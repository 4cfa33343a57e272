"""Tokens sorted by label on a GPU: a stable counting sort in at most two launches.

The tokens of a head are cut into parts. `count_labels_kernel` counts the labels of each part;
k-means counts them where it finds them. `place_tokens_kernel` adds the counts up to the place of
each label of its part, and walks through the part in token order, one block of tokens at a time.
Only integers are added, so the result does not depend on the order in which programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svg_ear_compile.kernels.gpu.launch import parts_of, power_of_2_from, token_strides
from svg_ear_compile.kernels.kinds import EXACT, PADDING

# Tokens that are compared with each other. A thread holds a part of the table of all pairs: more
# tokens would take all of its registers.
_BLOCK = 64


class Sorted(NamedTuple):
    """Tokens of G heads sorted by label.

    Attributes:
        labels: (G, N) int32 in [0, C + 1]: cluster, always exact (C) or padding (C + 1).
        order: (G, N) int32 token at each place of the order by label; a stable sort.
        starts: (G, C + 3) int32 first place of each label in the order; the last entry is N.
        sizes: (G, C) int32 number of tokens in each cluster.
    """

    labels: Tensor
    order: Tensor
    starts: Tensor
    sizes: Tensor


class LabelCounts(NamedTuple):
    """Numbers of tokens of each label in each part of the tokens.

    Attributes:
        table: (G, P, C + 2) int32.
        chunk: tokens of a part.
    """

    table: Tensor
    chunk: int


def uncounted(groups: int, tokens: int, clusters: int, device: torch.device) -> LabelCounts:
    """`LabelCounts` of G heads whose table is not written yet."""
    parts, chunk = parts_of(tokens, groups, _BLOCK)
    table = torch.empty(groups, parts, clusters + 2, dtype=torch.int32, device=device)
    return LabelCounts(table, chunk)


@triton.jit(do_not_specialize=["heads", "tokens", "clusters", "chunk"])
def count_labels_kernel(
    given_ptr,  # (G, N) any integer
    kind_ptr,  # (B|1, H|1, N) uint8, see `kernels.kinds`
    label_ptr,  # (G, N) int32, out
    count_ptr,  # (G, P, C + 2) int32, out
    stride_kb,
    stride_kh,
    stride_kn,
    heads,
    tokens,
    clusters,
    chunk,  # tokens of one part, a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    HAS_KINDS: tl.constexpr,
    IS_PADDING: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """Labels of tokens whose kind may have changed, and the number of each in one part."""
    part = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    b, h = g // heads, g % heads
    n = tl.arange(0, BLOCK_N)  # [BN]
    count_row = count_ptr + (g * tl.num_programs(0) + part) * (clusters + 2)
    for first in range(0, clusters + 2, BLOCK_N):
        zero = tl.zeros([BLOCK_N], tl.int32)
        tl.store(count_row + first + n, zero, mask=first + n < clusters + 2)
    tl.debug_barrier()
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), BLOCK_N):
        token = first + n
        there = token < tokens
        label = tl.load(given_ptr + g * tokens + token, mask=there, other=0).to(tl.int32)
        label = tl.minimum(label, clusters)
        if HAS_KINDS:
            kind_row = kind_ptr + b * stride_kb + h * stride_kh + token.to(tl.int64) * stride_kn
            kind = tl.load(kind_row, mask=there, other=0)
            label = tl.where(kind == IS_EXACT, clusters, label)
            label = tl.where(kind == IS_PADDING, clusters + 1, label)
        tl.store(label_ptr + g * tokens + token, label, mask=there)
        tl.atomic_add(count_row + label, 1, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "clusters", "chunk"])
def place_tokens_kernel(
    label_ptr,  # (G, N) int32
    count_ptr,  # (G, P, C + 2) int32
    next_ptr,  # (G, P, C + 2) int32, scratch: next place of each label in the order
    order_ptr,  # (G, N) int32, out
    start_ptr,  # (G, C + 3) int32, out
    size_ptr,  # (G, C) int32, out
    tokens,
    clusters,
    chunk,  # tokens of one part, a multiple of BLOCK_N
    BLOCK_L: tl.constexpr,  # at least C + 3
    BLOCK_N: tl.constexpr,
):
    """Places of the tokens of one part."""
    part = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    labels = clusters + 2
    every = tl.arange(0, BLOCK_L)  # [BL]
    total = tl.zeros([BLOCK_L], tl.int32)
    before = tl.zeros([BLOCK_L], tl.int32)
    for other in range(0, parts):
        at_count = count_ptr + (g * parts + other) * labels + every
        count = tl.load(at_count, mask=every < labels, other=0)
        total += count
        before += tl.where(other < part, count, 0)
    start = tl.cumsum(total, 0) - total
    next_row = next_ptr + (g * parts + part) * labels
    tl.store(next_row + every, start + before, mask=every < labels)
    if part == 0:
        tl.store(start_ptr + g * (clusters + 3) + every, start, mask=every < clusters + 3)
        tl.store(size_ptr + g * clusters + every, total, mask=every < clusters)
    n = tl.arange(0, BLOCK_N)  # [BN]
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), BLOCK_N):
        # Places that other threads of this program have stored are read after the barrier.
        tl.debug_barrier()
        token = first + n
        there = token < tokens
        label = tl.load(label_ptr + g * tokens + token, mask=there, other=-1)
        place = tl.load(next_row + label, mask=there, other=0)
        same = label[:, None] == label[None, :]  # [BN, BN]
        # Tokens of the same label: those before, and 2^16 times those from this one on.
        count = tl.sum(tl.where(same, tl.where(n[None, :] < n[:, None], 1, 65536), 0), 1)
        earlier = count & 65535
        is_last = (count >> 16) == 1
        tl.store(order_ptr + g * tokens + place + earlier, token, mask=there)
        tl.debug_barrier()
        tl.store(next_row + label, place + earlier + 1, mask=there & is_last)


def sort_by_label(
    labels: Tensor,
    clusters: int,
    heads: int,
    kinds: Tensor | None = None,
    counts: LabelCounts | None = None,
) -> Sorted:
    """Sort the tokens of each head by label.

    Args:
        labels: (G, N) integer in [0, C + 1], contiguous.
        clusters: C.
        heads: H, of which G is a multiple.
        kinds: (B|1, H|1, N) uint8; tokens that are always exact or padding get the labels of
            these, whatever their labels were, and padding that takes part now is always exact.
            None is for no padding. Not read with `counts`.
        counts: of these labels, if they are int32 and stay as they are; None counts them.
    """
    groups, tokens = labels.shape
    found = labels
    if counts is None:
        found = torch.empty_like(labels, dtype=torch.int32)
        counts = uncounted(groups, tokens, clusters, labels.device)
        count_labels_kernel[(counts.table.shape[1], groups)](
            labels, labels if kinds is None else kinds, found, counts.table,
            *((0, 0, 0) if kinds is None else token_strides(kinds)),
            heads, tokens, clusters, counts.chunk,
            BLOCK_N=_BLOCK, HAS_KINDS=kinds is not None,
            IS_PADDING=PADDING, IS_EXACT=EXACT, num_warps=4, num_stages=1,
        )  # fmt: skip
    order, following = torch.empty_like(found), torch.empty_like(counts.table)
    starts = found.new_empty(groups, clusters + 3)
    sizes = found.new_empty(groups, clusters)
    block = power_of_2_from(clusters + 3)
    place_tokens_kernel[(counts.table.shape[1], groups)](
        found, counts.table, following, order, starts, sizes, tokens, clusters, counts.chunk,
        BLOCK_L=block, BLOCK_N=_BLOCK, num_warps=4 if block <= 2048 else 8, num_stages=1,
    )  # fmt: skip
    return Sorted(found, order, starts, sizes)
