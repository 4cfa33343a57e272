"""Roles and text spans of small modules written the ways that models write attention.

Longer than 400 lines: one table of modules, each beside those that it must be told apart from.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from traced_graphs import sites_of

from svg_ear_compile.passes.site import AttentionSite, Reason, Role

HEADS, DIM, WIDTH, VIDEO, TEXT, FRAMES = 2, 32, 16, 48, 6, 3


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


class JoinedBefore(Projections):
    """Keys are tokens of others in front, joined before they are projected."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = F.layer_norm(x, (WIDTH,))
        every = F.layer_norm(torch.cat([text, x], dim=1), (WIDTH,)) * 2
        q, k, v = split(self.to_q(x)), split(self.to_k(every)), split(self.to_v(every))
        return F.scaled_dot_product_attention(q, k, v)


class Newest(Projections):
    """The last tokens attend to all."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = split(self.to_q(self.norm_of_tokens(x[:, -64:])))
        return F.scaled_dot_product_attention(q, split(self.to_k(x)), split(self.to_v(x)))

    def norm_of_tokens(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,))


class JoinedOfOthers(Projections):
    """Keys that are joined, but not of the queries."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return Cross.forward(self, x, torch.cat([text, text[:, :3]], dim=1))


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


class Spatial(Projections):
    """Frames folded into the batch: (B F, P, C) from (B, F P, C)."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = F.gelu(x).unflatten(1, (FRAMES, -1)).flatten(0, 1)
        q, k, v = (split(layer(h)) for layer in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(q, k, v)


class Temporal(Projections):
    """Places folded into the batch: (B P, F, C)."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = x.reshape(x.shape[0], FRAMES, -1, WIDTH).permute(0, 2, 1, 3).reshape(-1, FRAMES, WIDTH)
        q, k, v = (split(layer(h)) for layer in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(q, k, v)


class Unfolded(Spatial):
    """Folded for a convolution, then whole again."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = F.gelu(x.unflatten(1, (FRAMES, -1)).flatten(0, 1)).unflatten(0, (-1, FRAMES))
        return SelfAttention.forward(self, h.flatten(1, 2), text)


class FlatProjections(Projections):
    """Tokens of all samples projected as one list: no fold of the clip."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            split(layer(x.view(-1, WIDTH)).view(*x.shape[:2], -1))
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v)


class HeadsInBatch(Projections):
    """Heads folded into the batch for a 3-D call."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (split(layer(x)).flatten(0, 1) for layer in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(q, k, v)


class NormedApart(Projections):
    """Each projection normalises the sequence for itself."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            split(layer(F.layer_norm(x, (WIDTH,)) * (1 + text.mean(1, keepdim=True))))
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v)


class CrossNormedAlike(Projections):
    """Two sequences modulated by one condition are two sequences."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        other, scale = torch.cat([text] * (VIDEO // TEXT), 1), 1 + text.mean(1, keepdim=True)
        q, k, v = (
            split(layer(F.layer_norm(t, (WIDTH,)) * scale))
            for layer, t in ((self.to_q, x), (self.to_k, other), (self.to_v, other))
        )
        return F.scaled_dot_product_attention(q, k, v)


class ValuesWithoutPositions(Projections):
    """Queries and keys get positions, values do not: still one sequence."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        at = F.layer_norm(x, (WIDTH,)) + torch.arange(x.shape[1]).view(1, -1, 1)
        q, k, v = (split(f(t)) for f, t in ((self.to_q, at), (self.to_k, at), (self.to_v, x)))
        return F.scaled_dot_product_attention(q, k, v)


