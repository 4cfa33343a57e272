"""The ``"logits"`` metric: its formula, its invariances, and the error that it lowers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    CPU,
    FORMS,
    INTERPRETED,
    SEEDS,
    Form,
    random_kinds,
    random_mask,
    random_qkv,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.kinds import ALL_CLUSTERED, CLUSTERED, TokenKinds, token_kinds
from svg_ear_compile.kernels.plan import AttentionPlan

F16, F32 = torch.float16, torch.float32
few = settings(max_examples=4, phases=[Phase.generate]) if INTERPRETED else settings()


def metrics(
    form: Form, q: Tensor, k: Tensor, kinds: TokenKinds = ALL_CLUSTERED
) -> tuple[Tensor, Tensor]:
    """Metrics of queries (B, H, D, D) and of keys (B, H_kv, D, D), on the CPU."""
    if not form.is_triton:
        return reference.logit_metrics(q.float(), k.float(), kinds)
    from svg_ear_compile.kernels.gpu.launch import HOPPER, launch_config
    from svg_ear_compile.kernels.gpu.metric import logit_metrics

    config = launch_config(q.shape[-1], q.element_size(), HOPPER)
    of_queries, of_keys = logit_metrics(q, k, kinds, config)
    of_queries, of_keys = (t.unflatten(0, k.shape[:2]).cpu() for t in (of_queries, of_keys))
    return of_queries.repeat_interleave(q.shape[1] // k.shape[1], 1), of_keys


@few
@given(
    seed=SEEDS,
    tokens=st.tuples(st.sampled_from((37, 130, 1500)), st.sampled_from((41, 1100))),
    heads=st.sampled_from(((2, 2), (4, 2))),
    exact=st.sampled_from(((0.0, 0.0), (0.2, 0.1))),
    masked=st.booleans(),
)
@pytest.mark.parametrize(("dim", "dtype"), [(40, F16), (64, F32), (128, F16), (160, F16)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_its_formula(
    form: Form, dim: int, dtype: torch.dtype, seed: int, tokens: tuple[int, int],
    heads: tuple[int, int], exact: tuple[float, float], masked: bool,
) -> None:  # fmt: skip
    q, k, _ = random_qkv(seed, 1, heads, tokens, dim, dtype, form.device)
    mask = (
        random_mask(seed, (True, True), (1, heads[1]), tokens[1], form.device) if masked else None
    )
    kinds = random_kinds(seed, mask, 1, tokens, exact, form.device)
    of_queries, of_keys = metrics(form, q, k, kinds)
    per_kv_head = heads[0] // heads[1]
    for g in range(heads[1]):
        kept = reference.is_kind(k, kinds.keys, CLUSTERED)[0, g].cpu()
        wanted = k[0, g].cpu().double()[kept].T.cov(correction=0)
        group = range(g * per_kv_head, (g + 1) * per_kv_head)
        for h in group:
            torch.testing.assert_close(
                of_queries[0, h].double(), wanted / wanted.norm(), rtol=0, atol=1e-6
            )
        squares = []
        for h in group:
            rows = (
                q[0, h].cpu().double()[reference.is_kind(q, kinds.queries, CLUSTERED)[0, h].cpu()]
            )
            squares.append(rows.T @ rows / len(rows))
        wanted = torch.stack(squares).mean(0)
        torch.testing.assert_close(
            of_keys[0, g].double(), wanted / wanted.norm(), rtol=0, atol=1e-6
        )


@given(seed=SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_padding_and_a_shift_of_all_keys_do_not_show(form: Form, seed: int) -> None:
    q, k, _ = random_qkv(seed, 1, (2, 2), (60, 70), 40, F32, form.device)
    mask = torch.ones(1, 1, 1, 70, dtype=torch.bool, device=form.device)
    mask[..., 50:] = False
    of_queries, of_keys = metrics(form, q, k, token_kinds(mask))
    other = k + 3.0
    other[:, :, 50:] = float("nan")
    again = metrics(form, q, other, token_kinds(mask))
    torch.testing.assert_close(again[0], of_queries, rtol=0, atol=1e-5)
    torch.testing.assert_close(again[1], of_keys, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_makes_the_metrics_of_its_own_heads_euclidean(
    form: Form, value: float
) -> None:
    q, k, _ = random_qkv(0, 1, (4, 2), (60, 70), 40, F32, form.device)
    wanted = metrics(form, q, k)
    q[0, 1, 11, 2] = k[0, 1, 7, 5] = value
    of_queries, of_keys = metrics(form, q, k)
    assert torch.equal(of_queries[0, :2], wanted[0][0, :2])
    assert torch.equal(of_keys[0, 1], wanted[1][0, 1])
    for metric in (of_queries[0, 2], of_queries[0, 3], of_keys[0, 0]):
        assert torch.equal(metric, torch.eye(40))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_without_a_direction_the_output_is_exact(form: Form, value: float) -> None:
    x = torch.full((1, 2, 30, 40), value, dtype=F16, device=form.device)
    v = torch.randn(1, 2, 30, 40, generator=torch.Generator().manual_seed(0)).to(x)
    plan = AttentionPlan(density=0.2, q_clusters=3, k_clusters=5)
    out, dense = form(x, x, v, plan).out, F.scaled_dot_product_attention(x, x, v)
    torch.testing.assert_close(out, dense, rtol=0, atol=2e-3, equal_nan=True)


@given(seed=SEEDS)
def test_it_is_the_euclidean_distance_of_transformed_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 90, 8, generator=generator, dtype=torch.float64)
    root = torch.randn(1, 2, 8, 8, generator=generator, dtype=torch.float64)
    start = reference.initial_centroids(x, None, 6, 0)
    metric = root @ root.transpose(2, 3)
    found = reference.kmeans(x, None, start, 3, metric)
    moved = reference.kmeans(x @ root, None, start @ root, 3)
    assert torch.equal(found.labels, moved.labels)


def test_clusters_of_what_the_logits_see_leave_less_error() -> None:
    """Queries and keys vary most in directions in which the others do not vary.

    These variations change no logit, and Euclidean clusters follow them.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(loud: slice) -> Tensor:
        x = torch.randn(1, 2, 900, 16, generator=generator)
        x[..., loud] *= 6.0
        return x

    q, k, v = draw(slice(4, 10)), draw(slice(10, 16)), draw(slice(0, 0))
    q[..., 10:], k[..., 4:10] = 0.0, 0.0
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    logits, euclidean = (
        (CPU(q, k, v, plan, scale=0.5).out - dense).norm()
        for plan in (
            AttentionPlan(density=0.1, q_clusters=20, k_clusters=40, cluster_metric=metric)
            for metric in ("logits", "euclidean")
        )
    )
    assert logits < 0.5 * euclidean
