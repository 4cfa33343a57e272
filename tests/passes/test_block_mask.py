"""flex_attention whose block mask is padding, and block masks that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from block_masks import STYLES, ends_of
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
    noop_mask,
)
from traced_graphs import ALL_BLOCKS, Rewriting, graphs_of, sites_of

from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import Reason

TOKENS = 300
PROOF = torch.ops.svg_ear.listed_padding.default
READ = {name: style for name, style in STYLES.items() if style.reason is None}


def qkv(tokens: int = TOKENS, keys: int | None = None, heads: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    sizes = (tokens, keys or tokens, keys or tokens)
    return tuple(torch.randn(2, h, n, 32) for n, h in zip(sizes, (4, heads, heads), strict=True))


class Proving(Rewriting):
    """Runs the rewritten graph node by node; `proven` says what each proof of the last run said."""

    def __init__(self, plan: AttentionPlan = ALL_BLOCKS) -> None:
        super().__init__(plan)
        self.proven: list[bool] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        super().__call__(gm, example_inputs)
        proven = self.proven

        class Running(Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                found = super().call_function(target, args, kwargs)
                if target is PROOF:
                    proven.append(bool(found[0]))
                return found

        def run(*args: Any) -> Any:
            proven.clear()
            return Running(gm).run(*args)

        return run


def compiled(
    fn: Callable[..., Any], backend: Rewriting, dynamic: bool | None = False
) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)


def agree(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def masked(q: Tensor, k: Tensor, v: Tensor, *masks: BlockMask) -> list[Tensor]:
    return [flex_attention(q, k, v, block_mask=mask, enable_gqa=True, scale=0.3) for mask in masks]


@pytest.fixture(scope="module")
def styles() -> tuple[Proving, list[Tensor], list[Tensor]]:
    """Every style that is read, traced in one graph, with two heads of keys."""
    masks = [style.block_mask(TOKENS) for style in READ.values()]
    backend, given = Proving(), qkv(heads=2)
    with torch.no_grad():
        return backend, compiled(masked, backend)(*given, *masks), masked(*given, *masks)


@pytest.mark.parametrize("name", READ)
def test_a_block_mask_from_outside_is_proven_by_its_values(
    styles: tuple[Proving, list[Tensor], list[Tensor]], name: str
) -> None:
    backend, found, wanted = styles
    place = list(READ).index(name)
    assert backend.proven[place] == READ[name].proven
    agree(found[place], wanted[place])


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.reason])
def test_a_function_that_cannot_be_padding_is_left(name: str) -> None:
    (site,) = sites_of(masked, *qkv(), STYLES[name].block_mask(TOKENS))
    assert site.reason is STYLES[name].reason


def test_a_score_function_is_left() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(q, k, v, lambda s, b, h, i, j: s * 0.5, block_mask=mask)

    (site,) = sites_of(call, *qkv(), READ["none"].block_mask(TOKENS))
    assert site.reason is Reason.FLEX


@pytest.mark.parametrize(
    ("dynamic", "inside"), [(False, False), (None, False), (True, False), (True, True)]
)
def test_of_any_length(dynamic: bool | None, inside: bool) -> None:
    """Made outside, or in the compiled function; padded to whole blocks, longer, shorter."""

    def made(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> list[Tensor]:
        n = q.shape[2]
        return masked(
            q, k, v, create_block_mask(lambda b, h, i, j: j < ends[i], None, None, n, n, "cpu")
        )

    backend = Proving()
    call = compiled(made if inside else masked, backend, dynamic)
    for tokens in (384, 512, 300):
        given = qkv(tokens)
        ends = ends_of(tokens, tokens - 30)
        mask = create_block_mask(
            lambda b, h, i, j, ends=ends: j < ends[i], None, None, tokens, tokens, "cpu"
        )
        with torch.no_grad():
            agree(call(*given, ends if inside else mask), masked(*given, mask))
        assert backend.proven == [True]
    assert backend.reasons == []
    assert backend.calls == {False: 3, None: 2, True: 1}[dynamic]


def test_a_renewed_mask_is_proven_anew() -> None:
    """The same shapes, another meaning: of captured numbers, of lists, of both."""
    backend, given = Proving(), qkv()
    call = compiled(masked, backend)
    ends = ends_of(TOKENS, TOKENS)

    def made() -> BlockMask:
        return create_block_mask(lambda b, h, i, j: j < ends[i], None, None, TOKENS, TOKENS, "cpu")

    mask = made()
    for bounds, renewed, proven in (
        ((TOKENS,), True, True), ((290,), True, True), ((150, TOKENS), True, False),
        ((280,), True, True), ((100,), False, False), ((280,), False, True),
    ):  # fmt: skip
        ends.copy_(ends_of(TOKENS, *bounds))
        mask = made() if renewed else mask
        with torch.no_grad():
            agree(call(*given, mask), masked(*given, mask))
        assert backend.proven == [proven]
    assert backend.calls == 1


def test_lists_that_leave_blocks_out_are_no_padding() -> None:
    """Lists by hand with the function of every pair: block-sparse attention."""
    order = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    backend, given = Proving(), qkv(512)
    for count in (2, 4):
        counts = torch.full((1, 1, 4), count, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=128)
        with torch.no_grad():
            compiled(masked, backend)(*given, mask)
        assert backend.proven == [count == 4]


def test_layers_share_a_proof_until_what_it_read_is_written() -> None:
    def layers(write: bool) -> Callable[..., Tensor]:
        def call(x: Tensor, ends: Tensor, mask: BlockMask) -> Tensor:
            for layer in range(3):
                x = F.layer_norm(x + flex_attention(x, x, x, block_mask=mask), (32,))
                if write and layer == 1:
                    ends[:5] -= 1
            return x

        return call

    for write, proofs in ((False, 1), (True, 2)):
        ends = ends_of(TOKENS, 290)
        mask = create_block_mask(
            lambda b, h, i, j, ends=ends: j < ends[i], None, None, TOKENS, TOKENS, "cpu"
        )
        backend, x = Proving(), qkv()[0]
        with torch.no_grad():
            found = compiled(layers(write), backend)(x, ends, mask)
            assert backend.proven == [True, False][:proofs]
            assert backend.rewritten == 3
            ends.copy_(ends_of(TOKENS, 290))
            agree(found, layers(write)(x, ends, mask))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_log_sum_exp_comes_with_a_mask(dynamic: bool) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, *masks: BlockMask) -> list[Tensor]:
        found = []
        for mask in masks:
            out, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
            found += [out, aux.lse]
        return found

    names = ("none", "lengths", "queries and keys", "documents")
    masks, backend = [STYLES[name].block_mask(TOKENS) for name in names], Proving()
    with torch.no_grad():
        found = compiled(call, backend, dynamic)(*qkv(), *masks)
        agree(found, call(*qkv(), *masks))
    assert (backend.rewritten, backend.reasons) == (4, [])
    assert backend.proven == [True, True, True, False]


class NewTokens(torch.nn.Module):
    """The last 100 of all tokens attend to all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(64, 64), torch.nn.Linear(64, 128)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, 32)).transpose(1, 2)
            for t in (self.q(x[:, -100:]), *self.kv(x).chunk(2, -1))
        )
        return flex_attention(q, k, v, block_mask=mask)


