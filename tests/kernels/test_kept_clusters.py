"""Clusters that cached keys keep: which keys are known again, and which are labelled anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import CPU, FORMS, Form, Oracle, random_qkv
from test_sparse_attention import check_output
from torch import Tensor

from svg_ear_compile.kernels import clustering, kept_clusters, reference
from svg_ear_compile.kernels.clusters import cold_start
from svg_ear_compile.kernels.gpu import attention as gpu_attention
from svg_ear_compile.kernels.kept_clusters import (
    CachedKeys,
    KeptClusters,
    continuation,
    excess_spread,
    identities_of,
    placed,
)
from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, CLUSTERED, TokenKinds, token_kinds
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Clusters, Result

PLAN = AttentionPlan(density=0.3, q_clusters=3, k_clusters=9, first_iterations=3)
OLD, NEW = 43, 17


def test_one_token_has_its_identity_wherever_it_lies() -> None:
    rows = torch.randn(3, 1, 5, 69)
    for sample, token, first in ((0, 0, 0), (1, 2, 3), (2, 4, 5)):
        v = rows[sample : sample + 1, :, token : token + 1, first : first + 64]
        wanted = identities_of(v.flatten().clone().view(1, 1, 1, 64))
        assert torch.equal(identities_of(v), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [40, 72, 128])
def test_identities_are_of_bits_and_not_of_places(dim: int, dtype: torch.dtype) -> None:
    v = torch.randn(2, 3, 50, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    found = identities_of(v)
    assert found.unique().numel() == found.numel()
    order = torch.randperm(50)
    assert torch.equal(identities_of(v[:, :, order]), found[:, order])
    assert torch.equal(identities_of(v.transpose(1, 2).contiguous().transpose(1, 2)), found)
    assert torch.equal(identities_of(torch.cat([v, v], -1)[..., :dim]), found)
    assert not (identities_of(-v) == found).any()
    for element in (0, 1, 2, 3, dim - 1):
        for change in (lambda x: -x, lambda x: torch.nextafter(x.float(), x.float() + 9).to(dtype)):
            other = v.clone()
            other[:, 0, :, element] = change(other[:, 0, :, element])
            is_other = (other[:, 0] != v[:, 0]).any(-1)
            assert torch.equal(identities_of(other) != found, is_other)
    # Two signs that flip together would cancel in a sum of words.
    other = v.clone()
    other[:, 0, :, [3, 7]] *= -1
    assert not (identities_of(other) == found).any()


def kept(identities: Tensor, labels: Tensor) -> CachedKeys:
    clusters = KeptClusters(identities, labels, torch.zeros(*labels.shape[:2], 9, 4))
    return CachedKeys(clusters, NEW, True, 1)


@pytest.mark.parametrize("style", ["grown", "rolled", "ring", "in front", "nothing"])
def test_keys_are_known_again_wherever_they_are(style: str) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(-(2**62), 2**62, (2, OLD), generator=generator)
    new = torch.randint(-(2**62), 2**62, (2, NEW), generator=generator)
    labels = torch.randint(9, (2, 3, OLD), generator=generator).to(torch.int16)
    place = torch.arange(OLD)
    now, source = {
        "grown": (torch.cat([before, new], 1), torch.cat([place, torch.full((NEW,), -1)])),
        "rolled": (torch.cat([before, new], 1)[:, NEW:], torch.cat([place, place - OLD])[NEW:OLD]),
        "ring": (torch.cat([before[:, :9], new, before[:, 9 + NEW :]], 1), place.clone()),
        "in front": (torch.cat([new, before], 1), torch.cat([torch.full((NEW,), -1), place])),
        "nothing": (torch.cat([new, new], 1), torch.full((2 * NEW,), -1)),
    }[style]
    if style == "rolled":
        source = torch.cat([place[NEW:], torch.full((NEW,), -1)])
    if style == "ring":
        source[9 : 9 + NEW] = -1
    found = placed(kept(before, labels), now)
    assert found is not None
    assert torch.equal(found.changed, (source < 0).expand(2, -1))
    wanted = labels[:, :, source.clamp(min=0)].long()
    assert torch.equal(found.labels[:, :, source >= 0], wanted[:, :, source >= 0])
    assert found.labels.min() >= 0


def test_tokens_of_two_calls_are_compared_by_the_sample_that_differs_most() -> None:
    v = torch.randn(2, 3, 60, 32, generator=torch.Generator().manual_seed(0))
    earlier, later = v[:, :, :43].clone(), v[:, :, 10:].clone()
    earlier[0, :, 5] = later[0, :, 7] = later[:, :, -4:] = 0.0  # nothing has been written there
    later[1, :, 2:4] += 1.0
    found = continuation(identities_of(earlier), identities_of(later))
    assert found == (31, 15, 12)
    assert continuation(identities_of(v), identities_of(v.flip(2))) == (60, 0, 0)


def test_the_excess_tells_labels_that_fit_from_labels_that_mean_nothing() -> None:
    q, k, _ = random_qkv(0, 2, (4, 2), (NEW, 200), 32, torch.float32, "cpu")
    metric = reference.logit_metrics(q, k, ALL_CLUSTERED)[1]
    start = reference.initial_centroids(k, None, 9, 0)
    good = reference.kmeans(k, None, start, 20, metric)
    assert 0 <= excess_spread(k, good, metric) < 0.01
    mixed = good.labels[:, :, torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    means, sizes = reference.cluster_means(k, mixed, 9)
    assert excess_spread(k, Clusters(mixed, means, sizes), metric) > 0.2
    assert excess_spread(k, Clusters(mixed, means, sizes), None) > 0.2
    # Keys in no cluster, empty clusters and keys that are not finite are left out.
    odd = k.clone()
    odd[:, :, 3] = float("nan")
    labels = good.labels.clone()
    labels[:, :, [3, 5]] = 9
    means, sizes = reference.cluster_means(odd.nan_to_num(), labels.clamp(max=10), 9)
    found = excess_spread(odd, Clusters(labels, means, sizes.masked_fill(sizes < 4, 0)), metric)
    assert found.isfinite()


def second_call(
    form: Form, kinds: TokenKinds, grows: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Result, Result]:
    """Inputs of a call whose last keys the call before did not have, and both results."""
    q, k, v = random_qkv(3, 1, (2, 1), (NEW, OLD + NEW), 32, torch.float32, "cpu")
    count = OLD if grows else OLD + NEW
    before_k, before_v = k[:, :, :count], v[:, :, :count].clone()
    before_v[:, :, OLD:] += 1
    of_before = TokenKinds(None, None if kinds.keys is None else kinds.keys[..., :count])
    plan = replace(PLAN, k_clusters=7) if grows else PLAN
    cold = CachedKeys(None, NEW, True, 0)
    first = CPU(q, before_k, before_v, plan, kinds=of_before, cache=cold)
    assert first.identities is not None
    assert first.excess is None
    q, k, v, *earlier = (
        t.to(form.device)
        for t in (q, k, v, first.identities, first.keys.labels, first.keys.centroids)
    )
    cache = CachedKeys(KeptClusters(*earlier), NEW, grows, 1)
    kinds = TokenKinds(None, None if kinds.keys is None else kinds.keys.to(form.device))
    return (q, k, v), first, form(q, k, v, PLAN, kinds=kinds, cache=cache, return_lse=True)


def some_kinds(part: float = 0.8) -> TokenKinds:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(1, 1, 1, OLD + NEW, generator=generator) < part
    return token_kinds(mask, None, torch.rand(1, OLD + NEW, generator=generator) < 0.1)


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize(
    "kinds",
    [ALL_CLUSTERED, some_kinds(), some_kinds(0.3)],
    ids=["all", "some", "fewer than are labelled anew"],
)
def test_a_call_that_keeps_clusters_is_the_definition_under_its_labels(
    grows: bool, kinds: TokenKinds
) -> None:
    (q, k, v), first, got = second_call(CPU, kinds, grows)
    check_output(Oracle.of(CPU, q, k, v, PLAN, 32**-0.5, got), got)
    labels = got.keys.labels
    means, sizes = reference.cluster_means(k.double(), labels, 9)
    assert torch.equal(got.keys.sizes, sizes)
    if kinds.keys is not None:
        assert torch.equal(sizes.sum(-1)[:, 0], (kinds.keys[:, 0] == CLUSTERED).sum(-1))
    difference = (got.keys.centroids.double() - means)[sizes > 0]
    assert difference.abs().max() < 1e-5
    assert got.excess is not None
    assert 0 <= got.excess.item() < 0.3
    # Labels are kept but for the new keys, those whose cluster they took, and some in turn.
    same = (labels[:, :, :OLD] == first.keys.labels[:, :, :OLD]) | (labels[:, :, :OLD] > 8)
    assert same.float().mean() > 0.4


@pytest.mark.parametrize("form", FORMS[1:])
def test_on_a_gpu_keys_get_the_same_labels(form: Form) -> None:
    (q, k, v), _, got = second_call(form, some_kinds(), True)
    check_output(Oracle.of(form, q, k, v, PLAN, 32**-0.5, got), got)
    wanted = second_call(CPU, some_kinds(), True)[2]
    assert torch.equal(got.keys.labels.cpu().long(), wanted.keys.labels)
    assert got.excess is not None
    assert wanted.excess is not None
    torch.testing.assert_close(got.excess.cpu(), wanted.excess, atol=1e-4, rtol=1e-3)


def test_all_keys_have_their_turn() -> None:
    """Labels that fit no key are replaced, a few in each call."""
    (q, k, v), _, got = second_call(CPU, ALL_CLUSTERED, False)
    labels = torch.randint(9, got.keys.labels.shape, generator=torch.Generator().manual_seed(0))
    assert got.identities is not None
    centroids, found = got.keys.centroids, []
    for turn in range(1, 9):
        cache = CachedKeys(KeptClusters(got.identities, labels, centroids), NEW, False, turn)
        later = CPU(q, k, v, PLAN, cache=cache)
        assert later.excess is not None
        labels, centroids = later.keys.labels, later.keys.centroids
        found.append(later.excess.item())
    assert found[-1] < 0.1 * found[0]


@pytest.mark.parametrize("form", FORMS)
def test_keys_whose_clusters_are_kept_are_not_clustered_from_scratch(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []

    def counted(x: Tensor, *given: Any) -> Tensor:
        looked_at.append(x.shape[2])
        return cold_start(x, *given)

    for module in (clustering, gpu_attention, kept_clusters):
        monkeypatch.setattr(module, "cold_start", counted)
    second_call(form, ALL_CLUSTERED, True)
    before = [NEW, OLD]  # queries and keys of the call that clusters them first
    assert looked_at == [*before, NEW, NEW]  # queries, and new keys for clusters of their own
