"""Writes attention in random patterns, and things that merely look like attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

HEADS, DIM, WIDTH = 2, 32, 24

PRODUCTS = ("operator", "matmul", "bmm", "einsum", "einsum_bshd", "baddbmm", "method")
SCALES = ("none", "times", "divided", "in_place", "on_q", "on_both")
MASKS = (
    "none", "fill", "fill_finite", "fill_statement", "where", "where_not", "added", "added_first",
    "square_padding", "square_any", "added_square_any",
)  # fmt: skip
SOFTMAXES = ("function", "method", "float32", "upcast", "module")
NEAR_MISSES = (
    "wrong_axis", "scores_reused", "weights_returned", "k_overwritten", "mask_overwritten",
    "values_of_others", "two_products", "weights_masked", "sigmoid", "other_contraction",
    "tensor_scale", "causal", "learned_bias", "window", "weights_overwritten", "scores_indexed",
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """One way to write one attention; `near_miss` spoils it."""

    product: str = "matmul"
    scale: str = "times"
    mask: str = "none"
    softmax: str = "function"
    dropout: bool = False
    bshd: bool = True
    heads_last: bool = False
    near_miss: str | None = None


def written() -> st.SearchStrategy[Written]:
    """Attention in a random pattern."""
    return st.builds(
        Written,
        product=st.sampled_from(PRODUCTS),
        scale=st.sampled_from(SCALES),
        mask=st.sampled_from(MASKS),
        softmax=st.sampled_from(SOFTMAXES),
        dropout=st.booleans(),
        bshd=st.booleans(),
    )


def near_misses() -> st.SearchStrategy[Written]:
    """What looks like attention in a random pattern and is not, or must not be replaced."""
    return st.builds(
        Written,
        product=st.sampled_from(("operator", "matmul", "einsum", "method")),
        scale=st.sampled_from(SCALES),
        softmax=st.sampled_from(SOFTMAXES),
        dropout=st.booleans(),
        bshd=st.booleans(),
        near_miss=st.sampled_from(NEAR_MISSES),
    )


class Layer(nn.Module):
    """Projections of x (B, N, WIDTH) around attention that is written as `how` says.

    Takes x, other tokens of the same shape, the tokens that are valid (B, N) bool, and a square
    mask (1, 1, N, N) bool of any content.
    """

    def __init__(self, how: Written) -> None:
        super().__init__()
        self.how = how
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.softmax = nn.Softmax(dim=-1)
        self.temperature = nn.Parameter(torch.tensor([[[0.5]], [[0.3]]]))
        self.bias = nn.Parameter(torch.randn(HEADS, 1, 1))

    def forward(self, x: Tensor, other: Tensor, valid: Tensor, square: Tensor) -> Tensor:
        how = self.how
        source = other if how.near_miss == "values_of_others" else x
        q, k, v = (
            layer(t).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for layer, t in ((self.to_q, x), (self.to_k, x), (self.to_v, source))
        )
        if not how.bshd:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        root = 1 / math.sqrt(DIM)
        if how.scale == "on_q":
            q = q * root
        elif how.scale == "on_both":
            q, k = q * root**0.5, k * root**0.5
        flat = how.product in ("bmm", "baddbmm")
        if flat:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            valid = valid.repeat_interleave(HEADS, 0)[:, None, :]
            square = square[0]
        else:
            valid = valid[:, None, None, :]
        scores = self._product(q, k)
        if how.near_miss == "two_products":
            scores = scores + q @ q.mT
        if how.near_miss == "k_overwritten":
            k.mul_(2.0)
        if how.scale == "times":
            scores = scores * root
        elif how.scale == "divided":
            scores = scores / math.sqrt(DIM)
        elif how.scale == "in_place":
            scores *= root
        scores = self._spoiled(self._masked(scores, valid, square), valid)
        weights = self._weights(scores, v.dtype)
        if how.near_miss == "weights_masked":
            weights = weights * valid
        if how.near_miss == "weights_overwritten":
            weights[..., :2] = 0.0
        out = self._values(weights, v)
        if how.near_miss == "scores_reused":
            out = out + scores.mean(-1, keepdim=True)
        if how.near_miss == "weights_returned":
            out = out + weights.amax(-1, keepdim=True)
        if how.near_miss == "k_overwritten":
            out = out + k
        return out.unflatten(0, (-1, HEADS)) if flat else out

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        match self.how.product:
            case "operator":
                return q @ k.transpose(-2, -1)
            case "matmul":
                return torch.matmul(q, k.permute(0, 1, 3, 2))
            case "method":
                return q.matmul(k.mT)
            case "bmm":
                return torch.bmm(q, k.transpose(1, 2))
            case "baddbmm":
                unread = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
                return torch.baddbmm(unread, q, k.transpose(1, 2), beta=0)
            case "einsum":
                return torch.einsum("bhid, bhjd -> bhij", q, k)
            case _:
                return torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2))

    def _masked(self, scores: Tensor, valid: Tensor, square: Tensor) -> Tensor:
        lowest = -1e9 if scores.dtype != torch.float16 else -6e4
        match self.how.mask:
            case "fill":
                return scores.masked_fill(~valid, float("-inf"))
            case "fill_finite":
                return scores.masked_fill(~valid, lowest)
            case "fill_statement":
                scores.masked_fill_(~valid, float("-inf"))
                return scores
            case "where":
                return torch.where(valid, scores, float("-inf"))
            case "where_not":
                return torch.where(~valid, lowest, scores)
            case "added" | "added_first":
                bias = torch.zeros_like(valid, dtype=scores.dtype).masked_fill(~valid, lowest)
                return scores + bias if self.how.mask == "added" else bias + scores
            case "square_padding":
                return scores.masked_fill(~(valid.transpose(-2, -1) & valid), lowest)
            case "square_any":
                return scores.masked_fill(~square, float("-inf"))
            case "added_square_any":
                bias = torch.zeros_like(square, dtype=scores.dtype)
                return scores + bias.masked_fill(~square, -1e4)
            case _:
                return scores

    def _spoiled(self, scores: Tensor, valid: Tensor) -> Tensor:
        place = torch.arange(scores.shape[-1])
        match self.how.near_miss:
            case "tensor_scale":
                return scores * self.temperature
            case "causal":
                return scores.masked_fill(place[None, :] > place[:, None], float("-inf"))
            case "window":
                return scores.masked_fill((place[None, :] - place[:, None]).abs() > 9, -1e9)
            case "learned_bias":
                return scores + self.bias * place
            case "mask_overwritten":
                drop = ~valid
                scores = scores.masked_fill(drop, float("-inf"))
                drop.logical_not_()
                return scores
            case "scores_indexed":
                scores[:, :, :, 3] = -1e9
                return scores
            case _:
                return scores

    def _weights(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        if self.how.near_miss == "wrong_axis":
            return scores.softmax(-2)
        if self.how.near_miss == "sigmoid":
            return scores.sigmoid()
        match self.how.softmax:
            case "function":
                weights = F.softmax(scores, dim=-1)
            case "method":
                weights = scores.softmax(scores.dim() - 1)
            case "float32":
                weights = torch.softmax(scores, -1, dtype=torch.float32).to(dtype)
            case "upcast":
                weights = scores.float().softmax(dim=-1).to(dtype)
            case _:
                weights = self.softmax(scores)
        return F.dropout(weights, 0.1, self.training) if self.how.dropout else weights

    def _values(self, weights: Tensor, v: Tensor) -> Tensor:
        if self.how.near_miss == "other_contraction":
            return weights.transpose(-2, -1) @ v
        match self.how.product:
            case "operator":
                return weights @ v
            case "bmm" | "baddbmm":
                return torch.bmm(weights, v)
            case "einsum":
                return torch.einsum("b h i j, b h j d -> b h i d", weights, v)
            case "einsum_bshd":
                out = torch.einsum("bhij,bjhd->bihd", weights, v.transpose(1, 2))
                return out.transpose(1, 2)
            case _:
                return torch.matmul(weights, v)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(tokens: int, batch: int, seed: int, dtype: torch.dtype) -> Inputs:
    """x, other tokens, valid tokens with a few left out, and a square mask with a full diagonal."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(batch, tokens, WIDTH, generator=generator).to(dtype) for _ in range(2))
    valid = torch.rand(batch, tokens, generator=generator) < 0.8
    valid[:, 0] = True
    square = torch.rand(1, 1, tokens, tokens, generator=generator) < 0.7
    square |= torch.eye(tokens, dtype=torch.bool)
    return x, other, valid, square
