"""A layer around attention that is written by hand, and what its variants are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svg_ear_compile.passes.site import Reason

BATCH, HEADS, TOKENS, DIM, WIDTH = 2, 2, 61, 32, 24
INF = math.inf
Body = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Cases = dict[str, tuple[Body, Reason | int]]
"""What stands around attention, and how many calls are rewritten or why the first is not."""


class Layer(nn.Module):
    """q, k, v (B, H, N, D) by linear layers, then whatever `body` does with them and a mask.

    The mask (B, N) says which tokens are valid.
    """

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.body(q, k, v, valid)


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = 2 * torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)
    return x, torch.arange(TOKENS) < torch.tensor([[40], [TOKENS]])


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


def attend(logits: Tensor, v: Tensor) -> Tensor:
    return logits.softmax(-1) @ v


def of_scores(change: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, valid: attend(change(scores(q, k)), v)


def of_weights(change: Callable[[Tensor], Tensor]) -> Body:
    return lambda q, k, v, valid: change(scores(q, k).softmax(-1)) @ v


def row(valid: Tensor) -> Tensor:
    return valid[:, None, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
