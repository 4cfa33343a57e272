"""Sol-Attn in plain PyTorch: known answers, and its place in the fidelity bench."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import product
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fidelity import kitchen
from benchmarks.fidelity.frontier import Point, beside_rivals
from benchmarks.fidelity.grid import Cell, cells
from benchmarks.fidelity.record import Evidence
from benchmarks.fidelity.report import rivals_summary, rivals_table
from benchmarks.fidelity.rules import RULES, Remembered, attention
from benchmarks.fidelity.sol import BLOCK, SolAttn, cube_order
from benchmarks.fidelity.times import SHORTER, WAN
from svg_ear_compile.kernels.plan import AttentionPlan

GRID = (5, 9, 10)  # 450 tokens: seven blocks and two tokens; cubes are cut at every side
TEXT = 7
FORMS = [
    SolAttn(order, rest, n)
    for order, rest, n in product(("raster", "cubes"), (True, False), (0, 16))
]


def by_tau(tau: float) -> AttentionPlan:
    return AttentionPlan(density=0.0, routing="threshold", threshold=tau)


@pytest.fixture(scope="module")
def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (1, 2, math.prod(GRID) + TEXT, 32)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def definition(form: SolAttn, qkv: list[Tensor], plan: AttentionPlan) -> Tensor:
    """One query after the other, one sum over keys and terms; raster order, one head."""
    q, k, v = (x[0, 0] for x in qkv)
    video, scale = math.prod(GRID), 32**-0.5
    parts = [slice(at, min(at + BLOCK, video)) for at in range(0, video, BLOCK)]
    keys = torch.stack([k[p].mean(0) for p in parts])
    out = torch.softmax(scale * q @ k.T, -1) @ v  # of text
    for i, rows in enumerate(parts):
        mean = scale * q[rows].mean(0)
        score = keys @ mean
        if plan.routing == "threshold":
            spread = (mean.square() * keys.var(0, correction=0)).sum().sqrt()
            chosen = score > score.mean() + plan.threshold * spread
        else:
            kept = max(1, round(plan.density * len(parts)))
            chosen = score >= score.sort(descending=True).values[kept - 1]
        tokens = set(range(video, len(k)))
        for j, part in enumerate(parts):
            if chosen[j] or abs(i - j) <= 1:
                tokens |= set(range(part.start, part.stop))
        far = [t for t in range(video) if t not in tokens]
        single = sorted(far, key=lambda t: -float(k[t] @ mean))[: form.augmented]
        tokens |= set(single)
        logits = scale * q[rows] @ k.T
        seen = sorted(tokens)
        weights, values = [logits[:, seen].exp()], [v[seen]]
        if form.keeps_rest and form.augmented:
            rest = [t for t in far if t not in single]
            away = scale * q[rows] @ keys.mean(0) - mean @ keys.mean(0)
            weights.append((k[rest] @ mean + away[:, None]).exp())
            values.append(v[rest])
        elif form.keeps_rest:
            rest = [j for j, p in enumerate(parts) if p.start not in tokens]
            mass = torch.tensor([parts[j].stop - parts[j].start for j in rest])
            weights.append(mass * (scale * q[rows] @ keys[rest].T).exp())
            values.append(torch.stack([v[parts[j]].mean(0) for j in rest]))
        weight, value = torch.cat(weights, 1), torch.cat(values)
        out[rows] = weight @ value / weight.sum(1, keepdim=True)
    return out


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("plan", [AttentionPlan(density=0.3), by_tau(0.5)], ids=["top-k", "tau"])
def test_sums_over_exact_keys_and_terms(
    form: SolAttn, plan: AttentionPlan, qkv: list[Tensor]
) -> None:
    place = torch.arange(math.prod(GRID) + TEXT)
    if form.order == "cubes":  # the same in another order
        place[:-TEXT] = cube_order(GRID)
    out, pairs = form(*qkv, plan, TEXT, GRID)
    ordered = [x[:, :, place] for x in qkv]
    torch.testing.assert_close(out[0, 0, place], definition(form, ordered, plan))
    assert 0 < float(pairs) < 2 * math.prod(GRID) ** 2


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_blocks_are_dense_attention(form: SolAttn, qkv: list[Tensor]) -> None:
    out, pairs = form(*qkv, AttentionPlan(density=1.0), TEXT, GRID)
    assert float(pairs) == 2 * math.prod(GRID) ** 2
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv))


def test_a_high_tau_leaves_the_diagonal_and_its_neighbours(qkv: list[Tensor]) -> None:
    _, pairs = SolAttn()(*qkv, by_tau(100.0), TEXT, GRID)
    sizes = [BLOCK] * 7 + [2]
    band = sum(a * b for i, a in enumerate(sizes) for j, b in enumerate(sizes) if abs(i - j) <= 1)
    assert float(pairs) == 2 * band
    _, lower = SolAttn()(*qkv, by_tau(1.0), TEXT, GRID)
    assert float(pairs) < float(lower)


def test_blocks_of_equal_tokens_lose_nothing(qkv: list[Tensor]) -> None:
    cube = cube_order(GRID)
    block = torch.empty_like(cube)
    block[cube] = torch.arange(len(cube)) // BLOCK
    q, k, v = qkv
    k = k.clone()
    k[:, :, :-TEXT] = k[:, :, block]
    dense = F.scaled_dot_product_attention(q, k, v)
    out, _ = SolAttn("cubes")(q, k, v, by_tau(100.0), TEXT, GRID)
    torch.testing.assert_close(out, dense)
    dropped, _ = SolAttn("cubes", keeps_rest=False)(q, k, v, by_tau(100.0), TEXT, GRID)
    assert float((dropped - dense).norm() / dense.norm()) > 0.1


def test_cubes_hold_neighbours_of_space_and_time() -> None:
    order = cube_order((4, 8, 12))
    assert sorted(order.tolist()) == list(range(4 * 8 * 12))
    t, y, x = order // 96, order // 12 % 8, order % 12
    for part in range(0, len(order), BLOCK):
        inside = slice(part, part + BLOCK)
        assert all(int(c[inside].max() - c[inside].min()) == 3 for c in (t, y, x))


def test_the_wheel_gets_what_it_takes(qkv: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def sol_attn(q: Tensor, k: Tensor, v: Tensor, **given: object) -> Tensor:
        asked.update(given)
        assert q.shape == (1, math.prod(GRID) + TEXT, 2, 128)
        assert q.is_contiguous()
        parts = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts, scale=given["scale"]).transpose(1, 2)

    wheel = ModuleType("comfy_kitchen")
    wheel.__spec__ = ModuleSpec("comfy_kitchen", None)
    vars(wheel).update(
        sol_attn=sol_attn, sol_attn_is_available=lambda device: device.type == "cuda"
    )
    monkeypatch.setitem(sys.modules, "comfy_kitchen", wheel)
    assert kitchen.missing(torch.device("cuda")) is None
    assert kitchen.missing(torch.device("cpu")) == "comfy-kitchen has no kernels for cpu"
    remembered = Remembered()
    out = attention(
        *qkv, "kitchen_tokens", AttentionPlan(density=0.2), text=TEXT, remembered=remembered
    )
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv))
    assert remembered.density is None
    expected = {"topk_ratio": 0.2, "token_aug": 256, "sink_blocks": [7, 8], "sink_q": [7, 8]}
    assert asked.items() >= expected.items()
    attention(*qkv, "kitchen_tau", by_tau(2.0))
    assert asked.items() >= {"topk_ratio": 0.0, "tau": 2.0, "sink_blocks": None}.items()


def point(rule: str, psnr: tuple[float, ...], ms: float, density: float = 0.1) -> Point:
    cell = Cell("self", rule, density, 128, 64)
    return Point(cell, psnr, (0.9, 0.9), (0.1, 0.1), 0.1, {"wan": ms})


def test_the_rival_is_read_at_its_own_time() -> None:
    points = [
        point("gaussian", (28.0, 36.0), 20.0, 0.05),
        point("gaussian", (30.0, 40.0), 80.0, 0.2),
        point("sol_top_k", (24.0, 33.0), 40.0),
        point("sol_tau", (31.0, 35.0), 100.0),
        point("sol_tokens", (30.0, 30.0), 10.0),
    ]
    by_rule = {row["rule"]: row for row in beside_rivals(points, "wan")}
    assert by_rule["sol_top_k"]["gain"]["mean"] == pytest.approx((29 - 24 + 38 - 33) / 2)
    assert by_rule["sol_top_k"]["gain"]["high"] == pytest.approx(5)  # paired: both gain the same
    assert by_rule["sol_top_k"]["time_ratio"] == (pytest.approx(0.5), "under")
    assert by_rule["sol_tau"]["gain"]["mean"] == pytest.approx(2)  # the last point, in less time
    assert by_rule["sol_tau"]["time_ratio"] == (pytest.approx(20 * 4 ** (1 / 3) / 100), "")
    assert by_rule["sol_tokens"]["gain"] is None


def test_rivals_are_summed_up_in_a_row_for_each_model_and_guidance() -> None:
    shapes = (WAN, *SHORTER)

    def timed(rule: str, scores: tuple[float, float], ms: float, density: float) -> Point:
        return replace(point(rule, scores, ms, density), ms=dict.fromkeys(shapes, ms))

    points = [
        timed("gaussian", (28.0, 36.0), 20.0, 0.05),
        timed("gaussian", (30.0, 40.0), 80.0, 0.2),
        timed("sol_top_k", (24.0, 33.0), 40.0, 0.1),
        timed("sol_top_k", (28.0, 36.0), 80.0, 0.2),
        timed("sol_tokens", (30.0, 30.0), 10.0, 0.05),
    ]
    model = {"settings": {"guidance": 5.0}, "model": {"tokens": 6912}}
    rows = [{"shape": shape, "dense_ms": 204.0} for shape in shapes]
    times = {"device": "a GPU", "cuda": None, "versions": {"torch": "2"}, "rows": rows}
    evidence = Evidence({"self": model}, times, points)
    text = rivals_summary([evidence], times)
    ratios = "0.50x / 2.00x"  # the third way's picture, 30 dB, takes "under" 20 ms of its 10
    each = " | ".join([ratios] * 3)
    assert f"| self, 5 | 6,912 | 3 | +3.0 / +4.0 / +5.0 dB | {each} |" in text
    assert len(rivals_table([evidence], times).splitlines()) == 4 + 3


def test_every_use_of_the_rival_is_measured() -> None:
    found = cells(["self"])
    budgets = {cell.budget for cell in found if cell.rule == "sol_tau"}
    assert budgets == {"tau1", "tau2"}
    assert {cell.rule for cell in found} == set(RULES)
    plan = next(c for c in found if c.budget == "tau2").plan(1000)
    assert (plan.routing, plan.threshold) == ("threshold", 2.0)