def test_a_chunk_that_sees_a_cache_of_chunks() -> None:
    """Queries are a part of the keys, and numbers of chunks are compared."""
    mask, by_token = (
        create_block_mask(function, None, None, 100, TOKENS, "cpu")
        for function in (
            lambda b, h, i, j: (i + 200) // 100 >= j // 100, lambda b, h, i, j: i + 200 >= j,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    backend, model, x = Proving(), NewTokens(), torch.randn(2, TOKENS, 64)
    with torch.no_grad():
        agree(compiled(model, backend)(x, mask), model(x, mask))
    assert (backend.reasons, backend.proven) == ([], [True])
    (site,) = sites_of(model, x, by_token)
    assert site.reason is Reason.CAUSAL_CHUNK


class Layers(torch.nn.Module):
    """Holds its mask as an attribute, and runs inside of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = READ["one chunk, padded"].block_mask(TOKENS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=self.mask, kernel_options={"BLOCK_M": 64}) + 1

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.utils.checkpoint.checkpoint(self.attend, q, k, v, use_reentrant=False)
        return inside, F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("masks", [False, True])
def test_in_a_checkpoint(masks: bool) -> None:
    """The one attention is rewritten, the other keeps its child graphs."""

    class OfOneKind(Proving):
        def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            sites = find_sites(gm)
            assert [site.reason for site in sites] == [None, None]
            chosen = [site for site in sites if (site.call.block_mask is not None) == masks]
            rewrite(gm, [(site, ALL_BLOCKS) for site in chosen])
            return gm.forward

    model, given = Layers(), qkv()
    with torch.no_grad():
        agree(compiled(model, OfOneKind())(*given), model(*given))


def test_a_dense_plan_is_equal() -> None:
    backend = Proving(AttentionPlan(density=1.0))
    masks = [READ[name].block_mask(TOKENS) for name in ("lengths", "queries and keys", "chunks")]
    with torch.no_grad():
        agree(compiled(masked, backend)(*qkv(), *masks), masked(*qkv(), *masks))


def test_a_sparse_plan_is_sparse_only_where_the_mask_is_proven() -> None:
    masks = [READ[name].block_mask(512) for name in ("lengths", "documents")]
    backend, given = Proving(AttentionPlan(density=0.2, q_clusters=8, k_clusters=16)), qkv(512)
    with torch.no_grad():
        sparse, same = compiled(masked, backend)(*given, *masks)
        wanted = masked(*given, *masks)
    agree(same, wanted[1])
    assert (sparse - wanted[0]).abs().max() > 1e-3


def test_a_full_mask_is_not_written_out() -> None:
    (gm,) = graphs_of(
        masked, *qkv(), create_block_mask(noop_mask, None, None, TOKENS, TOKENS, "cpu")
    )
    rewrite(gm, [(site, ALL_BLOCKS) for site in find_sites(gm)])
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.svg_ear.attention.default)
    assert call.args[3] is None
    assert call.args[5:7] == (None, None)
