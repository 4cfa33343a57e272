"""Attention over several processes as context parallelism writes it: ring, Ulysses, and both.

Process ``ring * U + ulysses`` holds the tokens of that place. Ulysses exchanges tokens for heads
within groups of U; the ring then gathers the keys and values of all groups, attends to one part
after the other and merges the parts by their log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention.data import LATENT, latent_video

TOKENS, HEADS, DIM = 512, 2, 32
SHARPNESS = 2.0


class RingAttention(nn.Module):
    """Self-attention of the tokens of all processes, and a residual."""

    def __init__(self, ring: int, ulysses: int, groups: tuple[str, str]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(LATENT, HEADS * DIM) for _ in range(3))
        self.to_out = nn.Linear(HEADS * DIM, LATENT)
        self.ring, self.ulysses = ring, ulysses
        self.ring_group, self.ulysses_group = groups
        with torch.no_grad():  # tokens attend to those that are like them
            self.to_k.weight.lerp_(self.to_q.weight, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        """(1, N / processes, LATENT) of this process to the same."""
        q, k, v = (
            layer(x).unflatten(2, (HEADS, DIM)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (SHARPNESS * F.rms_norm(t, (DIM,)) for t in (q, k))
        if self.ulysses > 1:
            q, k, v = (self._tokens_of_a_head(t) for t in (q, k, v))
        out = self._over_the_ring(q, k, v)
        if self.ulysses > 1:
            out = self._heads_of_a_token(out)
        return x + self.to_out(out.transpose(1, 2).flatten(2))

    def _over_the_ring(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = [torch.stack([k, v])]
        if self.ring > 1:
            pairs = list(
                collectives.all_gather_tensor(pairs[0], 0, self.ring_group).chunk(self.ring)
            )
        out = lse = None
        for key, value in pairs:
            part, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, key, value)
            weight = weight.unsqueeze(-1)
            if out is None or lse is None:
                out, lse = part, weight
            else:
                total = torch.logaddexp(lse, weight)
                out = out * (lse - total).exp() + part * (weight - total).exp()
                lse = total
        assert out is not None
        return out

    def _tokens_of_a_head(self, x: Tensor) -> Tensor:
        """(1, H, n, D) of this process's tokens to (1, H / U, U n, D) of the group's."""
        moved = collectives.all_to_all_single(x[0].contiguous(), None, None, self.ulysses_group)
        return moved.unflatten(0, (self.ulysses, -1)).transpose(0, 1).flatten(1, 2)[None]

    def _heads_of_a_token(self, x: Tensor) -> Tensor:
        """The way back."""
        parts = x[0].unflatten(1, (self.ulysses, -1)).transpose(0, 1).flatten(0, 1)
        return collectives.all_to_all_single(parts.contiguous(), None, None, self.ulysses_group)[
            None
        ]


class RingModel(nn.Module):
    """One layer in a list, as models have them."""

    def __init__(self, ring: int = 1, ulysses: int = 1, groups: tuple[str, str] = ("", "")) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([RingAttention(ring, ulysses, groups)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def ring_model(ring: int = 1, ulysses: int = 1, groups: tuple[str, str] = ("", "")) -> nn.Module:
    """A seeded model for one of ``ring * ulysses`` processes."""
    torch.manual_seed(0)
    return RingModel(ring, ulysses, groups).eval()


def ring_input() -> Tensor:
    """(1, TOKENS, LATENT): tokens that look like those of a video."""
    return latent_video(TOKENS, torch.Generator().manual_seed(0))[0][None]
