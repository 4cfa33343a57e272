"""`torch.ops.svg_ear.listed_padding`: proves that the lists of a block mask are those of padding.

flex_attention takes a mask as a function of pairs and as lists of blocks: it skips what is not
listed, and asks the function inside of the blocks that are listed as partial. Lists are data. They
may have been made of another function, of other numbers, or by hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op(
    "svg_ear::listed_padding", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def listed_padding(
    keys: Tensor,
    rows: Tensor,
    own: Tensor | None,
    holds: Tensor | None,
    counts: Tensor,
    order: Tensor,
    full_counts: Tensor | None,
    full_order: Tensor | None,
    q_block: int,
    k_block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check the lists of a block mask against the keys and queries that its function keeps.

    The function is ``rows[b, 0, i, 0] and keys[b, 0, 0, j]``, or `own` at the pairs i = j. Waits
    for the device, and is not cached, as `key_padding`.

    Args:
        keys: (B|1, 1, 1, N_k) bool, keys that take part.
        rows: (B|1, 1, N_q, 1) bool, queries that see these keys. The others see none.
        own: (B|1, 1, N_q, 1) bool, of the others those that see the key of their own place.
        holds: bool, nothing of it False unless the function is another one; None if it is known.
        counts, order: (B|1, H|1, R) and (B|1, H|1, R, C), the partial blocks of each row of blocks:
            how many there are, and which. full_counts, full_order: those that are kept whole.
        q_block, k_block: extents of a block.

    Returns:
        proven, () bool on the CPU; `own`, False unless it is proven; counts and full_counts, 0 if
        it is proven: what is left to flex_attention. What is not given is empty.
    """
    proven = torch.ones((), dtype=torch.bool, device=keys.device)
    if holds is not None:
        proven = holds.all()
    q_block, k_block = (
        min(block, max(tokens, 1))
        for block, tokens in ((q_block, rows.shape[2]), (k_block, keys.shape[3]))
    )
    extents = -(-rows.shape[2] // q_block), -(-keys.shape[3] // k_block)
    partial, full = _listed(counts, order, extents), _listed(full_counts, full_order, extents)
    some, whole = _blocks(keys, rows, own, q_block, k_block)
    if partial is None or full is None or not _broadcast(some, partial, full):
        proven = torch.zeros_like(proven)
    else:
        once = torch.where(some, partial + full == 1, full == 0)
        proven = proven & once.all() & ((full == 0) | whole).all()
    seen = keys.new_empty(0) if own is None else own & proven
    partial_left, full_left = (
        counts.new_empty(0) if c is None else torch.where(proven, 0, c)
        for c in (counts, full_counts)
    )
    return proven.cpu(), seen, partial_left, full_left


@listed_padding.register_fake
def _(
    keys: Tensor, _rows: Tensor, own: Tensor | None, _holds: Tensor | None, counts: Tensor,
    _order: Tensor, full_counts: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty((), dtype=torch.bool, device="cpu"),
        keys.new_empty(0 if own is None else own.shape),
        counts.new_empty(counts.shape),
        counts.new_empty(0 if full_counts is None else full_counts.shape),
    )


def _listed(counts: Tensor | None, order: Tensor | None, extents: tuple[int, int]) -> Tensor | None:
    """How often each block is listed, (B|1, H|1, rows, columns); None for lists of other extents.

    A block out of range, and one more than there is room for, count as listed twice.
    """
    rows, columns = extents
    if counts is None or order is None:
        return torch.zeros((), dtype=torch.int32)
    if order.shape[:-1] != counts.shape or counts.dim() != 3 or counts.shape[2] < rows:
        return None
    counts, order = counts[:, :, :rows, None], order[:, :, :rows].long()
    is_listed = torch.arange(order.shape[3], device=order.device) < counts
    inside = (order >= 0) & (order < columns)
    found = torch.zeros((*order.shape[:3], columns), dtype=torch.int32, device=order.device)
    found.scatter_add_(-1, order.clamp(0, max(columns - 1, 0)), (is_listed & inside).int())
    strange = (is_listed & ~inside).any(-1, keepdim=True) | (counts > order.shape[3])
    return found.masked_fill(strange, 2)


def _blocks(
    keys: Tensor, rows: Tensor, own: Tensor | None, q_block: int, k_block: int
) -> tuple[Tensor, Tensor]:
    """Blocks of which the function takes some pair, and all, (B|1, 1, rows, columns) each."""
    (some_rows, all_rows), (some_keys, all_keys) = (
        _by_block(tokens, block)
        for tokens, block in ((rows[..., 0], q_block), (keys[:, 0], k_block))
    )
    some = some_rows[..., None] & some_keys[..., None, :]
    whole = all_rows[..., None] & all_keys[..., None, :]
    if own is not None:
        place = torch.arange(own.shape[2], device=own.device)
        block = place // q_block * some.shape[3] + place // k_block
        seen = torch.zeros(
            (own.shape[0], 1, some[0, 0].numel()), dtype=torch.int32, device=own.device
        )
        seen.scatter_add_(-1, block.expand(own.shape[:3]), own[..., 0].int())
        some = some | (seen > 0).unflatten(-1, some.shape[2:])
    return some, whole


def _by_block(tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of tokens (.., N) bool, by block: is any True, and are all of those that exist."""
    missing = -tokens.shape[-1] % block
    some, every = (
        F.pad(tokens, (0, missing), value=filled).unflatten(-1, (-1, block))
        for filled in (False, True)
    )
    return some.any(-1), every.all(-1)


def _broadcast(*tensors: Tensor) -> bool:
    """True if tensors of several dimensions agree in each but for extents of 1."""
    shapes = [t.shape for t in tensors if t.dim()]
    return all(len({*extents} - {1}) <= 1 for extents in zip(*shapes, strict=True))
