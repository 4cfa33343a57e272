"""Kinds of tokens: what is exact at both ends, and how many are left to be clustered."""

from __future__ import annotations

import pytest
import torch

from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, CLUSTERED, EXACT, exact_at_ends


@pytest.mark.parametrize(("before", "after"), [(2, 1), (0, 4), (3, 0), (6, 5)])
def test_both_ends_are_exact_and_the_others_are_counted(before: int, after: int) -> None:
    q, k = torch.zeros(2, 3, 11, 8), torch.zeros(2, 1, 13, 8)
    kinds = exact_at_ends(q, k, before, after)
    for found, tokens in ((kinds.queries, 11), (kinds.keys, 13)):
        assert found is not None
        inside = tokens - before - after
        assert found.flatten().tolist() == [EXACT] * before + [CLUSTERED] * inside + [EXACT] * after
    assert kinds.counts(11, 13) == (11 - before - after, 13 - before - after)


def test_without_exact_tokens_all_are_clustered() -> None:
    kinds = exact_at_ends(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 7, 8), 0, 0)
    assert kinds is ALL_CLUSTERED
    assert kinds.counts(5, 7) == (5, 7)
