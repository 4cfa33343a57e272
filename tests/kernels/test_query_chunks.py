"""Chunks of queries that see the same keys: told by a mask's values, attended to one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.data import video_like
from svg_ear_compile.kernels import query_chunks as module
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, calls_from
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.query_chunks import MOST_CHUNKS, chunks_of

attention, key_padding = torch.ops.svg_ear.attention, torch.ops.svg_ear.key_padding
query_chunks = torch.ops.svg_ear.query_chunks
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ALL_BLOCKS = AttentionPlan(routing="threshold", threshold=0.0)
CHUNK, TOKENS = 17, 113  # the last chunk is a part of one


def places(queries: int = TOKENS, keys: int = TOKENS) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None] // CHUNK, torch.arange(keys)[None] // CHUNK


def teacher_forcing() -> Tensor:
    """Clean chunks, then as many noisy ones that see the clean ones before them and themselves."""
    half = (torch.arange(TOKENS) >= TOKENS // 2)[:, None]
    place = torch.arange(TOKENS)[:, None] % (TOKENS // 2) // CHUNK
    clean = ~half.T & torch.where(half, place > place.T, place >= place.T)
    return clean | (half & half.T & (place == place.T))


MASKS: dict[str, Callable[[], Tensor]] = {
    "all chunks before": lambda: places()[1] <= places()[0],
    "a window": lambda: (places()[1] <= places()[0]) & (places()[1] > places()[0] - 3),
    "a sink": lambda: (
        (places()[1] <= places()[0]) & ((places()[1] > places()[0] - 2) | (places()[1] < 1))
    ),
    "its own": lambda: places()[1] == places()[0],
    "chunks after": lambda: places()[1] >= places()[0],
    "a cache": lambda: places(TOKENS, TOKENS + 40)[1] <= places(TOKENS)[0] + 40 // CHUNK,
    "teacher forcing": teacher_forcing,
    "padding": lambda: (places()[1] <= places()[0]) & (torch.arange(TOKENS)[None] % 5 != 3),
}


def proof(mask: Tensor) -> tuple[Tensor, Tensor]:
    return query_chunks(mask, key_padding(mask)[2])


def reconstructed(mask: Tensor) -> Tensor:
    spans, keys = proof(mask)
    found = torch.zeros_like(mask, dtype=torch.bool)
    before = torch.zeros_like(keys[:, :, 0])
    for number, chunk in enumerate(chunks_of(spans, mask.shape[2])):
        inside = keys[:, :, number]
        assert not inside[..., : chunk.keys.start].any()
        assert not inside[..., chunk.keys.stop :].any()
        assert chunk.sees_all == bool(inside[..., chunk.keys].all())
        assert chunk.new == int((inside & ~before).sum(-1).max())
        found[:, :, chunk.queries] = inside.unsqueeze(2)
        before = inside
    return found


@pytest.mark.parametrize("name", MASKS)
@DEVICES
def test_the_chunks_of_a_mask_make_the_mask(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 16)  # where a chunk may start, and may not
    mask = MASKS[name]()[None, None].to(device)
    assert torch.equal(reconstructed(mask), mask)
    bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
    assert torch.equal(reconstructed(bias), mask)
    two = torch.cat([mask, mask | mask.roll(1, 3)])
    assert torch.equal(reconstructed(two), two)


NO_CHUNKS: dict[str, Callable[[], Tensor]] = {
    "by token": lambda: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
    "no keys": lambda: places()[1] < places()[0],
    "a bias": lambda: torch.where(places()[1] <= places()[0], 0.0, -5.0),
    "not a number": lambda: torch.where(places()[1] <= places()[0], 0.0, math.nan),
    "another sample": lambda: torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("name", NO_CHUNKS)
def test_other_masks_have_no_chunks(name: str) -> None:
    mask = NO_CHUNKS[name]()
    assert chunks_of(proof(mask.expand(2, 1, TOKENS, TOKENS))[0], TOKENS) == []


@pytest.mark.parametrize(
    "mask",
    [
        (torch.arange(TOKENS) < 50).expand(TOKENS, TOKENS),
        torch.ones(1, TOKENS, dtype=torch.bool),
        torch.ones(0, TOKENS, dtype=torch.bool),
        torch.ones(TOKENS, 0, dtype=torch.bool),
    ],
    ids=["padding", "one query", "no queries", "no keys"],
)
def test_padding_and_empty_masks_are_not_looked_at(mask: Tensor) -> None:
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    for each in (mask, bias):
        spans, keys = proof(each[None, None])
        assert chunks_of(spans, mask.shape[0]) == []
        assert keys.shape == (1, 1, MOST_CHUNKS, mask.shape[1])


def test_one_entry_more_is_a_chunk_of_its_own() -> None:
    mask = MASKS["all chunks before"]()[None, None]
    count = len(chunks_of(proof(mask)[0], TOKENS))
    mask[0, 0, 20, 100] = True
    assert len(chunks_of(proof(mask)[0], TOKENS)) == count + 2


def test_too_many_chunks_are_none() -> None:
    tokens = MOST_CHUNKS + 1
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    assert chunks_of(proof(mask)[0], tokens) == []
    assert len(chunks_of(proof(mask[:, :, 1:])[0], tokens - 1)) == MOST_CHUNKS


def test_the_compiler_may_trust_the_operator() -> None:
    mask = MASKS["a window"]()[None, None]
    torch.library.opcheck(query_chunks.default, (mask, torch.tensor(False)))
    torch.library.opcheck(query_chunks.default, (mask.expand(2, 1, -1, -1), torch.tensor(True)))
    q = torch.randn(1, 2, TOKENS, 32)
    chunked = (q, q, q, mask, None, *key_padding(mask), None, None, *proof(mask))
    torch.library.opcheck(attention.default, chunked)


def qkv(queries: int, keys: int, kv_heads: int = 2, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, queries, 32), *[(batch, kv_heads, keys, 32)] * 2)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


class Asked:
    """Answers as compiled, and keeps requests and calls."""

    def __init__(self, plan: AttentionPlan | None = None) -> None:
        self.plan = plan
        self.requests: list[CallRequest] = []
        self.calls_made: list[AttentionCall] = []

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        self.requests.append(request)
        yield AttentionCall(self.plan or request.plan)

    def finished(self, call: AttentionCall, result: Result) -> None:
        assert result.identities is None
        self.calls_made.append(call)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_every_chunk_is_attention_to_its_keys(name: str, dense: bool) -> None:
    mask = MASKS[name]()[None, None]
    q, k, v = qkv(*mask.shape[2:])
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    plan = AttentionPlan(density=1.0) if dense else ALL_BLOCKS
    source = Asked()
    exact = (torch.arange(mask.shape[3]) < 3)[None]
    with calls_from(source):
        out, lse = attention(
            q, k, v, mask, None, *key_padding(mask), None, exact, *proof(mask),
            plan=plan.encode(), return_lse=True, clustered_keys=mask.shape[3] - 3,
        )  # fmt: skip
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)
    logits = q @ k.repeat_interleave(2, 1).mT / math.sqrt(32)
    wanted_lse = logits.masked_fill(~mask, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=1e-4)
    parts = [request.part for request in source.requests]
    assert [part.number for part in parts if part] == list(range(len(parts)))
    assert len(parts) > 1
    assert all(r.q_shape[2] <= CHUNK for r in source.requests)


def test_without_a_mask_its_chunks_are_enough() -> None:
    mask = MASKS["a sink"]()[None, None]
    q, k, v = qkv(TOKENS, TOKENS)
    spans, keys = proof(mask)
    count = len(chunks_of(spans, TOKENS))
    out, _ = attention(
        q, k, v, chunk_spans=spans[:count], chunk_keys=keys[:, :, :count], plan=ALL_BLOCKS.encode()
    )
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


def test_short_chunks_are_dense() -> None:
    """All together where there is no other, else each by itself."""
    mask = MASKS["all chunks before"]()[None, None]
    q, k, v = qkv(TOKENS, TOKENS)
    for least, dense_parts in ((CHUNK + 1, None), (CHUNK, 1), (2, 0)):
        source = Asked(replace(ALL_BLOCKS, density=0.3))
        plan = AttentionPlan(density=0.3, min_chunk_tokens=least).encode()
        with calls_from(source):
            attention(q, k, v, mask, None, *key_padding(mask), None, None, *proof(mask), plan=plan)
        parts = [request for request in source.requests if request.part is not None]
        if dense_parts is None:
            assert parts == []
            assert source.requests[0].dense_only
        else:
            assert sum(request.dense_only for request in parts) == dense_parts


def relative_error(out: Tensor, wanted: Tensor) -> float:
    return ((out - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("window", [100, 3])
def test_errors_stay_those_of_clustering_anew(window: int) -> None:
    """Keys keep their clusters from chunk to chunk of one call."""
    tokens, chunk = 2300, 256
    q, k, v = video_like(1, 2, tokens, 32, device="cpu", dtype=torch.float32)
    place = torch.arange(tokens) // chunk
    back = place[:, None] - place[None]
    mask = ((back >= 0) & (back < window))[None, None]
    wanted = F.scaled_dot_product_attention(q, k, v, mask)
    errors = []
    for more in ({"max_drift": 0.0}, {}):
        plan = AttentionPlan(density=0.2, **more)  # type: ignore[arg-type]
        source = Asked()
        args: tuple[Any, ...] = (mask, None, *key_padding(mask), None, None, *proof(mask))
        with calls_from(source):
            out, _ = attention(q, k, v, *args, plan=plan.encode())
        errors.append(relative_error(out, wanted))
        kept = [c.cache is not None and c.cache.kept is not None for c in source.calls_made]
        assert kept == [bool(number and not more) for number in range(len(kept))]
    print(errors)
    assert 0.01 < errors[1] < 1.1 * errors[0]


def test_chunks_that_are_not_those_of_the_call_are_refused() -> None:
    mask = MASKS["a window"]()[None, None]
    q, k, v = qkv(TOKENS, TOKENS)
    spans, keys = proof(mask)
    for wrong in (
        {"chunk_spans": spans}, {"chunk_keys": keys},
        {"chunk_spans": spans[:, :4], "chunk_keys": keys},
        {"chunk_spans": spans, "chunk_keys": keys[..., 1:]},
        {"chunk_spans": spans, "chunk_keys": keys.int()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="chunk_"):
            attention(q, k, v, **wrong)


def test_chunks_of_no_sample_are_no_error() -> None:
    mask = MASKS["all chunks before"]()[None, None]
    q, k, v = torch.randn(3, 0, 2, TOKENS, 32)
    plan = AttentionPlan(density=0.3, min_chunk_tokens=1).encode()
    out, _ = attention(q, k, v, mask, None, *key_padding(mask), None, None, *proof(mask), plan=plan)
    assert out.shape == q.shape
