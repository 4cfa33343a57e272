"""Every spelling is found, means what it says, and is left alone where a detail is another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from traced_graphs import ALL_BLOCKS, Rewriting, graphs_of, run_rewritten, sites_of

from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.spellings import PRODUCTS, STEPS, Example

HEADS, TOKENS, DIM = 2, 61, 32
SPELLINGS = [pytest.param(s.example, id=s.name) for s in (*PRODUCTS, *STEPS)]


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, TOKENS, DIM, dtype=dtype) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("example", SPELLINGS)
def test_a_spelling_is_found_and_rewritten_to_the_same_numbers(example: Example) -> None:
    given, backend = qkv(), Rewriting()
    (site,) = sites_of(example, *given)
    assert site.reason is None
    out = run_rewritten(example, *given, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(out, example(*given), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("example", SPELLINGS)
def test_nothing_of_a_spelling_is_left_in_the_graph(example: Example) -> None:
    (gm,) = graphs_of(example, *qkv())
    (site,) = find_sites(gm)
    rewrite(gm, [(site, ALL_BLOCKS)])
    assert not set(site.call.steps) & set(gm.graph.nodes)
    unread = {node.name for node in gm.graph.nodes if not node.users}
    assert unread == {"output"}
