"""Attention in random patterns is found and kept; what merely looks like it is not touched."""

from __future__ import annotations

import pytest
import torch
from attention_writer import Layer, Written, inputs, near_misses, written
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traced_graphs import Rewriting

SEEDS = st.integers(0, 2**31 - 1)
MORE = settings(max_examples=settings().max_examples * 2)


def check(
    how: Written, seed: int, dtype: torch.dtype, dynamic: bool, batch: int, sites: int
) -> None:
    torch.manual_seed(seed)
    layer, backend = Layer(how).to(dtype).eval(), Rewriting()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for tokens in (67, 91) if dynamic else (67,):
        x = inputs(tokens, batch, seed, dtype)
        with torch.no_grad():
            wanted = layer(*x)
            found = compiled(*x)
            precise = Layer.forward(
                layer.double(), *(t.double() if t.is_floating_point() else t for t in x)
            )
            layer.to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)
        assert (found.double() - precise).norm() <= 3 * (wanted.double() - precise).norm() + 1e-5
    assert backend.rewritten == sites * backend.calls
    assert backend.calls == 1


@MORE
@given(
    how=written(),
    seed=SEEDS,
    low=st.booleans(),
    dynamic=st.booleans(),
    batch=st.sampled_from((1, 2)),
)
@example(
    how=Written("einsum_bshd", "on_both", "square_any", "upcast"),
    seed=1,
    low=True,
    dynamic=True,
    batch=2,
)
@example(how=Written("baddbmm", "none", "square_any"), seed=1, low=False, dynamic=True, batch=1)
@example(
    how=Written("operator", "in_place", "fill_statement"), seed=1, low=False, dynamic=False, batch=2
)
@pytest.mark.slow
def test_every_true_attention_is_found(
    how: Written, seed: int, low: bool, dynamic: bool, batch: int
) -> None:
    check(how, seed, torch.bfloat16 if low else torch.float32, dynamic, batch, sites=1)


@MORE
@given(how=near_misses(), seed=SEEDS, dynamic=st.booleans())
@pytest.mark.slow
def test_no_near_miss_is_touched(how: Written, seed: int, dynamic: bool) -> None:
    check(how, seed, torch.float32, dynamic, batch=2, sites=0)
