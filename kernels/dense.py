"""PyTorch's own attention, with the output and the log-sum-exp that the operator promises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_AT_A_TIME = 1024


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention, with an output in the layout of q; see `attention`."""
    grouped = q.shape[1] != k.shape[1]
    mask = attn_mask
    if mask is not None and mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(q.shape[1] // k.shape[1], 1)
    # PyTorch takes float32 beside narrower queries, and adds it as it is.
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        mask = mask.to(q.dtype)
    lse = empty_lse(q, return_lse)
    if return_lse:
        lse.copy_(dense_lse(q, k, mask, scale))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    promised = torch.empty_like(q, device="meta").stride()
    if out.stride() != promised or any(out is t for t in (q, k, v)):
        out = torch.empty_like(q).copy_(out)
    return out, lse


def dense_lse(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, H, N_q) float32 log-sum-exp of dense attention, a slice of queries at a time.

    Args:
        q, k, scale: see `attention`.
        mask: (B|1, H|1, N_q|1, N_k), bool or added to the logits, or None.
    """
    groups = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(groups, 1).transpose(2, 3)
    parts = []
    for first in range(0, q.shape[2], _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        logits = (q[:, :, rows] @ keys).float() * scale
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, rows]
            is_bool = part.dtype == torch.bool
            logits = logits.masked_fill(~part, float("-inf")) if is_bool else logits + part
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, -1) if parts else empty_lse(q, True)


def empty_lse(q: Tensor, return_lse: bool) -> Tensor:
    """(B, H, N_q) float32 for the log-sum-exp, with no elements where nobody asks for it."""
    return q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
