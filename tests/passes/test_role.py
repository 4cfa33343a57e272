"""Roles and text spans of small modules written the ways that models write attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced_graphs import sites_of

from svg_ear_compile.passes.site import AttentionSite, Reason, Role

HEADS, DIM, WIDTH, VIDEO, TEXT = 2, 32, 16, 48, 6


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.add_q, self.add_k, self.add_v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.to_qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.norm = nn.LayerNorm(DIM)
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, HEADS * DIM)


class SelfAttention(Projections):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k = self.norm(split(self.to_q(x))), self.norm(split(self.to_k(x)))
        return F.scaled_dot_product_attention(q, k, split(self.to_v(x)))


class Cross(Projections):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            split(self.to_q(x)), split(self.to_k(text)), split(self.to_v(text))
        )


class Joint(Projections):
    """Two streams, projected apart and concatenated."""

    text_first = False

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        streams = []
        for video, added in (
            (self.to_q, self.add_q),
            (self.to_k, self.add_k),
            (self.to_v, self.add_v),
        ):
            parts = [split(video(x)), split(added(text))]
            streams.append(torch.cat(parts[::-1] if self.text_first else parts, dim=2))
        return F.scaled_dot_product_attention(*streams)


class JointTextFirst(Joint):
    text_first = True


class SingleStream(Projections):
    """One stream, concatenated before it is projected."""

    text_first = False

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = torch.cat([text, x] if self.text_first else [x, text], dim=1)
        h = F.gelu(h) + h
        q, k, v = (split(layer(h)) for layer in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)


class SingleStreamTextFirst(SingleStream):
    text_first = True


class Fused(Projections):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*map(split, self.to_qkv(x).chunk(3, dim=-1)))


class Lora(Projections):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.to_q(x) + self.up(self.down(x.to(torch.float32)))
        return F.scaled_dot_product_attention(
            split(q), split(self.to_k(x) + self.up(self.down(x))), split(self.to_v(x))
        )


class RopeIntoBuffer(Projections):
    """q and k reach attention only through writes into buffers."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        rotated = []
        for t in (split(self.to_q(x)), split(self.to_k(x))):
            out = torch.empty_like(t)
            out[..., 0::2] = -t[..., 1::2]
            out[..., 1::2] = t[..., 0::2]
            rotated.append(out)
        return F.scaled_dot_product_attention(*rotated, split(self.to_v(x)))


class CrossRopeIntoBuffer(Projections):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k = torch.empty(1, HEADS, VIDEO, DIM), torch.empty(1, HEADS, TEXT, DIM)
        q[:] = split(self.to_q(x))
        k.copy_(split(self.to_k(text)))
        return F.scaled_dot_product_attention(q, k, split(self.to_v(text)))


class Prefix(Projections):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        k = torch.cat([split(self.add_k(text)), split(self.to_k(x))], dim=2)
        v = torch.cat([split(self.add_v(text)), split(self.to_v(x))], dim=2)
        return F.scaled_dot_product_attention(split(self.to_q(x)), k, v)


class RopeTables(Projections):
    """An embedding and a product make the angles; neither is a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Embedding(VIDEO, DIM)
        self.positions = torch.arange(VIDEO)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        table = torch.matmul(self.angles(self.positions), torch.eye(DIM)).cos()
        return F.scaled_dot_product_attention(
            split(self.to_q(x)) * table, split(self.to_k(x)) * table, split(self.to_v(x))
        )


def site_of(module: nn.Module, video: int = VIDEO) -> AttentionSite:
    (site,) = sites_of(module, torch.randn(1, video, WIDTH), torch.randn(1, TEXT, WIDTH))
    return site


@pytest.mark.parametrize(
    ("kind", "role", "text", "reason"),
    [
        (SelfAttention, Role.SELF, (0, 0), None),
        (Cross, Role.CROSS, (0, 0), Reason.CROSS_ATTENTION),
        (Joint, Role.JOINT, (0, TEXT), None),
        (JointTextFirst, Role.JOINT, (TEXT, 0), None),
        (SingleStream, Role.JOINT, (0, TEXT), None),
        (SingleStreamTextFirst, Role.JOINT, (TEXT, 0), None),
        (Fused, Role.SELF, (0, 0), None),
        (Lora, Role.SELF, (0, 0), None),
        (RopeIntoBuffer, Role.SELF, (0, 0), None),
        (CrossRopeIntoBuffer, Role.CROSS, (0, 0), Reason.CROSS_ATTENTION),
        (Prefix, Role.PREFIX, (0, 0), Reason.PREFIX),
        (RopeTables, Role.SELF, (0, 0), None),
    ],
)
def test_role_and_text(
    kind: type[Projections], role: Role, text: tuple[int, int], reason: Reason | None
) -> None:
    site = site_of(kind())
    assert (site.role, site.reason) == (role, reason)
    assert site.text.traced == text


def test_a_cross_attention_of_equal_lengths_is_still_cross() -> None:
    assert site_of(Cross(), video=TEXT).role is Role.CROSS


def test_rotating_halves_is_no_text() -> None:
    class Rotated(Projections):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            q, k, v = (split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
            q, k = (torch.cat([-t[..., DIM // 2 :], t[..., : DIM // 2]], -1) for t in (q, k))
            return F.scaled_dot_product_attention(q, k, v)

    # As many tokens as channels: the lengths alone would not tell.
    site = site_of(Rotated(), video=DIM)
    assert (site.role, site.text.traced) == (Role.SELF, (0, 0))


def test_the_layer_is_told_by_a_parameter_that_reaches_q() -> None:
    site = site_of(Joint())
    assert site.layer_parameter is not None
    assert "to_q" in site.layer_parameter.name or "add_q" in site.layer_parameter.name