class ValuesOfOthers(Projections):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        other = torch.cat([text] * (VIDEO // TEXT), 1)
        q, k, v = (split(f(t)) for f, t in ((self.to_q, x), (self.to_k, x), (self.to_v, other)))
        return F.scaled_dot_product_attention(q, k, v)


class RotatedInPart(Projections):
    """The sequence arrives in one piece; RoPE is for the video tokens alone."""

    video = slice(TEXT, None)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = q.clone(), k.clone()
        q[:, :, self.video] = -q[:, :, self.video]
        k[:, :, self.video] = -k[:, :, self.video]
        return F.scaled_dot_product_attention(q, k, v)


class RotatedInPartTextLast(RotatedInPart):
    video = slice(None, -TEXT)


class FilledUp(Projections):
    """Zeros behind the tokens are no text."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return SelfAttention.forward(self, torch.cat([x, x.new_zeros(1, TEXT, WIDTH)], 1), text)


class Written(Projections):
    """Tokens that are written into new memory are the video still."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = torch.empty_like(x)
        for start in range(0, VIDEO, 50):
            tokens[:, start : start + 50] = x[:, start : start + 50] * 2
        return SelfAttention.forward(self, tokens, text)


class TokenIds(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return SelfAttention.forward(self, self.words(torch.arange(VIDEO)[None] % 9), text)


class Checkpointed(Projections):
    """q, k and v cross into a child graph, from one sequence or from two."""

    cross = False

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        source = F.gelu(text) if self.cross else x
        q, k, v = split(self.to_q(x)), split(self.to_k(source)), split(self.to_v(source))
        return checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False)


class CheckpointedCross(Checkpointed):
    cross = True


def site_of(module: nn.Module, video: int = VIDEO) -> AttentionSite:
    (site,) = sites_of(module, torch.randn(1, video, WIDTH), torch.randn(1, TEXT, WIDTH))
    return site


def places(text: tuple[int, int], tokens: int) -> str:
    """Places of so many tokens before and after the video, in a sequence of `tokens`."""
    before, after = text
    spans = [f"0:{before}"] if before else []
    spans += [f"{tokens - after}:{tokens}"] if after else []
    return ", ".join(spans)


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
        (Prefix, Role.PREFIX, (TEXT, 0), None),
        (JoinedBefore, Role.PREFIX, (TEXT, 0), None),
        (Newest, Role.PREFIX, (0, 0), None),
        (JoinedOfOthers, Role.CROSS, (0, 0), Reason.CROSS_ATTENTION),
        (RopeTables, Role.SELF, (0, 0), None),
        (Spatial, Role.SPATIAL, (0, 0), Reason.PART_OF_CLIP),
        (Temporal, Role.TEMPORAL, (0, 0), Reason.PART_OF_CLIP),
        (Unfolded, Role.SELF, (0, 0), None),
        (FlatProjections, Role.SELF, (0, 0), None),
        (HeadsInBatch, Role.SELF, (0, 0), None),
        (NormedApart, Role.SELF, (0, 0), None),
        (CrossNormedAlike, Role.CROSS, (0, 0), Reason.CROSS_ATTENTION),
        (ValuesWithoutPositions, Role.SELF, (0, 0), None),
        (ValuesOfOthers, Role.SELF, (0, 0), Reason.VALUES),
        (RotatedInPart, Role.JOINT, (TEXT, 0), None),
        (RotatedInPartTextLast, Role.JOINT, (0, TEXT), None),
        (FilledUp, Role.SELF, (0, 0), None),
        (Written, Role.SELF, (0, 0), None),
        (TokenIds, Role.SELF, (0, 0), Reason.TEXT),
        (Checkpointed, Role.SELF, (0, 0), None),
        (CheckpointedCross, Role.CROSS, (0, 0), Reason.CROSS_ATTENTION),
    ],
)
def test_role_and_text(
    kind: type[Projections], role: Role, text: tuple[int, int], reason: Reason | None
) -> None:
    site = site_of(kind())
    assert (site.role, site.reason) == (role, reason)
    found = places(text, site.k_shape[2])
    assert site.exact.spans == ("" if role is Role.PREFIX else found, found)


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
    assert (site.role, site.exact.spans) == (Role.SELF, ("", ""))


def test_the_layer_is_told_by_a_parameter_that_reaches_q() -> None:
    site = site_of(Joint())
    assert site.layer_parameter is not None
    assert "to_q" in site.layer_parameter.name or "add_q" in site.layer_parameter.name


class Projected(nn.Module):
    """Attention whose projections are products with parameters, each written in another way."""

    def __init__(self, keys: str) -> None:
        super().__init__()
        self.keys = keys
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Parameter(torch.randn(WIDTH, HEADS, DIM) / 5)
        self.v = nn.Parameter(torch.randn(HEADS * DIM, WIDTH) / 5)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        y = other if self.keys == "other" else x
        k = torch.einsum("bnc,chd->bhnd", y, self.k.to(x.dtype))
        v = (y @ self.v.T).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(("keys", "role"), [("own", Role.SELF), ("other", Role.CROSS)])
def test_a_product_with_a_parameter_is_a_projection(keys: str, role: Role) -> None:
    x, other = torch.randn(2, 1, VIDEO, WIDTH)
    (site,) = sites_of(Projected(keys).eval(), x, other)
    assert site.role is role
