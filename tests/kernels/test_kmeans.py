"""Clustering: nearest centroids, falling inertia, fixed points, odd counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CUDA, FORMS, INTERPRETED, SEEDS, Form, random_qkv
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.clusters import (
    cold_start,
    strata,
    stratified_places,
    stratified_sample,
)
from svg_ear_compile.kernels.kinds import CLUSTERED, EXACT, PADDING, exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Clusters, QueryTile

few = settings(max_examples=4, phases=[Phase.generate]) if INTERPRETED else settings()


def kmeans(
    form: Form,
    x: Tensor,
    start: Tensor,
    rounds: int,
    kinds: Tensor | None = None,
    metric: Tensor | None = None,
    query_tile: QueryTile | None = None,
) -> Clusters:
    """Labels int64 (B, H, N), centroids and sizes of the form's k-means, on the CPU."""
    if not form.is_triton:
        found = reference.kmeans(x.float(), kinds, start.float(), rounds, metric, query_tile)
        return Clusters(*found)
    from svg_ear_compile.kernels.gpu.kmeans import kmeans as triton_kmeans
    from svg_ear_compile.kernels.gpu.launch import HOPPER, launch_config

    config = launch_config(x.shape[-1], x.element_size(), HOPPER)
    flat = None if metric is None else metric.flatten(0, 1).to(x.device)
    found = triton_kmeans(x, kinds, start, rounds, config, flat, query_tile)
    clusters = start.shape[2]
    sizes = found.starts.diff()[:, :clusters]
    assert torch.equal(found.labels.gather(1, found.order.long()), found.labels.sort(-1).values)
    tensors = (t.unflatten(0, x.shape[:2]).cpu() for t in (found.labels, found.centroids, sizes))
    labels, centroids, sizes = tensors
    return Clusters(labels.long(), centroids, sizes.long())


