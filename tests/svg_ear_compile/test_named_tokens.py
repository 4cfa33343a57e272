"""`exact_tokens` as a function of the model's inputs: under bind, accelerate and explain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from session_models import DIM, HEADS, TOKENS, latents, shared
from torch import Tensor, nn

import svg_ear_compile
from svg_ear_compile.kernels import source_calls
from svg_ear_compile.named_tokens import named_tokens
from svg_ear_compile.session import bind
from svg_ear_compile.settings import Settings

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

NAMED = [*range(9), *range(150, TOKENS)]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kinds of tokens as the operator hands them on."""
    seen: list[Any] = []
    made = source_calls.token_kinds
    monkeypatch.setattr(
        source_calls, "token_kinds", lambda *args: seen.append(made(*args)) or seen[-1]
    )
    return seen


def mask(tokens: int = TOKENS) -> Tensor:
    found = torch.zeros(tokens, dtype=torch.bool)
    found[NAMED] = True
    return found


FORMS: list[Callable[[Mapping[str, Any]], object]] = [
    lambda inputs: inputs["text"],
    lambda inputs: torch.stack([inputs["text"], torch.zeros_like(inputs["text"])]),
    lambda inputs: torch.tensor([*range(-10, 0), *range(9)]),
    lambda inputs: ":9, -10:",
    lambda inputs: [slice(9), slice(150, None)],
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_the_same_tokens(form: Any, kinds: list[Any]) -> None:
    model, asked = shared(2), []

    def function(inputs: Mapping[str, Any]) -> object:
        asked.append(list(inputs))
        return form(inputs)

    with bind(model, exact_tokens=function), torch.no_grad():
        for timestep in (900, 800):
            model(latents(), torch.tensor([timestep]), text=mask())
    assert asked == [["hidden_states", "timestep", "text"]] * 2  # once a forward, not once a layer
    assert len(kinds) == 4
    for found in kinds:
        assert (found.queries == 2).nonzero()[:, -1].tolist() == NAMED
        assert (found.keys == 2).nonzero()[:, -1].tolist() == NAMED
        assert found.clustered == (TOKENS - len(NAMED),) * 2


def test_named_queries_are_exact_and_none_keeps_what_the_graph_says() -> None:
    model, x, step = shared(1), latents(), torch.tensor([900])
    with torch.no_grad():
        with bind(model, dense_layers=1):
            dense = model(x, step)
        with bind(model):
            plain = model(x, step)
        with bind(model, exact_tokens=lambda inputs: mask()):
            named = model(x, step)
        with bind(model, exact_tokens=lambda inputs: None):
            left = model(x, step)
        with bind(model, exact_tokens=lambda inputs: ":"):
            everything = model(x, step)
    torch.testing.assert_close(named[:, NAMED], dense[:, NAMED])
    assert (plain - dense)[:, NAMED].abs().max() > 1e-3
    assert torch.equal(left, plain)
    torch.testing.assert_close(everything, dense)


def test_tokens_may_be_others_in_every_step(kinds: list[Any]) -> None:
    model = shared(1)

    def first_tokens(inputs: Mapping[str, Any]) -> str:
        return f":{int(inputs['timestep']) // 100}"

    with bind(model, exact_tokens=first_tokens), torch.no_grad():
        for timestep in (900, 800, 700):
            model(latents(), torch.tensor([timestep]))
    assert [int((found.keys == 2).sum()) for found in kinds] == [9, 8, 7]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda inputs: inputs["mask"], ValueError, "raised KeyError: 'mask'; the arguments of"),
        (lambda inputs: mask(512), ValueError, "a mask of 512 tokens, but attention goes over 160"),
        (lambda inputs: torch.tensor([160]), ValueError, "tokens outside of the sequence"),
        (lambda inputs: mask().float(), TypeError, "got a tensor of torch.float32: compare it"),
        (lambda inputs: mask().view(1, 1, -1), ValueError, r"got one of shape \(1, 1, 160\)"),
        (lambda inputs: 7, TypeError, "exact_tokens must be a slice, a list of slices or text"),
        (lambda inputs: "7", ValueError, "must be slices such as"),
    ],
)
def test_each_mistake_is_answered_by_a_sentence(
    function: Any, error: type[Exception], message: str
) -> None:
    model = shared(1)
    with bind(model, exact_tokens=function), pytest.raises(error, match=message) as raised:
        model(latents(), torch.tensor([900]))
    assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="exact_tokens of bind is a function"):
        bind(model, exact_tokens=":9")  # the wrong type, which is the point


def test_torch_compile_alone_does_not_know_the_inputs() -> None:
    with pytest.raises(TypeError, match=r"give it to svg_ear_compile.bind\(model, exact_tokens="):
        Settings.parse({"exact_tokens": lambda inputs: ":9"})


class Traced(nn.Module):
    """Self-attention in a way that a graph is read by."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.to_qkv(hidden_states).unflatten(-1, (3 * HEADS, DIM)).chunk(3, -2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2) * timestep


OPTIONS = {"min_tokens": 16, "density": 0.3, "exact_tokens": lambda inputs: inputs["text"]}


def test_explain_says_how_many_and_where_from() -> None:
    torch.manual_seed(0)
    given = (latents(), torch.tensor([0.9]))
    found = svg_ear_compile.explain(Traced(), *given, mask(), options=OPTIONS)
    (site,) = found.sites
    assert site.is_sparse
    assert site.exact == (19, 19)
    assert "exact tokens 0:9, 150:160 (exact_tokens)" in " ".join(str(found).split())
    short = svg_ear_compile.explain(Traced(), *given, mask(512), options=OPTIONS)
    assert short.sites[0].exact == (0, 0)
    assert "do not fit its tokens: ignored here" in " ".join(str(short).split())


def test_accelerate_takes_the_function_among_its_options(kinds: list[Any]) -> None:
    torch.manual_seed(0)
    model = Traced().eval().requires_grad_(False)
    with svg_ear_compile.accelerate(model, options=OPTIONS), torch.no_grad():
        model(latents(), torch.tensor([0.9]), mask())
    assert [int((found.queries == 2).sum()) for found in kinds] == [len(NAMED)]


def test_indices_become_slices() -> None:
    named = named_tokens(lambda inputs: torch.tensor([[-1, 5], [4, -3]]), {})
    assert named is not None
    assert named.spans == ((-3, -2), (-1, None), (4, 6))
    nothing = named_tokens(lambda inputs: torch.tensor([], dtype=torch.long), {})
    assert nothing is not None
    assert nothing.spans == ()
