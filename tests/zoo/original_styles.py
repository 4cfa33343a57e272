"""Video transformers in the styles of original repositories, which diffusers' classes are not.

Each block attends to its own tokens and to a text; latents are (1, 4, 3, 16, 16), text (1, 9, 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, TEXT_WIDTH, HEADS, HEAD_DIM, BLOCKS = 4, 16, 2, 32, 2
WIDTH = HEADS * HEAD_DIM
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _inputs() -> tuple[Tensor, ...]:
    latents, text = torch.randn(1, CHANNELS, 3, 16, 16), torch.randn(1, 9, TEXT_WIDTH)
    return latents, torch.tensor([500.0]), text


def _timestep(t: Tensor) -> Tensor:
    """(B, WIDTH) sines and cosines."""
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(WIDTH // 2) / (WIDTH // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def _feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class _Video(nn.Module):
    """Patches of (1, 2, 2), blocks of one kind, and back; `sequence_first` is (N, B, C) inside."""

    def __init__(self, block: Callable[[int], nn.Module], sequence_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text, self.time = nn.Linear(TEXT_WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block(place) for place in range(BLOCKS))
        self.out = nn.Linear(WIDTH, CHANNELS * 4)
        self.sequence_first = sequence_first

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, **options: Any) -> Tensor:
        x = self.patches(latents)
        frames, height, width = x.shape[2:]
        x, text = x.flatten(2).transpose(1, 2), self.text(text)
        time = self.time(F.silu(_timestep(t)))[:, None]
        if self.sequence_first:
            x, text, time = (tokens.transpose(0, 1).contiguous() for tokens in (x, text, time))
        for block in self.blocks:
            x = block(x, time, text, **options)
        x = self.out(x.transpose(0, 1) if self.sequence_first else x)
        x = x.view(-1, frames, height, width, CHANNELS, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return x.reshape(latents.shape)


class _ScaledMaskedSoftmax(nn.Module):
    """In float32, after scores that are masked by -10000."""

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        dtype = scores.dtype
        scores = scores.float()
        if mask is not None:
            scores = scores.masked_fill(mask, -10000.0)
        return torch.nn.Softmax(dim=-1)(scores).to(dtype)


class MegatronAttention(nn.Module):
    """Tokens first; scores by baddbmm into a buffer, viewed apart for the softmax and folded."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.query_key_value = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 8)
        self.softmax = _ScaledMaskedSoftmax()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        weights = self.query_key_value.chunk(3)
        q, k, v = (
            torch.matmul(tokens, weight.t()).view(*tokens.shape[:2], HEADS, HEAD_DIM)
            for tokens, weight in zip((x, source, source), weights, strict=True)
        )
        tokens, batch, keys = q.shape[0], q.shape[1], k.shape[0]
        size = (batch, HEADS, tokens, keys)
        q = q.view(tokens, batch * HEADS, -1)
        k = k.view(keys, batch * HEADS, -1)
        buffer = torch.empty(batch * HEADS, tokens, keys, dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(
            buffer, q.transpose(0, 1), k.transpose(0, 1).transpose(1, 2),
            beta=0.0, alpha=1 / math.sqrt(HEAD_DIM),
        )  # fmt: skip
        weights_of_keys = self.softmax(scores.view(size), mask)
        v = v.view(keys, batch * HEADS, -1)
        context = torch.bmm(weights_of_keys.view(batch * HEADS, tokens, keys), v.transpose(0, 1))
        context = context.view(batch, HEADS, tokens, HEAD_DIM).permute(2, 0, 1, 3).contiguous()
        return self.dense(context.view(tokens, batch, WIDTH))  # type: ignore[no-any-return]


class MegatronBlock(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.self_attention, self.inter_attention = (MegatronAttention(c) for c in (False, True))
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        h = F.layer_norm(x, (WIDTH,)) + time
        none = torch.zeros(1, 1, 1, len(x), dtype=torch.bool, device=x.device)
        x = x + self.self_attention(h, h, none)
        x = x + self.inter_attention(F.layer_norm(x, (WIDTH,)), text, None)
        return x + self.mlp(F.layer_norm(x, (WIDTH,)))  # type: ignore[no-any-return]


Attend = Callable[..., Tensor]


def attention_basic(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """(B, N, H D) each; products by einsum, in float32 where that is asked for."""
    b, _, inner = q.shape
    d = inner // heads
    q, k, v = (
        t.unsqueeze(3).reshape(b, -1, heads, d).permute(0, 2, 1, 3).reshape(b * heads, -1, d)
        for t in (q, k, v)
    )
    if attn_precision == torch.float32:
        sim = torch.einsum("b i d, b j d -> b i j", q.float(), k.float()) * d**-0.5
    else:
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * d**-0.5
    if mask is not None:
        sim.masked_fill_(~mask[:, None].expand(b, heads, -1).flatten(0, 1)[:, None], -1e9)
    out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1).to(v.dtype), v)
    return out.unsqueeze(0).reshape(b, heads, -1, d).permute(0, 2, 1, 3).reshape(b, -1, heads * d)


def attention_pytorch(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """The same by PyTorch."""
    q, k, v = (
        t.view(t.shape[0], -1, heads, t.shape[2] // heads).transpose(1, 2) for t in (q, k, v)
    )
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if mask is None else mask[:, None, None], dropout_p=0.0
    )
    return out.transpose(1, 2).flatten(2)


def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, transformer_options: dict[str, Any], **kwargs: Any
) -> Tensor:
    """The default, or what the options name instead of it."""
    override = transformer_options.get("optimized_attention_override")
    if override is not None:
        result: Tensor = override(
            attention_basic, q, k, v, heads, transformer_options=transformer_options, **kwargs
        )
        return result
    return attention_basic(q, k, v, heads, **kwargs)


def even_blocks_by_pytorch(default: Attend, *args: Any, **kwargs: Any) -> Tensor:
    _, place = kwargs["transformer_options"]["block"]
    return (attention_pytorch if place % 2 == 0 else default)(*args, **kwargs)


def rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """Pairs of channels of (B, N, H D) turned by matrices (N, D/2, 2, 2)."""
    pairs = x.unflatten(-1, (HEADS, -1, 1, 2)).float()
    turned = freqs[:, None, ..., 0] * pairs[..., 0] + freqs[:, None, ..., 1] * pairs[..., 1]
    return turned.reshape(x.shape).type_as(x)


class OptionsAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor, turn: bool, options: dict[str, Any]) -> Tensor:
        q, k, v = self.q(x), self.k(source), self.v(source)
        if turn:
            angles = torch.arange(x.shape[1])[:, None] / 100 ** (torch.arange(HEAD_DIM // 2) / 16)
            cos, sin = angles.cos(), angles.sin()
            freqs = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
            q, k = rotated(q, freqs), rotated(k, freqs)
        out = optimized_attention(
            q, k, v, HEADS, transformer_options=options, attn_precision=torch.float32
        )
        return self.o(out)  # type: ignore[no-any-return]


class OptionsBlock(nn.Module):
    """Attends by whatever a dictionary of options says."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.self_attn, self.cross_attn = OptionsAttention(), OptionsAttention()
        self.ffn = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, transformer_options: dict[str, Any]
    ) -> Tensor:
        options = {**transformer_options, "block": ("blocks", self.place)}
        h = F.layer_norm(x, (WIDTH,)) + time
        x = x + self.self_attn(h, h, True, options)
        x = x + self.cross_attn(F.layer_norm(x, (WIDTH,)), text, False, options)
        return x + self.ffn(F.layer_norm(x, (WIDTH,)))  # type: ignore[no-any-return]


def megatron() -> Made:
    """Megatron: tokens first, projections by a parameter, scores by baddbmm into a buffer."""
    return _Video(MegatronBlock, sequence_first=True), _inputs(), {}


def options_dict() -> Made:
    """An attention function that a dictionary of options overrides, block by block."""
    options = {"optimized_attention_override": even_blocks_by_pytorch, "patches": {}}
    model = _Video(OptionsBlock, sequence_first=False)
    return model, _inputs(), {"transformer_options": options}
