"""Lists of blocks are proven to be those of padding, however they were made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels.block_lists import listed_padding

Lists = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def lists_of(pairs: Tensor, q_block: int, k_block: int) -> Lists:
    """Number and order of the partial and of the full blocks of pairs (B, H, N_q, N_k)."""
    *_, rows, columns = pairs.shape
    padded = torch.nn.functional.pad(pairs, (0, -columns % k_block, 0, -rows % q_block))
    blocks = padded.unflatten(2, (-1, q_block)).unflatten(4, (-1, k_block)).sum((3, 5))
    found: list[Tensor] = []
    for kind in ((blocks > 0) & (blocks < q_block * k_block), blocks == q_block * k_block):
        order = kind.int().argsort(dim=-1, descending=True, stable=True).int()
        # Behind the last block that counts, anything may stand.
        counts = kind.sum(-1).int()
        beyond = torch.arange(order.shape[-1]) >= counts[..., None]
        found += [counts, order.masked_fill(beyond, 2**31 - 1)]
    return found[0], found[1], found[2], found[3]


def padding(samples: int = 2, queries: int = 77, tokens: int = 77) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    keys = torch.rand(samples, 1, 1, tokens) < 0.8
    keys[..., 40:60] = True
    rows = torch.arange(queries)[:, None] < torch.tensor([60, queries])[:samples, None, None, None]
    return keys, rows, rows & keys


@pytest.mark.parametrize("blocks", [(16, 8), (32, 16), (128, 128), (1 << 30, 1 << 30)])
@pytest.mark.parametrize("queries", [77, 33])
def test_lists_of_the_same_pairs_are_proven(blocks: tuple[int, int], queries: int) -> None:
    keys, rows, pairs = padding(queries=queries)
    small = tuple(min(block, 128) for block in blocks)
    lists = lists_of(pairs, *small)  # type: ignore[arg-type]
    proven, own, partial, full = listed_padding(keys, rows, None, None, *lists, *blocks)
    assert bool(proven)
    assert own.numel() == 0
    assert not partial.any()
    assert not full.any()
    assert (partial.shape, full.shape) == (lists[0].shape, lists[2].shape)  # type: ignore[union-attr]


@pytest.mark.parametrize("first", [60, 76], ids=["some", "one"])
def test_rows_that_see_themselves(first: int) -> None:
    keys, rows, pairs = padding(1)
    own = ~rows & (torch.arange(77) >= first)[:, None]
    lists = lists_of(pairs | (torch.eye(77, dtype=torch.bool) & own), 16, 8)
    proven, seen, _, _ = listed_padding(keys, rows, own, None, *lists, 16, 8)
    assert bool(proven)
    assert torch.equal(seen, own)
    without = lists_of(pairs, 16, 8)
    proven, seen, partial, _ = listed_padding(keys, rows, own, None, *without, 16, 8)
    assert not bool(proven)
    assert not seen.any()
    assert torch.equal(partial, without[0])


def _changed(lists: Lists, change: str) -> Lists:
    counts, order, full, full_order = (t.clone() for t in lists if t is not None)
    if change == "one left out":
        counts[0, 0, 1] -= 1
    elif change == "one twice":
        order[0, 0, 1, 1] = order[0, 0, 1, 0]
    elif change == "full as partial, too":
        order[0, 0, 1, counts[0, 0, 1]] = full_order[0, 0, 1, 0]
        counts[0, 0, 1] += 1
    elif change == "partial as full":
        full_order[0, 0, 1, full[0, 0, 1]] = order[0, 0, 1, 0]
        full[0, 0, 1] += 1
        order[0, 0, 1, :-1] = order[0, 0, 1, 1:].clone()
        counts[0, 0, 1] -= 1
    elif change == "out of range":
        order[0, 0, 0, 0] = 99
    elif change == "more than there is room for":
        counts[0, 0, 0] = 99
    elif change == "a row too few":
        counts, order = counts[:, :, :-1], order[:, :, :-1]
    elif change == "another batch":
        counts, order = counts.expand(3, -1, -1), order.expand(3, -1, -1, -1)
    elif change == "no full ones":
        return counts, order, None, None
    return counts, order, full, full_order


@pytest.mark.parametrize(
    "change",
    [
        "one left out", "one twice", "full as partial, too", "partial as full", "out of range",
        "more than there is room for", "a row too few", "another batch", "no full ones",
    ],
)  # fmt: skip
def test_other_lists_are_not(change: str) -> None:
    keys, rows, pairs = padding(2)
    samples = slice(1) if change == "another batch" else slice(None)
    lists = _changed(lists_of(pairs[samples], 16, 8), change)
    proven, _, partial, _ = listed_padding(keys, rows, None, None, *lists, 16, 8)
    assert not bool(proven)
    assert torch.equal(partial, lists[0])


@pytest.mark.parametrize("change", ["all", "order", "counts", "heads", "no heads"])
def test_lists_of_one_row_stand_for_no_other_row(change: str) -> None:
    """Every row of blocks has the same lists here, so what is read for all of them would fit."""
    keys, rows, _ = padding(1, queries=80)
    rows = torch.ones_like(rows)
    lists = lists_of(rows & keys, 16, 8)
    assert bool(listed_padding(keys, rows, None, None, *lists, 16, 8)[0])
    partial, full = lists[:2], lists[2:]
    if change in ("all", "counts"):
        partial = partial[0][:, :, :1], partial[1]
    if change in ("all", "order"):
        partial = partial[0], partial[1][:, :, :1]
    if change == "heads":
        partial = partial[0].expand(-1, 2, -1), partial[1]
    if change == "no heads":
        partial = partial[0][0], partial[1][0]
    proven, _, left, _ = listed_padding(keys, rows, None, None, *partial, *full, 16, 8)
    assert not bool(proven)
    assert torch.equal(left, partial[0])


def test_rows_of_blocks_behind_the_queries_are_not_read() -> None:
    keys, rows, pairs = padding()
    longer = [torch.cat([t, t], 2) for t in lists_of(pairs, 16, 8) if t is not None]
    proven, _, partial, full = listed_padding(keys, rows, None, None, *longer, 16, 8)
    assert bool(proven)
    assert (partial.shape, full.shape) == (longer[0].shape, longer[2].shape)


def test_lists_of_another_mask_are_not() -> None:
    keys, rows, pairs = padding()
    keys[0, 0, 0, 3] = ~keys[0, 0, 0, 3]
    keys[0, 0, 0, 40] = False
    assert not bool(listed_padding(keys, rows, None, None, *lists_of(pairs, 16, 8), 16, 8)[0])


def test_what_does_not_hold_is_not_proven() -> None:
    keys, rows, pairs = padding()
    holds = torch.ones_like(rows)
    lists = lists_of(pairs, 16, 8)
    assert bool(listed_padding(keys, rows, None, holds, *lists, 16, 8)[0])
    holds[1, 0, 5] = False
    assert not bool(listed_padding(keys, rows, None, holds, *lists, 16, 8)[0])


def test_a_block_of_which_no_pair_is_taken_may_be_listed() -> None:
    keys, rows, pairs = padding(1)
    keys[..., :16] = False
    counts, order, full, full_order = lists_of(pairs & keys, 16, 8)
    order[0, 0, 0, counts[0, 0, 0]] = 0
    counts[0, 0, 0] += 1
    assert bool(listed_padding(keys, rows, None, None, counts, order, full, full_order, 16, 8)[0])


def test_the_operator_is_sound() -> None:
    keys, rows, pairs = padding()
    lists = lists_of(pairs, 16, 8)
    for own in (None, ~rows):
        args = (keys, rows, own, torch.ones_like(rows), *lists, 16, 8)
        torch.library.opcheck(torch.ops.svg_ear.listed_padding.default, args)
