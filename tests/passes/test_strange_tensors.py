"""Graphs with tensors and transforms that the pass does not know run as they do without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from traced_graphs import ALL_BLOCKS, graphs_of

from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings

TOKENS, DIM = 37, 32


def sdpa(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q)


def by_hand(q: Tensor) -> Tensor:
    return (q @ q.mT * 0.3).softmax(-1) @ q


def compiled(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[object]]:
    """`fn` compiled with every site rewritten, and for each site why it is not, or None."""
    reasons: list[object] = []

    def backend(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        sites = find_sites(gm)
        reasons.extend(site.reason for site in sites)
        rewrite(gm, [(site, ALL_BLOCKS) for site in sites if site.reason is None])
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(fn, backend=backend), reasons


def jagged(heads: int = 2) -> Tensor:
    torch.manual_seed(0)
    return torch.nested.nested_tensor(
        [torch.randn(n, heads, DIM) for n in (5, TOKENS)], layout=torch.jagged
    )


def flat(tensor: Tensor) -> Tensor:
    return tensor.values() if tensor.is_nested else tensor.to_dense()


@pytest.mark.parametrize(
    "fn",
    [
        lambda t: sdpa(t.transpose(1, 2)),
        lambda t: sdpa((t * 2).transpose(1, 2)).transpose(1, 2),
        lambda t: t + 1,
        lambda t: t.softmax(-1) * 2,
        lambda t: F.linear(t, torch.ones(8, DIM)).sin(),
    ],
)
def test_jagged_tensors(fn: Callable[[Tensor], Tensor]) -> None:
    given = jagged()
    call, reasons = compiled(fn)
    with torch.no_grad():
        torch.testing.assert_close(flat(call(given)), flat(fn(given)))
    assert None not in reasons


def test_a_dense_call_beside_a_jagged_one_is_rewritten() -> None:
    def both(t: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return sdpa(t.transpose(1, 2)), sdpa(q)

    given, q = jagged(), torch.randn(1, 2, TOKENS, DIM)
    call, reasons = compiled(both)
    with torch.no_grad():
        torch.testing.assert_close(call(given, q)[1], sdpa(q), atol=1e-5, rtol=1e-4)
    assert None in reasons


def test_a_length_taken_of_a_jagged_tensor() -> None:
    def padded(t: Tensor) -> Tensor:
        return by_hand(torch.nested.to_padded_tensor(t, 0.0, (2, TOKENS, 2, DIM)).transpose(1, 2))

    given = jagged()
    call, _ = compiled(padded)
    with torch.no_grad():
        torch.testing.assert_close(call(given), padded(given), atol=1e-5, rtol=1e-4)


def test_a_graph_with_jagged_tensors_is_planned() -> None:
    def both(t: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(t, torch.ones(8, DIM)), by_hand(q)

    (gm,) = graphs_of(both, jagged(), torch.randn(1, 2, TOKENS, DIM))
    assert rewrite_graph(gm, Settings.parse({"density": 0.5, "min_tokens": 16})).sparse == 1


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors(layout: torch.layout) -> None:
    def fn(mixing: Tensor, q: Tensor) -> Tensor:
        return by_hand(q) + torch.sparse.mm(mixing, q[0, 0])

    mixing, q = torch.eye(TOKENS).to_sparse(layout=layout), torch.randn(1, 2, TOKENS, DIM)
    call, _ = compiled(fn)
    with torch.no_grad():
        torch.testing.assert_close(call(mixing, q), fn(mixing, q), atol=1e-5, rtol=1e-4)


class Wrapped(torch.Tensor):
    """A subclass that carries its data inside."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: Tensor) -> None:
        self.data_inside = data

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_inside"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Wrapped:
        return Wrapped(inner["data_inside"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return x.data_inside if isinstance(x, Wrapped) else x

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(Tensor, Wrapped, out)


@pytest.mark.parametrize("fn", [sdpa, by_hand, lambda q: by_hand(q) * 2])
def test_wrapper_subclasses(fn: Callable[[Tensor], Tensor]) -> None:
    q = torch.randn(1, 2, TOKENS, DIM)
    call, reasons = compiled(fn)
    with torch.no_grad():
        torch.testing.assert_close(call(Wrapped(q)).data_inside, fn(q))
    assert reasons == [Reason.TENSOR_TYPE]


def tangent(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(fn, (x,), (torch.ones_like(x),))[1]


def forward_tangent(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: fn(x).square().sum())(x)


def mapped(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.vmap(fn)(torch.stack([x, x + 1]))


def second(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return gradient(lambda x: tangent(fn, x), x)


TRANSFORMS = [tangent, forward_tangent, gradient, mapped, second]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("fn", [by_hand, lambda q: by_hand(q).mT.contiguous() * 2])
@pytest.mark.parametrize("around", [False, True])
def test_transforms(transform: Any, fn: Callable[[Tensor], Tensor], around: bool) -> None:
    """Of torch.func and of forward AD, inside of the compiled function and around it."""
    x = torch.randn(1, 2, TOKENS, DIM)
    wanted = transform(fn, x)
    if around:
        call, _ = compiled(fn)
        found = transform(call, x)
    else:
        call, _ = compiled(lambda x: transform(fn, x))
        found = call(x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_graph_compiled_before_is_not_used_under_a_transform() -> None:
    x = torch.randn(1, 2, TOKENS, DIM)
    call, reasons = compiled(by_hand)
    with torch.no_grad():
        torch.testing.assert_close(call(x), by_hand(x), atol=1e-5, rtol=1e-4)
    assert reasons == [None]
    for transform in TRANSFORMS:
        torch.testing.assert_close(transform(call, x), transform(by_hand, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fn", [sdpa, by_hand])
def test_attention_that_gradients_pass_is_left(fn: Callable[[Tensor], Tensor]) -> None:
    weight = torch.randn(DIM, DIM, requires_grad=True)

    def partly(x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = fn(x @ weight)
        return fn(x @ weight) + frozen

    x = torch.randn(1, 2, TOKENS, DIM)
    call, reasons = compiled(partly)
    out = call(x)
    torch.testing.assert_close(out, partly(x), atol=1e-4, rtol=1e-4)
    assert reasons == [None, Reason.GRADIENTS]
    out.sum().backward()
    assert weight.grad is not None