def tokens_of(form: Form, seed: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return random_qkv(seed, 1, (2, 2), (tokens, tokens), dim, dtype, form.device)[0]


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """(B, H, N, C) in float64."""
    return (x.cpu().double().unsqueeze(3) - centroids.cpu().double().unsqueeze(2)).square().sum(-1)


def inertia(x: Tensor, found: Clusters) -> float:
    """Sum of squared distances of the tokens to the mean of their cluster, float64."""
    means, _ = reference.cluster_means(x.cpu().double(), found.labels, found.centroids.shape[2])
    return squared_distances(x, means).gather(3, found.labels.unsqueeze(-1)).sum().item()


SHAPES = pytest.mark.parametrize(
    ("dim", "dtype"), [(40, torch.float16), (64, torch.float32)], ids=str
)
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
COUNTS = st.sampled_from(((33, 4), (131, 7), (61, 11), (157, 71)))


@few
@given(seed=SEEDS, count=COUNTS, rounds=st.integers(1, 3))
@SHAPES
@EVERY_FORM
def test_labels_are_the_nearest_centroids_of_the_round_before(
    form: Form, dim: int, dtype: torch.dtype, seed: int, count: tuple[int, int], rounds: int
) -> None:
    x = tokens_of(form, seed, count[0], dim, dtype)
    start = reference.initial_centroids(x, None, count[1], seed=0)
    before = start if rounds == 1 else kmeans(form, x, start, rounds - 1).centroids
    found = kmeans(form, x, start, rounds)
    if form.is_triton:  # the kernel multiplies centroids in the dtype of the tokens
        before = before.to(dtype)
    distance = squared_distances(x, before)
    chosen = distance.gather(3, found.labels.unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distance.amin(-1) + 1e-4).all()
    means, sizes = reference.cluster_means(x.cpu().double(), found.labels, count[1])
    assert torch.equal(found.sizes, sizes)
    torch.testing.assert_close(
        found.centroids.cpu().double()[sizes > 0], means[sizes > 0], rtol=0, atol=1e-5
    )


@few
@given(seed=SEEDS, count=COUNTS, offset=st.sampled_from((0.0, 8.0)))
@SHAPES
@EVERY_FORM
def test_labels_are_the_nearest_in_the_metric(
    form: Form, dim: int, dtype: torch.dtype, seed: int, count: tuple[int, int], offset: float
) -> None:
    x = tokens_of(form, seed, count[0], dim, dtype) + offset
    start = reference.initial_centroids(x, None, count[1], seed=0)
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(1, 2, dim, dim, generator=generator)
    metric = reference.as_metric(root @ root.transpose(2, 3))
    found = kmeans(form, x, start, 1, metric=metric)
    away = x.cpu().double().unsqueeze(3) - start.cpu().double().unsqueeze(2)  # [B, H, N, C, D]
    distance = torch.einsum("bhncd,bhde,bhnce->bhnc", away, metric.double(), away)
    chosen = distance.gather(3, found.labels.unsqueeze(-1)).squeeze(-1)
    # The rounding of an aim changes a distance in proportion to the token minus the centroid, that
    # of a float32 sum in proportion to the product of token and aim.
    reach = (
        distance.amin(-1).sqrt()
        * torch.finfo(dtype).eps
        * (start.cpu().double().norm(dim=-1)).amax()
    )
    product = x.cpu().double() @ (start.cpu().double() @ metric.double()).transpose(2, 3)
    summed = torch.finfo(torch.float32).eps * product.abs().amax()
    assert (chosen <= distance.amin(-1) + 2 * reach + 8 * summed).all()


@few
@given(seed=SEEDS, count=st.sampled_from(((131, 5), (261, 9))), text=st.sampled_from((0, 3)))
@SHAPES
@EVERY_FORM
def test_tile_aligned_clusters_give_their_surplus_to_those_with_room(
    form: Form, dim: int, dtype: torch.dtype, seed: int, count: tuple[int, int], text: int
) -> None:
    subtile, tile = 16, 48
    x = tokens_of(form, seed, count[0], dim, dtype)
    kinds = exact_at_ends(x, x, text, 0).queries
    start = reference.initial_centroids(x, kinds, count[1], seed=0)
    before = kmeans(form, x, start, 1, kinds).labels
    found = kmeans(form, x, start, 1, kinds, query_tile=QueryTile(subtile, tile))
    distance = squared_distances(x, start)
    for head in range(2):
        old, new, away = before[0, head], found.labels[0, head], distance[0, head]
        sizes = old.bincount(minlength=count[1])
        last, alone = sizes % subtile, sizes % tile
        surplus = torch.where(alone <= 8, alone, torch.where(last <= 4, last, 0))
        surplus[sizes <= subtile] = 0
        takers = ((last > 4) & (last <= 12) & (surplus == 0))[: count[1]].nonzero().flatten()
        moved = (old != new).nonzero().flatten()
        for i in range(count[1]):
            mine = (old == i).nonzero().flatten()
            gone = mine[(new != old)[mine]]
            assert len(gone) == (surplus[i] if len(takers) else 0)
            if not len(gone):
                continue
            sample = mine[:32]
            lost = away[sample][:, takers].amin(-1) - away[sample, i]
            leaves = torch.isin(sample, gone)
            assert leaves.sum() == len(gone)
            assert leaves.all() or lost[leaves].max() <= lost[~leaves].min() + 1e-4
        if len(moved):
            nearest = away[moved][:, takers].amin(-1)
            assert torch.isin(new[moved], takers).all()
            assert (away[moved, new[moved]] <= nearest + 1e-4).all()
    means, sizes = reference.cluster_means(x.cpu().double(), found.labels, count[1])
    assert torch.equal(found.sizes, sizes)
    torch.testing.assert_close(
        found.centroids.cpu().double()[sizes > 0], means[sizes > 0], rtol=0, atol=1e-5
    )


@EVERY_FORM
def test_a_cluster_with_little_in_its_last_subtile_gives_the_tokens_that_lose_least(
    form: Form,
) -> None:
    # Nine tokens are near 0, six near 10. With subtiles of 8, one of the nine is a surplus.
    places = torch.tensor([0.0, 1, 2, 3, 0, 0, 0, 0, -1, 10, 10, 10, 10, 11, 9])
    x = torch.zeros(1, 1, 15, 40, device=form.device)
    x[0, 0, :, 7] = places.to(form.device)
    start = torch.zeros(1, 1, 2, 40, device=form.device)
    start[0, 0, 1, 7] = 10.0
    found = kmeans(form, x, start, 1, query_tile=QueryTile(8, 8))
    assert found.labels.flatten().tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert found.sizes.tolist() == [[[8, 7]]]
    assert found.centroids[0, 0, :, 7].tolist() == pytest.approx([2 / 8, 63 / 7])


@few
@given(seed=SEEDS, count=COUNTS)
@SHAPES
@EVERY_FORM
def test_inertia_falls_and_is_that_of_the_definition(
    form: Form, dim: int, dtype: torch.dtype, seed: int, count: tuple[int, int]
) -> None:
    x = tokens_of(form, seed, count[0], dim, dtype)
    start = reference.initial_centroids(x, None, count[1], seed=0)
    reached = [inertia(x, kmeans(form, x, start, rounds)) for rounds in (1, 3)]
    assert reached[1] <= reached[0] * (1 + 1e-3)
    wide = x.cpu().double()
    for rounds, got in zip((1, 3), reached, strict=True):
        definition = reference.kmeans(wide, None, start.cpu().double(), rounds)
        assert got <= inertia(wide, definition) * (1 + (1e-3 if rounds == 1 else 2e-2))


@few
@given(seed=SEEDS)
@SHAPES
@EVERY_FORM
def test_converged_centroids_are_a_fixed_point(
    form: Form, dim: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(1, 2, 5, dim, generator=generator)
    labels = torch.randint(5, (1, 2, 77), generator=generator)
    labels[..., :5] = torch.arange(5)
    noise = 0.1 * torch.randn(1, 2, 77, dim, generator=generator)
    x = centers.gather(2, labels.unsqueeze(-1).expand_as(noise)) + noise
    x = x.to(form.device, dtype)
    means, _ = reference.cluster_means(x.cpu().float(), labels, 5)
    found = kmeans(form, x, means.to(form.device), 2)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.centroids, means, rtol=0, atol=1e-5)


@few
@given(seed=SEEDS)
@EVERY_FORM
def test_same_start_gives_the_same_bits(form: Form, seed: int) -> None:
    x = tokens_of(form, seed, 131, 40, torch.float16)
    start = reference.initial_centroids(x, None, 7, seed % 1000)
    again = reference.initial_centroids(x, None, 7, seed % 1000)
    assert torch.equal(start, again)
    kept = start.clone()
    for first, second in zip(kmeans(form, x, start, 3), kmeans(form, x, again, 3), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(start, kept)


@given(seed=SEEDS, plain=st.booleans())
def test_first_centroids_are_clustered_tokens(seed: int, plain: bool) -> None:
    x = torch.randn(2, 2, 41, 8, generator=torch.Generator().manual_seed(seed))
    kinds = torch.full((2, 2, 41), CLUSTERED)
    if not plain:
        kinds = torch.randint(3, (2, 2, 41), generator=torch.Generator().manual_seed(seed))
        kinds[..., 20] = CLUSTERED
    drawn = reference.initial_centroids(x, None if plain else kinds, 6, seed % 100)
    usable = kinds == CLUSTERED
    same = squared_distances(drawn, x) == 0  # [B, H, C, N]
    assert torch.equal(same.sum(-1), torch.ones(2, 2, 6, dtype=torch.long))
    assert (same & usable.unsqueeze(2)).any(-1).all()


@pytest.mark.parametrize("tokens", [1, 2, 5])
@EVERY_FORM
def test_more_clusters_than_tokens(form: Form, tokens: int) -> None:
    x = tokens_of(form, 3, tokens, 40, torch.float16)
    start = torch.arange(9.0).reshape(1, 1, 9, 1).expand(1, 2, 9, 40).contiguous().to(form.device)
    found = kmeans(form, x, start, 2)
    assert found.centroids.isfinite().all()
    assert found.sizes.sum(-1).tolist() == [[tokens, tokens]]
    empty = found.sizes == 0
    assert empty.any()
    # An empty cluster keeps its centroid.
    assert torch.equal(found.centroids[empty], start.cpu().float()[empty])


@EVERY_FORM
def test_duplicate_tokens_leave_clusters_empty_and_finite(form: Form) -> None:
    x = torch.ones(1, 2, 50, 40, dtype=torch.float16, device=form.device)
    start = reference.initial_centroids(x, None, 6, 0)
    found = kmeans(form, x, start, 3)
    assert found.centroids.isfinite().all()
    # A tie goes to the lowest cluster.
    assert found.sizes.tolist() == [[[50, 0, 0, 0, 0, 0]] * 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@EVERY_FORM
def test_special_tokens_stay_out_of_the_centroids(form: Form, bad: float) -> None:
    x = tokens_of(form, 5, 60, 40, torch.float16)
    kinds = torch.full((1, 2, 60), CLUSTERED, dtype=torch.uint8, device=form.device)
    kinds[..., 30:40] = PADDING
    kinds[..., [0, 1, 57, 58, 59]] = EXACT
    x[:, :, 50] = bad
    x[:, :, 35, 3] = bad
    start = reference.initial_centroids(x, kinds, 4, 0)
    found = kmeans(form, x, start, 2, kinds)
    assert (found.labels[..., [0, 1, 50, 57, 58, 59]] == 4).all()
    assert (found.labels[..., 30:40] == 5).all()
    clustered = [t for t in range(2, 57) if t != 50 and not 30 <= t < 40]
    assert (found.labels[..., clustered] < 4).all()
    assert found.centroids.isfinite().all()


@pytest.mark.gpu
@given(seed=SEEDS)
@settings(max_examples=3)
def test_bfloat16_inertia_on_the_device(seed: int) -> None:
    x = tokens_of(CUDA, seed, 4099, 128, torch.bfloat16)
    start = reference.initial_centroids(x, None, 33, seed=0)
    wide = x.cpu().double()
    definition = reference.kmeans(wide, None, start.cpu().double(), 4)
    got = inertia(x, kmeans(CUDA, x, start, 4))
    assert got <= inertia(wide, definition) * (1 + 1e-2)


def early(x: Tensor, kinds: Tensor | None, clusters: int, iterations: int) -> list[Any]:
    """What the early rounds of a cold start are given."""
    given: list[Any] = []

    def rounds(*early: Any) -> Tensor:
        given.extend(early)
        start: Tensor = early[2]
        return start

    plan = AttentionPlan(first_iterations=iterations)
    found = cold_start(x, kinds, clusters, plan, rounds)
    assert found.shape == (*x.shape[:2], clusters, x.shape[3])
    assert found.isfinite().all()
    return given


def test_early_rounds_of_a_cold_start_look_at_a_third_of_the_clustered_tokens() -> None:
    x = torch.arange(90.0).view(1, 1, 90, 1).expand(2, 3, 90, 1).clone()
    assert not early(x, None, 1, 1)  # the only round is the last one
    tokens, kinds, start, rounds = early(x, None, 1, 5)
    assert (tokens.shape, kinds, rounds) == ((2, 3, 30, 1), None, 4)
    assert torch.equal(tokens.flatten(2).long() // 3, torch.arange(30).expand(2, 3, 30))
    assert torch.isin(start, tokens).all()
    assert early(x, None, 2, 5)[0].shape[2] == 32  # sixteen for each cluster
    assert early(x, None, 3, 5)[0] is x
    kinds = torch.where(torch.arange(90) % 2 > 0, CLUSTERED, EXACT).view(1, 1, 90)
    assert (early(x, kinds, 1, 5)[0] % 2 == 1).all()
    assert early(x, kinds, 3, 5)[1] is kinds


def test_tokens_that_are_not_finite_are_in_no_cluster_in_early_rounds() -> None:
    x = torch.zeros(1, 1, 60, 2)
    x[0, 0, 30:] = torch.nan
    assert early(x, None, 1, 3)[0].isnan().any(-1).sum() == 10


def test_the_last_stratum_ends_with_the_last_clustered_token() -> None:
    count, seed = 40000, 2991
    assert float(strata(count, seed, torch.device("cpu"))[-1]) == 1.0  # rounded
    x = torch.arange(count + 1.0).view(1, 1, -1, 1)
    kinds = torch.full((1, 1, count + 1), CLUSTERED, dtype=torch.uint8)
    kinds[..., -1] = PADDING
    assert float(stratified_sample(x, kinds, count, seed).max()) < count


def test_what_is_kept_of_a_cold_start_is_no_tensor_of_inference_mode() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        kept = (strata(61, 17, device), stratified_places(61, 610, 17, device))
    assert not any(tensor.is_inference() for tensor in kept)
