"""Text that cannot be told from the video is named, and nothing is where all is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from joined_stack import TEXT, TEXT_AT, VIDEO, WIDTH, Stack, attend, inputs
from torch import Tensor
from traced_graphs import sites_of


def by_sample(x: Tensor, text: Tensor) -> Tensor:
    """Each sample of a batch written by itself, words after its patches."""
    packed = x.new_zeros(len(x), VIDEO + TEXT, WIDTH)
    for i in range(len(x)):
        packed[i, :VIDEO], packed[i, VIDEO:] = x[i], text[i]
    return packed


# What keeps the number of tokens and moves them, in ways that are not followed.
FLIP = torch.eye(VIDEO + TEXT).flip(0)
REORDERED: dict[str, Callable[[Tensor], Tensor]] = {
    "a permutation": lambda z: FLIP @ z,
    "a product of three dimensions": lambda z: torch.bmm(FLIP[None], z),
    "a product that adds": lambda z: torch.baddbmm(torch.zeros(1), FLIP[None], z),
    "a product that is added": lambda z: torch.addmm(torch.zeros(1), FLIP, z[0])[None],
    "products that are summed up": lambda z: torch.addbmm(torch.zeros(1), FLIP[None], z)[None],
    "letters": lambda z: torch.einsum("nm,bmc->bnc", FLIP, z),
    "a convolution over tokens": lambda z: F.conv1d(z, FLIP[..., None]),
    "a contraction": lambda z: torch.tensordot(FLIP, z[0], 1)[None],
    "fliplr": torch.fliplr,
    "rot90": lambda z: torch.rot90(z, 2, (1, 2)),
    "a sum": lambda z: z * 0 + z.flip(1),
    "lerp": lambda z: torch.lerp(z, z.flip(1), 1.0),
    "a Fourier transform": lambda z: torch.fft.fft(z, dim=1).real,
    "sampling": lambda z: (
        F.grid_sample(z.mT[..., None], torch.zeros(1, VIDEO + TEXT, 1, 2), align_corners=False)[
            ..., 0
        ].mT
    ),
    "circular padding": lambda z: F.pad(z.mT, (TEXT, 0), mode="circular").mT[:, :VIDEO],
    "flat places": lambda z: z.take(torch.arange(z.numel()).view_as(z).flip(1)),
}

# Text that is written into a tensor through what shows a part of it.
WRITTEN: dict[str, Callable[[Tensor, Tensor], object]] = {
    "steps": lambda z, t: z[:, : 6 * TEXT : 6].copy_(t),
    "a part of a part": lambda z, t: z[:, ::2][:, :TEXT].copy_(t),
    "a token": lambda z, t: z.select(1, 3).copy_(t[:, 0]),
    "a window": lambda z, t: z.unfold(1, TEXT, TEXT)[:, 1].copy_(t.mT),
    "a view": lambda z, t: z.view(1, -1, 3, WIDTH)[:, :TEXT, 1].copy_(t),
    "a transpose": lambda z, t: z.mT[..., :TEXT].copy_(t.mT),
    "a chunk": lambda z, t: z.chunk(3, 1)[0][:, :TEXT].copy_(t),
    "a transpose by index": lambda z, t: z.mT.__setitem__((..., slice(TEXT)), t.mT),
}

# Text that is added to what shows a part of a tensor.
ADDED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a slice": lambda z, t: z[:, VIDEO:].add_(t),
    "a difference": lambda z, t: z[:, VIDEO:].sub_(t),
    "steps": lambda z, t: z[:, : 6 * TEXT : 6].add_(t),
    "a token": lambda z, t: z.select(1, 3).add_(t[:, 0]),
    "a view": lambda z, t: z.view(1, -1, 3, WIDTH)[:, :TEXT, 1].add_(t),
    "a transpose": lambda z, t: z.mT[..., :TEXT].add_(t.mT),
    "a scaled product": lambda z, t: z[:, VIDEO:].addcmul_(t, torch.ones_like(t)),
    "a result's place": lambda z, t: torch.add(z[:, VIDEO:], t, out=z[:, VIDEO:]),
    "many tensors": lambda z, t: torch._foreach_add_([z[:, VIDEO:]], [t]),
    "an index": lambda z, t: z.index_add_(1, TEXT_AT, t),
}


def joined_by(write: Callable[[Tensor, Tensor], object], x: Tensor, text: Tensor) -> Tensor:
    """Patches in front of as many zeros as there are words, written into."""
    packed = torch.cat([x, x.new_zeros(1, TEXT, WIDTH)], 1)
    write(packed, text)
    return packed


# What joins text to the video in places that only the values of masks and indices say.
UNTOLD: dict[str, Callable[..., Tensor]] = {
    "by a mask of each feature": lambda m, x, t: torch.where(
        torch.arange(VIDEO * WIDTH).view(VIDEO, WIDTH) < TEXT * WIDTH,
        F.pad(t, (0, 0, 0, VIDEO - TEXT)),
        x,
    ),
    "sample by sample": lambda m, x, t: by_sample(x.repeat(2, 1, 1), t.repeat(2, 1, 1)),
    "by a product over tokens": lambda m, x, t: (
        torch.eye(VIDEO + TEXT).flip(0)[:VIDEO] @ torch.cat([x, t], 1)
    ),
    **{
        f"by {name}": lambda m, x, t, how=how: how(torch.cat([x, t], 1))
        for name, how in REORDERED.items()
    },
    **{
        f"through {name}": lambda m, x, t, how=how: joined_by(how, x, t)
        for name, how in WRITTEN.items()
    },
    **{
        f"added to {name}": lambda m, x, t, how=how: joined_by(how, x, t)
        for name, how in ADDED.items()
    },
    "by a product that is added to patches": lambda m, x, t: torch.addmm(
        x[0], torch.eye(VIDEO, TEXT), t[0]
    )[None],
}


@pytest.mark.parametrize("name", UNTOLD)
def test_text_in_places_that_are_not_known_is_told_of(name: str) -> None:
    for site in sites_of(Stack(UNTOLD[name]), *inputs()):
        assert (site.reason, site.exact.spans, site.exact.untold) == (None, ("", ""), "text, video")


def part_by_part(z: Tensor, x: Tensor, text: Tensor) -> Tensor:
    """Each part of a sequence with more of its own added in place."""
    z[:, :VIDEO] += x
    z[:, VIDEO:] += text
    return z


# Padded text that is added to patches: its places are those of the padding, whatever a mask says.
PADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": lambda x, t: x + t,
    "a sum in place": lambda x, t: x.clone().add_(t),
    "products with masks": lambda x, t: (
        x * (torch.arange(VIDEO) >= TEXT)[None, :, None]
        + t * (1 - (torch.arange(VIDEO) >= TEXT).float()[:, None])
    ),
    "filled masks": lambda x, t: x.masked_fill((torch.arange(VIDEO) < TEXT)[:, None], 0) + t,
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_text_that_is_added_to_patches_is_exact_there(name: str) -> None:
    def pack(m: Stack, x: Tensor, t: Tensor) -> Tensor:
        return PADDED[name](x, F.pad(t, (0, 0, 0, VIDEO - TEXT)))

    for site in sites_of(Stack(pack), *inputs()):
        assert site.exact.spans == (f"0:{TEXT}",) * 2


@pytest.mark.parametrize(
    "pack",
    [
        lambda m, x, t: x,
        lambda m, x, t: torch.cat([x, t], 1),
        lambda m, x, t: x + t.mean(1, keepdim=True),
        lambda m, x, t: x * (t.mean(1, keepdim=True) > 0) + t.mean(1, keepdim=True),
        lambda m, x, t: x + attend(x, t, t),
        lambda m, x, t: F.pad(x, (0, 0, 0, 3)) * F.pad(m.ff(x), (0, 0, 0, 3)),
        lambda m, x, t: part_by_part(torch.cat([x, t], 1), m.ff(x), t),
        lambda m, x, t: torch.addmm(x[0], x[0], m.ff.weight)[None],
    ],
    ids=[
        "video",
        "joined",
        "pooled",
        "gated",
        "cross-attention",
        "product",
        "parts",
        "linear",
    ],
)
def test_nothing_is_untold_where_places_are_known(pack: Callable[..., Tensor]) -> None:
    for site in sites_of(Stack(pack), *inputs()):
        assert site.exact.untold == ""
