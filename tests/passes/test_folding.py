"""Attention within frames and along time, whose tokens were folded into the batch before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced_graphs import sites_of

from svg_ear_compile.passes.site import Reason, Role

HEADS, DIM, WIDTH, FRAMES, TOKENS = 2, 32, 16, 3, 48
Fold = Callable[[Tensor, int], Tensor]


def by_permute(x: Tensor, frames: int) -> Tensor:
    b, _, c = x.shape
    return x.view(b, frames, -1, c).permute(2, 0, 1, 3).reshape(-1, frames, c)


def by_transpose(x: Tensor, frames: int) -> Tensor:
    return x.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)


def frames_first(x: Tensor, frames: int) -> Tensor:
    b, _, c = x.shape
    return x.reshape(b, frames, -1, c).movedim(1, 0).reshape(-1, x.shape[1] // frames, c)


def places_first(x: Tensor, frames: int) -> Tensor:
    b, _, c = x.shape
    return torch.moveaxis(x.reshape(b, frames, -1, c), (-2, 1), (0, 2)).reshape(-1, frames, c)


def frames_apart(x: Tensor, frames: int) -> Tensor:
    return x.view(x.shape[0] * frames, -1, x.shape[2])


def from_latents(x: Tensor, frames: int) -> Tensor:
    """(B, C, F, H, W) to (B F, H W, C)."""
    latents = x.unflatten(1, (frames, -1)).permute(0, 3, 1, 2)[..., None]
    return latents.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(2).transpose(1, 2)


def and_back(x: Tensor, frames: int) -> Tensor:
    return torch.cat(list(F.gelu(frames_apart(x, frames)).split(1)), 0).view(x.shape)


class Folded(nn.Module):
    def __init__(self, fold: Fold, frames: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.fold, self.frames = fold, frames
        self.wide, self.narrow = nn.Linear(WIDTH, 900), nn.Linear(900, WIDTH)  # larger than tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.layer_norm(self.fold(x, self.frames), (WIDTH,))
        tokens = tokens + self.narrow(F.gelu(self.wide(tokens)))
        q, k, v = self.to_qkv(tokens).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("frames", "places"), [(3, 20), (20, 3), (9, 9)])
@pytest.mark.parametrize(
    ("fold", "role"),
    [
        (by_permute, Role.TEMPORAL),
        (by_transpose, Role.TEMPORAL),
        (frames_first, Role.SPATIAL),
        (places_first, Role.TEMPORAL),
        (frames_apart, Role.SPATIAL),
        (from_latents, Role.SPATIAL),
    ],
)
def test_folds_are_seen_at_any_batch_and_length(
    fold: Fold, role: Role, frames: int, places: int, batch: int
) -> None:
    (site,) = sites_of(Folded(fold, frames).eval(), torch.randn(batch, frames * places, WIDTH))
    assert (site.role, site.reason) == (role, Reason.PART_OF_CLIP)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fold_that_was_taken_back_is_none(batch: int) -> None:
    (site,) = sites_of(Folded(and_back, FRAMES).eval(), torch.randn(batch, TOKENS, WIDTH))
    assert site.role is Role.SELF


@pytest.mark.parametrize(("frames", "rows", "columns"), [(3, 20, 4), (20, 3, 4), (2, 3, 30)])
@pytest.mark.parametrize("batch", [1, 2])
def test_columns_of_frames_are_places(frames: int, rows: int, columns: int, batch: int) -> None:
    def fold(x: Tensor, frames: int) -> Tensor:
        return x.permute(0, 2, 4, 3, 1).flatten(0, 2)

    latents = torch.randn(batch, WIDTH, frames, rows, columns)
    (site,) = sites_of(Folded(fold, frames).eval(), latents)
    assert (site.role, site.reason) == (Role.SPATIAL, Reason.PART_OF_CLIP)


def test_tokens_before_the_batch_are_no_fold() -> None:
    class TokensFirst(Folded):
        def forward(self, x: Tensor) -> Tensor:
            qkv = self.to_qkv(F.gelu(x).transpose(0, 1)).unflatten(-1, (3, HEADS, DIM))
            return F.scaled_dot_product_attention(*qkv.permute(2, 1, 3, 0, 4))

    (site,) = sites_of(TokensFirst(and_back, FRAMES).eval(), torch.randn(2, TOKENS, WIDTH))
    assert (site.role, site.reason) == (Role.SELF, None)
