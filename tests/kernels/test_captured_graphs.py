"""Captured calls on a GPU are the calls themselves, bit by bit, whatever ran in between."""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import random_kinds, random_mask, random_qkv
from torch import Tensor

from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.clusters import (
    Result,
    samples_of_a_cold_start,
    strata,
    stratified_places,
)
from svg_ear_compile.kernels.cpu import CPU
from svg_ear_compile.kernels.gpu import captured_graphs
from svg_ear_compile.kernels.gpu.captured_graphs import CapturedGraphs
from svg_ear_compile.kernels.plan import AttentionPlan

PLAN = AttentionPlan(density=0.2, q_clusters=7, k_clusters=19)


def tensors_of(result: Result) -> list[Tensor]:
    rows = result.row_area.masked_fill(result.queries.sizes == 0, 0)
    return [result.out, result.lse, *result.queries, *result.keys, result.block_mask, rows]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bhsd", "fused", "strided"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_captured_call_is_the_call(layout: str, masked: bool, dim: int) -> None:
    graphs = CapturedGraphs()
    settings: dict[str, Any] = {"return_lse": True}
    calls = []
    for seed in range(5):
        q, k, v = random_qkv(seed, 1, (4, 2), (701, 701), dim, torch.bfloat16, "cuda", layout)
        mask = random_mask(seed, (True, False), (1, 2), 701, "cuda") if masked else None
        settings["kinds"] = random_kinds(1, mask, 1, (701, 701), (0.1, 0.2), "cuda")
        cold = registry.sparse_attention(q, k, v, PLAN, **settings)
        warm = (cold.queries.centroids, cold.keys.centroids)
        for centroids in (None, warm):
            wanted = registry.sparse_attention(q, k, v, PLAN, centroids=centroids, **settings)
            got = graphs.sparse_attention(q, k, v, PLAN, centroids=centroids, **settings)
            calls.append((got, wanted))
    assert graphs.count == 2
    for got, wanted in calls:  # later calls left the results of earlier ones alone
        assert got.out.stride() == wanted.out.stride()
        for mine, other in zip(tensors_of(got), tensors_of(wanted), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.gpu
def test_what_is_captured_in_inference_mode_serves_outside_of_it() -> None:
    graphs = CapturedGraphs()
    outs = []
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            q, k, v = random_qkv(0, 1, (2, 2), (300, 300), 64, torch.bfloat16, "cuda")
            outs.append(graphs.sparse_attention(q, k, v, PLAN).out)
    assert graphs.count == 1
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.gpu
def test_large_calls_are_not_captured_nor_those_without_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = CapturedGraphs()
    q, k, v = random_qkv(0, 1, (2, 2), (300, 300), 64, torch.bfloat16, "cuda")
    monkeypatch.setattr(captured_graphs, "MOST_HELD", 5 * q.numel() * q.element_size())
    for _ in range(3):
        result = graphs.sparse_attention(q, k, v, PLAN)
    assert result.out.isfinite().all()
    assert not graphs.count
    heads = captured_graphs.MOST_BYTES // (4096 * 128 * 2) + 1
    q, k, v = (
        torch.zeros(1, heads, 4096, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3)
    )
    for _ in range(3):
        graphs.sparse_attention(q, k, v, PLAN)
    assert not graphs.count


@pytest.mark.gpu
def test_kinds_share_their_memory_and_not_their_results() -> None:
    graphs = CapturedGraphs()
    q, k, v = random_qkv(0, 1, (4, 4), (2048, 2048), 64, torch.bfloat16, "cuda")
    held, found = [], []
    for turn in range(4):
        for density in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            plan = replace(PLAN, density=density)
            cold = graphs.sparse_attention(q, k, v, plan)
            warm = (cold.queries.centroids, cold.keys.centroids)
            later = graphs.sparse_attention(q, k, v, plan, centroids=warm, blocks=cold.blocks)
            if turn == 3:
                found += [(plan, None, None, cold), (plan, warm, cold.blocks, later)]
            held.append(graphs.nbytes)
    assert graphs.count == 12
    first = next(bytes_ for bytes_ in held if bytes_)
    assert held[-1] < 2 * first
    for plan, warm, blocks, got in found:
        wanted = registry.sparse_attention(q, k, v, plan, centroids=warm, blocks=blocks)
        for mine, other in zip(tensors_of(got), tensors_of(wanted), strict=True):
            assert torch.equal(mine, other)
    graphs.clear()
    assert (graphs.count, graphs.nbytes) == (0, 0)
    assert not graphs._tensors
    assert not graphs._workspaces


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_one_owner_captures_on_two_devices() -> None:
    graphs, outs = CapturedGraphs(), []
    for device in ("cuda:0", "cuda:1"):
        q, k, v = random_qkv(0, 1, (2, 2), (300, 300), 64, torch.bfloat16, device)
        with torch.cuda.device(device):
            outs += [graphs.sparse_attention(q, k, v, PLAN).out.cpu() for _ in range(4)]
    assert graphs.count == 2
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
def test_a_graph_holds_what_it_reads() -> None:
    graphs = CapturedGraphs()
    q, k, v = random_qkv(0, 1, (2, 2), (300, 300), 64, torch.bfloat16, "cuda")
    wanted = [graphs.sparse_attention(q, k, v, PLAN).out for _ in range(3)][-1]
    strata.cache_clear()
    stratified_places.cache_clear()
    torch.cuda.empty_cache()
    junk = [torch.full((n,), float("nan"), device="cuda") for n in range(1, 400)]
    assert torch.equal(graphs.sparse_attention(q, k, v, PLAN).out, wanted)
    del junk


class Graph:
    """Stands in for a CUDA graph: it replays nothing."""

    events: list[str]

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.events = ["begin"]

    def capture_end(self) -> None:
        self.events.append("end")

    def replay(self) -> None:
        self.events.append("replay")


class Stream:
    """Stands in for a CUDA stream."""

    cuda_stream = 7

    def __init__(self, device: object = None) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Stand-ins for CUDA around the CPU's form: what is captured, held and freed is the same."""
    stream = Stream()
    monkeypatch.setattr(captured_graphs, "is_worth_while", lambda q: True)
    monkeypatch.setattr(registry, "sparse_attention", CPU.sparse_attention)
    for name, stand_in in (
        ("CUDAGraph", Graph), ("Stream", Stream), ("current_stream", lambda device: stream),
        ("mem_get_info", lambda device: (1 << 40, 1 << 40)), ("graph_pool_handle", object),
        ("memory_reserved", lambda device: 0), ("stream", nullcontext),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return stream


def small() -> tuple[Tensor, Tensor, Tensor]:
    return random_qkv(0, 1, (2, 2), (61, 61), 32, torch.float32, "cpu")


def test_the_second_call_of_a_kind_is_captured_and_its_owner_frees_it(on_cpu: Stream) -> None:
    graphs, other = CapturedGraphs(), CapturedGraphs()
    outs = [graphs.sparse_attention(*small(), PLAN).out for _ in range(4)]
    assert torch.equal(outs[1], outs[0])
    assert len({out.data_ptr() for out in outs}) == 4  # no replay writes into another's result
    (captured,) = graphs._graphs.values()
    assert all(map(torch.equal, captured.inputs, small()))
    assert captured.graph.events == ["begin", "end", "replay", "replay"]
    assert captured.workspace.side.waited_for == [on_cpu]
    assert on_cpu.waited_for == [captured.workspace.side]
    # What the tokens of a cold start are drawn with is nobody else's to keep.
    device, drawn = torch.device("cpu"), []
    for clusters in PLAN.clusters(61, 61):
        for count, of in samples_of_a_cold_start(61, clusters, PLAN.first_iterations):
            drawn += [strata(count, 0, device), stratified_places(count, of, 0, device)]
    assert [id(t) for t in captured.constants] == [id(t) for t in drawn]
    assert graphs.nbytes > sum(t.numel() * t.element_size() for t in small())
    assert (other.count, other.nbytes) == (0, 0)
    del captured
    graphs.clear()
    assert (graphs.count, graphs.nbytes) == (0, 0)
    assert not graphs._tensors
    assert not graphs._workspaces


@pytest.mark.parametrize("end_fails", [False, True])
def test_no_memory_to_capture_costs_no_result(
    on_cpu: Stream, end_fails: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    graphs, calls = CapturedGraphs(), []

    def short_of_memory(*args: Any, **kwargs: Any) -> Result:
        calls.append(args)
        if len(calls) == 3:  # the capture
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return CPU.sparse_attention(*args, **kwargs)

    def invalidated(self: Graph) -> None:
        raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(registry, "sparse_attention", short_of_memory)
    if end_fails:
        monkeypatch.setattr(Graph, "capture_end", invalidated)
    with caplog.at_level(logging.WARNING, "svg_ear_compile"):
        outs = [graphs.sparse_attention(*small(), PLAN).out for _ in range(4)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert (graphs.count, graphs.nbytes, len(calls)) == (0, 0, 5)
    assert [r.getMessage() for r in caplog.records] == [
        "no memory to capture the graph of a call of 61 tokens: such calls run without one "
        "(CUDA out of memory)"
    ]
    # Another kind is tried, and another fault is not swallowed.
    graphs.sparse_attention(*small(), replace(PLAN, density=0.5))
    if end_fails:
        with pytest.raises(RuntimeError, match="invalidated"):
            graphs.sparse_attention(*small(), replace(PLAN, density=0.5))
    else:
        graphs.sparse_attention(*small(), replace(PLAN, density=0.5))
        assert graphs.count == 1


def test_only_what_is_stale_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = None
    shared = torch.empty(3, dtype=torch.uint8)
    graphs = CapturedGraphs(
        OrderedDict(
            (name, captured_graphs._Captured(nothing, [shared], [shared], [], workspace, used))
            for name, workspace, used in (
                ("a", captured_graphs._Workspace(nothing, nothing, 40), 10),
                ("b", captured_graphs._Workspace(nothing, nothing, 47), 900),
                ("c", captured_graphs._Workspace(nothing, nothing, 10), 1000),
            )
        )
    )
    monkeypatch.setattr(captured_graphs, "MOST_HELD", 100)
    monkeypatch.setattr(captured_graphs, "STALE_CALLS", 500)
    assert not graphs.has_room(1, 509)
    assert list(graphs._graphs) == ["a", "b", "c"]
    assert graphs.has_room(40, 1001)
    assert list(graphs._graphs) == ["b", "c"]
    assert graphs.nbytes == 60
    assert not graphs.has_room(41, 1001)
    assert not graphs.has_room(101, 5000)  # more than there can ever be


def test_a_cpu_captures_nothing() -> None:
    assert not captured_graphs.is_worth_while(torch.zeros(1, 1, 8, 64))
