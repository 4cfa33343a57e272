"""Block masks in the styles of real code: what is padding, what is not, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    noop_mask,
    or_masks,
)

from svg_ear_compile.passes.site import Reason

Function = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Style:
    """A mask of pairs.

    Attributes:
        function: makes the mask function for a number of tokens.
        proven: it is padding.
        reason: why it is left as it is where the function alone tells that.
        batch: samples that differ, None for a mask of all.
    """

    function: Callable[[int], Function]
    proven: bool = True
    reason: Reason | None = None
    batch: int | None = None

    def block_mask(self, tokens: int, keys: int | None = None, **options: Any) -> BlockMask:
        function = self.function(tokens)
        return create_block_mask(
            function, self.batch, None, tokens, keys or tokens, device="cpu", **options
        )


def ends_of(tokens: int, *bounds: int) -> Tensor:
    """For each query the end of its chunk; padding behind the last chunk has 0."""
    ends = torch.zeros(tokens, dtype=torch.long)
    for start, end in zip((0, *bounds), bounds, strict=False):
        ends[start:end] = end
    return ends


def seen_before(*bounds: int | float, own: bool = True) -> Callable[[int], Function]:
    """Every query sees what comes before the end of its chunk, as autoregressive models do."""

    def make(tokens: int) -> Function:
        ends = ends_of(tokens, *(int(b * tokens) for b in bounds))
        if own:
            return lambda b, h, q, kv: (kv < ends[q]) | (q == kv)
        return lambda b, h, q, kv: kv < ends[q]

    return make


def documents(*lengths: int, padded: int = 0) -> Callable[[int], Function]:
    def make(tokens: int) -> Function:
        number = torch.full((tokens,), len(lengths))
        start = 0
        for place, length in enumerate(lengths):
            number[start : start + length] = place
            start += length
        number[tokens - padded :] = -1
        return lambda b, h, q, kv: number[q] == number[kv]

    return make


def valid(tokens: int) -> Tensor:
    torch.manual_seed(3)
    return torch.rand(2, tokens) < 0.6


def of_keys(tokens: int) -> Function:
    keep = valid(tokens)
    return lambda b, h, q, kv: keep[b][kv]


def of_both(tokens: int) -> Function:
    keep = valid(tokens)
    return lambda b, h, q, kv: keep[b, q] & keep[b, kv]


def expanded(tokens: int) -> Function:
    square = valid(tokens)[:, None, None].expand(-1, 4, tokens, -1)
    return lambda b, h, q, kv: square[b, h, q, kv]


def of_lengths(tokens: int) -> Function:
    lengths = torch.tensor([tokens - 33, tokens // 2])
    return and_masks(lambda b, h, q, kv: kv < lengths[b], noop_mask)


def of_a_length(tokens: int) -> Function:
    length = torch.tensor(tokens - 33)
    return lambda b, h, q, kv: kv < length


def two_groups(tokens: int) -> Function:
    length = torch.tensor(tokens - 33)
    return lambda b, h, q, kv: ((q < length) & (kv < length)) | ((q >= length) & (kv >= length))


def padded_document(tokens: int) -> Function:
    number = torch.zeros(tokens, dtype=torch.int32)
    number[:20] = -1
    return and_masks(
        lambda b, h, q, kv: number[q] == number[kv], lambda b, h, q, kv: number[q] >= 0
    )


STYLES: dict[str, Style] = {
    "none": Style(lambda n: noop_mask),
    "a number": Style(lambda n: lambda b, h, q, kv: kv < n - 44),
    "a length": Style(of_a_length),
    "lengths": Style(of_lengths, batch=2),
    "two parts": Style(
        lambda n: or_masks(lambda b, h, q, kv: kv < 40, lambda b, h, q, kv: kv > 99)
    ),
    "keys": Style(of_keys, batch=2),
    "queries and keys": Style(of_both, batch=2),
    "expanded": Style(expanded, batch=2),
    "one chunk": Style(seen_before(1.0)),
    "one chunk, padded": Style(seen_before(0.9)),
    "one chunk, no own": Style(seen_before(0.9, own=False)),
    "chunks": Style(seen_before(0.5, 1.0), proven=False),
    "one document": Style(documents()),
    "documents": Style(documents(100), proven=False),
    "padding sees itself": Style(documents(padded=20), proven=False),
    "padded document": Style(padded_document),
    "two groups": Style(two_groups, proven=False),
    "causal": Style(lambda n: lambda b, h, q, kv: q >= kv, reason=Reason.CAUSAL),
    "window": Style(lambda n: lambda b, h, q, kv: (q - kv).abs() < 40, reason=Reason.CAUSAL),
    "causal chunks": Style(lambda n: lambda b, h, q, kv: q // 50 >= kv // 50, reason=Reason.CAUSAL),
    "of heads": Style(lambda n: lambda b, h, q, kv: kv < 9 * (h + 1), reason=Reason.FLEX),
    "of floats": Style(lambda n: lambda b, h, q, kv: kv.sin() < 0.5, reason=Reason.FLEX),
}
