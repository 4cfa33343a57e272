"""The rewrite: one call replaced in place, the same numbers, one graph for two lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_role import TEXT, WIDTH, Joint, RopeIntoBuffer, SelfAttention, SingleStreamTextFirst
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from traced_graphs import ALL_BLOCKS, Rewriting, graphs_of, run_rewritten

from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.sdpa import SDPA_TARGETS
from svg_ear_compile.passes.site import Reason

VIDEO = 160
OP = torch.ops.svg_ear.attention.default


def inputs(video: int = VIDEO) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, video, WIDTH), torch.randn(1, TEXT, WIDTH)


def rewrite_all(gm: GraphModule) -> list[Node]:
    return rewrite(gm, [(s, ALL_BLOCKS) for s in find_sites(gm) if s.reason is None])


def line(node: Node) -> tuple[Any, ...]:
    return node.op, node.target, node.name


@pytest.mark.parametrize("kind", [SelfAttention, Joint, RopeIntoBuffer])
def test_only_the_call_changes_and_it_changes_in_place(kind: type[nn.Module]) -> None:
    (gm,) = graphs_of(kind(), *inputs())
    before = [line(n) for n in gm.graph.nodes]
    (at,) = (i for i, n in enumerate(gm.graph.nodes) if n.target in SDPA_TARGETS)
    old = list(gm.graph.nodes)[at]
    old_meta, users = dict(old.meta), [u.name for u in old.users]
    (out,) = rewrite_all(gm)
    gm.graph.lint()
    nodes = list(gm.graph.nodes)
    (now,) = (i for i, n in enumerate(nodes) if n.target is OP)
    assert nodes[now + 1] is out
    assert [line(n) for n in nodes[:at]] == before[:at]
    assert (now == at) or kind is Joint  # which tokens are text is computed in between
    assert [line(n) for n in nodes[now + 2 :]] == before[at + 1 :]
    assert [u.name for u in out.users] == users
    kept = {"nn_module_stack", "source_fn_stack", "stack_trace", "example_value"} & old_meta.keys()
    assert {"stack_trace", "example_value"} <= kept
    assert all(out.meta[key] is old_meta[key] for key in kept)


@pytest.mark.parametrize("kind", [SelfAttention, Joint, SingleStreamTextFirst, RopeIntoBuffer])
def test_with_every_block_the_output_is_dense_attentions(kind: type[nn.Module]) -> None:
    module, given, backend = kind(), inputs(), Rewriting()
    with torch.no_grad():
        wanted = module(*given)
    out = run_rewritten(module, *given, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)


def test_the_operator_is_what_runs() -> None:
    """A small density changes the numbers: the comparison above is not dense with dense."""
    from svg_ear_compile.kernels.plan import AttentionPlan

    q = torch.randn(1, 2, VIDEO, 32) * 3
    sparse = Rewriting(AttentionPlan(density=0.1, q_clusters=4, k_clusters=8))
    out = run_rewritten(lambda q: F.scaled_dot_product_attention(q, q, q), q, backend=sparse)
    wanted = F.scaled_dot_product_attention(q, q, q)
    assert 1e-4 < (out - wanted).norm() / wanted.norm() < 1


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_masks_scales_and_grouped_heads(kv_heads: int, masked: bool) -> None:
    torch.manual_seed(2)
    q = torch.randn(2, 4, VIDEO, 32)
    k, v = (torch.randn(2, kv_heads, VIDEO, 32) for _ in range(2))
    lengths = torch.tensor([100, VIDEO]) if masked else None
    mask = None if lengths is None else (torch.arange(VIDEO) < lengths[:, None])[:, None, None]

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=0.3, enable_gqa=kv_heads != 4
        )

    backend = Rewriting()
    out = run_rewritten(call, q, k, v, mask, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(out, call(q, k, v, mask), atol=1e-5, rtol=1e-4)


def test_attention_in_a_branch_is_rewritten_in_its_own_graph() -> None:
    def dense(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    def call(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, dense, lambda x: x + 1, (x,))

    x = torch.rand(1, 2, VIDEO, 32)
    backend = Rewriting()
    out = run_rewritten(call, x, backend=backend)
    assert backend.rewritten == 1
    torch.testing.assert_close(out, dense(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [SelfAttention, Joint, SingleStreamTextFirst])
def test_one_graph_serves_two_lengths(kind: type[nn.Module]) -> None:
    """Token count and text length are symbolic, and stay so."""
    module, backend = kind(), Rewriting()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for video, text in ((160, 6), (224, 9)):
        given = (torch.randn(1, video, WIDTH), torch.randn(1, text, WIDTH))
        torch._dynamo.mark_dynamic(given[0], 1)
        if kind is not SelfAttention:  # it does not read the text
            torch._dynamo.mark_dynamic(given[1], 1)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*given), module(*given), atol=1e-5, rtol=1e-4)
    assert (backend.calls, backend.rewritten) == (1, 1)


def test_a_symbolic_text_length_is_read_off_the_graph() -> None:
    (gm,) = graphs_of(SingleStreamTextFirst(), *inputs(), dynamic=True)
    rewrite_all(gm)
    (call,) = (n for n in gm.graph.nodes if n.target is OP)
    length = call.kwargs["clustered_keys"]
    assert isinstance(length, Node)
    assert length.meta["example_value"].node.hint == VIDEO


SHARPNESS, NOTHING = 0.3, 0.0


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=SHARPNESS)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = NOTHING) -> Tensor:
    scores = -(q @ k.mT) * SHARPNESS / 1.5
    return F.dropout((scores / SHARPNESS * q.shape[2] ** -0.5).softmax(-1), dropout_p) @ v


def _sharpened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SHARPNESS).softmax(-1) @ v


@pytest.mark.parametrize("attend", [_by_kernel, _by_hand])
def test_numbers_from_outside_are_symbols_where_shapes_are_dynamic(
    attend: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may change between two calls."""
    backend = Rewriting(aot=False)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for sharpness in (0.3, 0.7, 0.0):
        monkeypatch.setattr(f"{__name__}.SHARPNESS", sharpness)
        given = tuple(torch.randn(1, 2, 64, 32) for _ in range(3))
        with torch.no_grad():
            wanted = attend(*given)
            torch.testing.assert_close(
                compiled(*given), wanted, atol=1e-5, rtol=1e-4, equal_nan=True
            )
    assert backend.reasons == []
    assert backend.rewritten == backend.calls >= 1
    assert attend is _by_kernel or backend.calls == 1


def test_a_scale_from_outside_leaves_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies the queries, and 60 * 2000 is infinite in float16 where the logits are not."""
    backend = Rewriting(aot=False)
    torch._dynamo.reset()
    compiled = torch.compile(_sharpened, backend=backend, fullgraph=True, dynamic=True)
    q, k, v = (torch.randn(1, 2, 64, 32).half() for _ in range(3))
    for sharpness in (0.3, 2000.5):
        monkeypatch.setattr(f"{__name__}.SHARPNESS", sharpness)
        with torch.no_grad():
            assert compiled(60 * q, 1e-3 * k, v).isfinite().all()
    assert backend.reasons[-1:] == [Reason.SCALE]


def test_lengths_that_are_counted_at_run_time() -> None:
    """Strides of such lengths have no numbers to order them by."""

    def layer(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 32)).transpose(1, 2)
        return ((q @ q.mT * 0.3).softmax(-1) @ q).transpose(1, 2).flatten(2)

    backend = Rewriting()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for tokens in (37, 41):
        x = torch.randn(2, tokens, 64)
        torch._dynamo.decorators.mark_unbacked(x, 1)
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)
    assert (backend.calls, backend.rewritten) == (1, 1)
