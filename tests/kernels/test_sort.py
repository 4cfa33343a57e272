"""The counting sort gives the order of a stable sort, and the kinds of today."""

from __future__ import annotations

import pytest
import torch
from attention_cases import needs_interpreter

from svg_ear_compile.kernels.kinds import CLUSTERED, EXACT, PADDING

DEVICES = (
    pytest.param("cpu", marks=needs_interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("tokens", "clusters"), [(1, 1), (5, 9), (129, 3), (2500, 40), (300, 1300)], ids=str
)
def test_the_order_is_that_of_a_stable_sort(device: str, tokens: int, clusters: int) -> None:
    from svg_ear_compile.kernels.gpu.sort import sort_by_label

    generator = torch.Generator().manual_seed(tokens)
    labels = torch.randint(clusters + 1, (3, tokens), generator=generator, dtype=torch.int32)
    labels[2] = 0
    found = sort_by_label(labels.to(device), clusters, 3)
    ranked, order = labels.sort(dim=-1, stable=True)
    assert torch.equal(found.order.cpu(), order.int())
    every = torch.arange(clusters + 3, dtype=torch.int32).expand(3, -1).contiguous()
    starts = torch.searchsorted(ranked, every, out_int32=True)
    assert torch.equal(found.starts.cpu(), starts)
    assert torch.equal(found.sizes.cpu(), starts.diff()[:, :clusters])


@pytest.mark.gpu
def test_the_order_of_a_long_video_is_that_of_a_stable_sort() -> None:
    from svg_ear_compile.kernels.gpu.sort import sort_by_label

    generator = torch.Generator("cuda").manual_seed(0)
    labels = torch.randint(
        1183, (40, 75_601), generator=generator, dtype=torch.int32, device="cuda"
    )
    labels[1] = labels[1].sort().values  # neighbours are in one cluster
    wanted = labels.sort(dim=-1, stable=True).indices.int()
    for _ in range(10):
        assert torch.equal(sort_by_label(labels, 1182, 40).order, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_of_a_new_kind_get_its_label(device: str) -> None:
    from svg_ear_compile.kernels.gpu.sort import sort_by_label

    labels = torch.tensor([[0, 2, 3, 1, 2, 0], [1, 1, 0, 0, 3, 2]], device=device)
    kinds = torch.full((1, 2, 6), CLUSTERED, dtype=torch.uint8, device=device)
    kinds[0, 0, :2] = EXACT
    kinds[0, 1, 4] = kinds[0, 0, 2] = PADDING
    assert sort_by_label(labels, 2, 2).labels.tolist() == [[0, 2, 2, 1, 2, 0], [1, 1, 0, 0, 2, 2]]
    found = sort_by_label(labels, 2, 2, kinds)
    assert found.labels.tolist() == [[2, 2, 3, 1, 2, 0], [1, 1, 0, 0, 3, 2]]
    assert found.order.tolist() == [[5, 3, 0, 1, 4, 2], [2, 3, 0, 1, 5, 4]]
    assert found.sizes.tolist() == [[1, 1], [2, 2]]
