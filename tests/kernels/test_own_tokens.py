"""Own tokens are exact in the Gaussian form: queries against sums over their keys, one by one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CPU, FORMS, Form, random_kinds, random_mask, random_qkv
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.reference import Result

TOKENS = 61


def by_hand(q: Tensor, k: Tensor, v: Tensor, got: Result, t: int, h: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of query t of head h of the first batch element, in float64."""
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5
    wide = [x.double().repeat_interleave(n, 1) for x, n in ((q, 1), (k, groups), (v, groups))]
    keys = got.keys.per_query_head(groups)
    keys = keys._replace(labels=keys.labels.long(), centroids=keys.centroids.double())
    means, _ = reference.cluster_means(wide[2], keys.labels, got.block_mask.shape[3])
    corrected = reference.corrections(*wide, got.queries, keys, means, scale)
    query, key, value = (x[0, h] for x in wide)
    i, label = int(got.queries.labels[0, h, t]), keys.labels[0, h]
    clusters = got.block_mask.shape[3]
    logits, values = [], []
    for s in range(len(key)):
        j = int(label[s])
        is_dense = i == got.block_mask.shape[2]
        if j == clusters or (j < clusters and (s == t or is_dense or got.block_mask[0, h, i, j])):
            logits.append(scale * query[t] @ key[s])
            values.append(value[s])
    for j in range(clusters) if i < got.block_mask.shape[2] else ():
        inside = label == j
        inside[t] = False
        if inside.any() and not got.block_mask[0, h, i, j]:
            proxy = scale * query[t] @ key[inside].mean(0) + math.log(int(inside.sum()))
            logits.append(proxy + corrected.logit[0, h, t])
            values.append(value[inside].mean(0) + corrected.value[0, h, t])
    logit = torch.stack(logits)
    return logit.softmax(0) @ torch.stack(values), logit.logsumexp(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("heads", "density", "counts", "masked"),
    [((2, 2), 0.2, (3, 7), False), ((4, 2), 0.0, (2, 5), True), ((1, 1), 0.1, (4, TOKENS), False)],
    ids=["skipped", "density 0, grouped heads, exact and padding", "clusters of one key"],
)
def test_own_keys_are_exact_and_leave_their_proxy_tokens(
    form: Form, heads: tuple[int, int], density: float, counts: tuple[int, int], masked: bool
) -> None:
    q, k, v = random_qkv(7, 1, heads, (TOKENS, TOKENS), 40, torch.float32, form.device)
    mask = random_mask(1, (True, True), (1, heads[1]), TOKENS, form.device) if masked else None
    exact = (0.1, 0.1) if masked else (0.0, 0.0)
    kinds = random_kinds(3, mask, 1, (TOKENS, TOKENS), exact, form.device)
    plan = AttentionPlan(density=density, q_clusters=counts[0], k_clusters=counts[1])
    got = form(q, k, v, plan, kinds=kinds, return_lse=True)
    host = Result(
        got.out.cpu(), got.lse.cpu(), *(reference.Clusters(*(t.cpu() for t in c)) for c in
        (got.queries, got.keys)), got.block_mask.cpu(), got.row_area.cpu(),
    )  # fmt: skip
    for h in range(heads[0]):
        for t in range(0, TOKENS, 5):
            out, lse = by_hand(q.cpu(), k.cpu(), v.cpu(), host, t, h)
            torch.testing.assert_close(host.out[0, h, t].double(), out, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(host.lse[0, h, t].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_look_at_single_tokens_are_right_without_a_block(form: Form) -> None:
    generator = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(1, 2, 130, 32, generator=generator), dim=-1) * 25
    q, v = q.to(form.device), torch.randn(1, 2, 130, 32, generator=generator).to(form.device)
    dense = F.scaled_dot_product_attention(q, q, v)
    for density in (0.0, 0.1):
        got = form(q, q, v, AttentionPlan(density=density))
        assert float((got.out - dense).norm() / dense.norm()) < 0.01
        paper = form(q, q, v, AttentionPlan(density=density, compensation="centroid"))
        assert float((paper.out - dense).norm() / dense.norm()) > 0.3


def test_other_numbers_of_keys_have_no_own_tokens() -> None:
    q, k, v = random_qkv(5, 1, (2, 2), (50, 51), 32, torch.float32, "cpu")
    plan = AttentionPlan(density=0.1, q_clusters=3, k_clusters=5)
    got = CPU(q, k, v, plan)
    means, _ = reference.cluster_means(v, got.keys.labels, 5)
    corrected = reference.corrections(q, k, v, got.queries, got.keys, means, 32**-0.5)
    out, _ = reference.softmax_over(
        q, k, v, got.queries.labels, got.keys.labels, got.block_mask,
        reference.proxy_tokens(got.keys, means), 32**-0.5, corrected,
    )  # fmt: skip
    torch.testing.assert_close(got.out, out)
