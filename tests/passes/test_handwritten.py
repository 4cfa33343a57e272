"""Every pattern is found, means what it says, and is left alone where a detail is another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced_graphs import Rewriting, run_rewritten, sites_of

from svg_ear_compile.passes.patterns import PRODUCTS, STEPS, Example
from svg_ear_compile.passes.site import Reason

HEADS, TOKENS, DIM = 2, 61, 32
PATTERNS = [pytest.param(s.example, id=s.name) for s in (*PRODUCTS, *STEPS)]


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, TOKENS, DIM, dtype=dtype) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("example", PATTERNS)
def test_a_pattern_is_found_and_rewritten_to_the_same_numbers(example: Example) -> None:
    given, backend = qkv(), Rewriting(aot=False)
    out = run_rewritten(example, *given, backend=backend)
    assert (backend.rewritten, backend.reasons) == (1, [])
    torch.testing.assert_close(out, example(*given), atol=2e-5, rtol=1e-4)
    # Nothing of the pattern is left.
    (site,), gm = backend.sites, backend.graph
    assert gm is not None
    assert not set(site.call.steps) & set(gm.graph.nodes)
    assert {node.name for node in gm.graph.nodes if not node.users} == {"output"}


@pytest.mark.parametrize("example", [pytest.param(s.example, id=s.name) for s in PRODUCTS])
def test_a_rewritten_product_survives_ahead_of_time_autograd(example: Example) -> None:
    given = qkv()
    out = run_rewritten(example, *given, backend=Rewriting())
    torch.testing.assert_close(out, example(*given), atol=2e-5, rtol=1e-4)


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v


def with_temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * v.mean()).softmax(-1) @ v


def with_clamp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(-9, 9).softmax(-1) @ v


def with_two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.arange(TOKENS)
    scores = (q @ k.mT).masked_fill(seen < 3, -1e9).masked_fill(seen > 50, -1e9)
    return scores.softmax(-1) @ v


def with_turned_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(torch.arange(TOKENS) < 3, -1e9)
    return (scores * -0.5).softmax(-1) @ v


def in_five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[None], k[None], v[None]
    return (q @ k.mT).softmax(-1) @ v


def of_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.mT, k.mT, v.mT
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (with_dropout, Reason.DROPOUT),
        (with_temperature, Reason.SCALE),
        (with_clamp, Reason.PATTERN),
        (with_two_masks, Reason.MASK),
        (with_turned_fill, Reason.PATTERN),
        (in_five_dimensions, Reason.LAYOUT),
        (of_channels, Reason.HEAD_DIM),
    ],
)
def test_attention_that_is_left_says_why(call: Example, reason: Reason) -> None:
    (site,) = sites_of(call, *qkv())
    assert site.reason is reason


class OfAnyLength(nn.Module):
    """Attention (B, N, C) whose scores are viewed in other shapes on their way."""

    def __init__(self, in_rows: bool) -> None:
        super().__init__()
        self.qkv, self.in_rows = nn.Linear(24, 3 * HEADS * DIM), in_rows

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        batch, heads, tokens, _ = q.shape
        if self.in_rows:
            scores = (q @ k.mT).view(-1, tokens)
            return scores.softmax(1).view(batch, heads, tokens, tokens) @ v
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(batch, heads, tokens, tokens)
        weights = scores.softmax(-1).view(batch * heads, tokens, tokens)
        return torch.bmm(weights, v.flatten(0, 1)).view(batch, heads, tokens, DIM)


@pytest.mark.parametrize("in_rows", [True, False])
def test_reshapes_are_followed_at_any_length(in_rows: bool) -> None:
    model, backend = OfAnyLength(in_rows).eval(), Rewriting()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in (TOKENS, 33):
        x = torch.randn(2, tokens, 24)
        torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), atol=2e-5, rtol=1e-4)
    assert (backend.calls, backend.rewritten) == (1, 1)
