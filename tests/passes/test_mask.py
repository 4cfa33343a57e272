"""What a mask is: by its shape, by how the graph makes it, or by what its values prove."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced_graphs import ALL_BLOCKS, Rewriting, graphs_of, run_rewritten

from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import Reason

HEADS, TOKENS, WIDTH = 2, 77, 64
PROOF = torch.ops.svg_ear.key_padding.default
Make = Callable[["Model", Tensor], Tensor | None]


class Model(nn.Module):
    """Layers of self-attention that share one mask, made of the valid tokens (B, N)."""

    def __init__(self, make: Make, layers: int = 3) -> None:
        super().__init__()
        self.make = make
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        self.x = x
        mask = self.make(self, valid)
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + out.transpose(1, 2).flatten(2)
        return x


def row(valid: Tensor) -> Tensor:
    return valid[:, None, None, :]


def square(model: Model, valid: Tensor) -> Tensor:
    """As HunyuanVideo 1.5 does: repeated, and with its transpose."""
    repeated = row(valid).repeat(1, 1, TOKENS, 1)
    return (repeated & repeated.transpose(2, 3)).bool()


def added(model: Model, valid: Tensor) -> Tensor:
    return ((1 - valid.float()) * -10000.0)[:, None, None, :]


def opened(model: Model, valid: Tensor) -> Tensor:
    """As HunyuanVideo's refiner does: everybody sees the first token."""
    mask = row(valid).repeat(1, 1, TOKENS, 1) & valid[:, None, :, None]
    mask[:, :, :, 0] = True
    return mask


def causal(model: Model, valid: Tensor) -> Tensor:
    place = torch.arange(TOKENS)
    return (place[None, :] <= place[:, None]) & row(valid)


def window(model: Model, valid: Tensor) -> Tensor:
    place = torch.arange(TOKENS)
    return ((place[None, :] - place[:, None]).abs() < 20)[None, None]


def triangle(model: Model, valid: Tensor) -> Tensor:
    return torch.ones(TOKENS, TOKENS).tril().bool()


def learned(model: Model, valid: Tensor) -> Tensor:
    return model.bias


def projected(model: Model, valid: Tensor) -> Tensor:
    return (model.gate(model.x).squeeze(-1) > 0)[:, None, :, None] | row(valid)


def lengths(model: Model, valid: Tensor) -> Tensor:
    return row(torch.arange(TOKENS) < valid.sum(-1, keepdim=True))


def cut(model: Model, valid: Tensor) -> Tensor:
    """True everywhere by how it is made, and then written into."""
    mask = torch.arange(TOKENS)[None, None, None, :] >= 0
    mask[..., 40:] = False
    return mask


SHOWN: list[tuple[Make, Reason | None, bool]] = [
    (lambda m, valid: row(valid), None, False),
    (lengths, None, False),
    (square, None, False),
    (lambda m, valid: row(valid).expand(-1, HEADS, TOKENS, -1), None, False),
    (added, None, True),
    (opened, None, True),
    (cut, None, False),
    (causal, Reason.CAUSAL, False),
    (window, Reason.CAUSAL, False),
    (triangle, Reason.CAUSAL, False),
    (learned, Reason.MASK, False),
    (projected, Reason.MASK, False),
    (lambda m, valid: row(valid)[..., :1], Reason.MASK, False),
]
NAMES = [
    "row", "lengths", "square", "expanded", "added", "opened", "cut", "causal", "window",
    "triangle", "learned", "projected", "no keys",
]  # fmt: skip


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, TOKENS, WIDTH), torch.arange(TOKENS) < torch.tensor([[60], [TOKENS]])


@pytest.mark.parametrize(("make", "reason", "proves"), SHOWN, ids=NAMES)
def test_what_the_graph_shows(make: Make, reason: Reason | None, proves: bool) -> None:
    model, given, backend = Model(make), inputs(), Rewriting(aot=False)
    with torch.no_grad():
        wanted = model(*given)
    out = run_rewritten(model, *given, backend=backend)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert [site.reason for site in backend.sites] == [reason] * 3
    if reason is not None:
        return
    assert [site.prove_mask for site in backend.sites] == [proves] * 3
    assert backend.rewritten == 3
    assert backend.graph is not None
    proofs = backend.graph.graph.find_nodes(op="call_function", target=PROOF)
    assert len(proofs) == proves  # one for all layers
    backend.graph.graph.lint()


@pytest.mark.parametrize("make", [m for m, reason, _ in SHOWN if reason is None])
def test_the_numbers_are_those_of_pytorchs_mask_at_any_length(make: Make) -> None:
    """Through AOTAutograd, which makes every write a copy."""
    model, given, backend = Model(make), inputs(), Rewriting()
    with torch.no_grad():
        wanted = model(*given)
    out = run_rewritten(model, *given, backend=backend, dynamic=True)
    assert backend.rewritten == 3
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_a_square_mask_of_padding_is_never_built() -> None:
    (gm,) = graphs_of(Model(square), *inputs())
    rewrite(gm, [(site, ALL_BLOCKS) for site in find_sites(gm)])
    shapes = [n.meta["example_value"].shape for n in gm.graph.nodes if _is_tensor(n)]
    assert not [s for s in shapes if s[-2:] == (TOKENS, TOKENS) and s[1] == 1]


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


class Given(nn.Module):
    """Two layers with a square mask from outside, written between them or not."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write = write
        self.first, self.second = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + out.transpose(1, 2).flatten(2)
            if self.write:
                mask[:, :, :40, 3:30] = False
        return x


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("is_padding", [False, True])
def test_a_mask_from_outside_is_proven_whenever_it_is_another(
    write: bool, is_padding: bool
) -> None:
    x, valid = inputs()
    mask = row(valid).repeat(1, 1, TOKENS, 1)
    if not is_padding:
        mask[:, :, 5, 8:12] = False
    model, backend = Given(write), Rewriting()
    (gm,) = graphs_of(model, x, mask)
    rewrite(gm, [(site, ALL_BLOCKS) for site in find_sites(gm)])
    assert len(gm.graph.find_nodes(op="call_function", target=PROOF)) == 1 + write
    with torch.no_grad():
        wanted = model(x, mask.clone())
    out = run_rewritten(model, x, mask.clone(), backend=backend)
    assert backend.rewritten == 2
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
