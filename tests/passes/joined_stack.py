"""A small transformer over one sequence of patches and text, however these are put together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, VIDEO, TEXT = 64, 2, 120, 9
VIDEO_AT, TEXT_AT = torch.arange(TEXT, TEXT + VIDEO), torch.arange(TEXT)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Patches and text, put into one sequence by `pack`, through two blocks."""

    def __init__(self, pack: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pack = pack
        self.patches, self.words = nn.Linear(8, WIDTH), nn.Linear(16, WIDTH)
        self.to_q, self.to_k, self.to_v, self.ff = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.registers = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 400, WIDTH))

    def block(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (WIDTH,)) + self.positions[:, : x.shape[1]]
        x = x + attend(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + torch.cat([self.ff(part) for part in x.split(70, 1)], 1)

    def forward(self, video: Tensor, text: Tensor, *more: Tensor) -> Tensor:
        x = self.pack(self, self.patches(video), self.words(text), *more)
        return self.block(self.block(x))


def inputs(video: int = VIDEO, text: int = TEXT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, video, 8, generator=generator),
        torch.randn(1, text, 16, generator=generator),
    )
