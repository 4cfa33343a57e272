"""Video is told from text by what reaches an attention: latents, packed into (N, C) too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from joined_stack import TEXT, VIDEO, WIDTH, Stack
from torch import Tensor, nn
from traced_graphs import sites_of

from svg_ear_compile.passes.site import AttentionSite, Reason


class Packed(Stack):
    """Patches (N, C) of all samples, or ids of words, written to their places in one sequence."""

    def __init__(self) -> None:
        super().__init__(lambda m, x, t: x)
        self.lookup = nn.Embedding(50, WIDTH)

    # Other inputs than the stack has: packed tokens have no batch.
    def forward(self, first: Tensor, text: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        tokens = self.patches(first) if first.is_floating_point() else self.lookup(first)
        at = torch.arange(VIDEO + TEXT)
        packed = tokens.new_zeros(VIDEO + TEXT, WIDTH).index_copy(0, at[TEXT:], tokens)
        packed = packed.index_copy(0, at[:TEXT], self.lookup(text))
        return self.block(F.layer_norm(packed, (WIDTH,))[None] * positions)


def site(first: Tensor) -> AttentionSite:
    words, table = torch.arange(TEXT), torch.randn(VIDEO + TEXT, WIDTH)
    (found,) = sites_of(Packed(), first, words, table)
    return found


def test_packed_latents_are_video_and_words_beside_them_exact() -> None:
    found = site(torch.randn(VIDEO, 8))
    assert (found.reason, found.exact.spans) == (None, ("9 by index", "9 by index"))


def test_a_table_of_numbers_makes_no_video_of_words() -> None:
    assert site(torch.arange(VIDEO) % 50).reason is Reason.TEXT
