"""Which tokens are found to be exact, by where they come from and not by how many they are.

Longer than 400 lines: one case after the other of one question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from joined_stack import TEXT, TEXT_AT, VIDEO, VIDEO_AT, WIDTH, Stack, attend, inputs
from torch import Tensor, nn
from traced_graphs import ALL_BLOCKS, Rewriting, graphs_of, run_rewritten, sites_of

from svg_ear_compile.capture import CapturedCall, capture_attention
from svg_ear_compile.kernels import registry
from svg_ear_compile.kernels.kinds import EXACT, TokenKinds
from svg_ear_compile.passes.exact import given_tokens
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import AttentionSite, Role


def placed(x: Tensor, text: Tensor, how: str) -> Tensor:
    packed = x.new_zeros(1, TEXT + VIDEO, WIDTH)
    if how == "setitem":
        packed[:, TEXT_AT] = text
        packed[:, VIDEO_AT] = x
        return packed
    if how == "slices":
        packed[:, :TEXT], packed[:, TEXT:] = text, x
        return packed
    if how == "mask":
        packed[:, torch.arange(TEXT + VIDEO) < TEXT] = text
        packed[:, torch.arange(TEXT + VIDEO) >= TEXT] = x
        return packed
    if how == "mask of the batch":
        packed[(torch.arange(TEXT + VIDEO) < TEXT)[None]] = text[0]
        packed[(torch.arange(TEXT + VIDEO) >= TEXT)[None]] = x[0]
        return packed
    if how == "sample and index":
        packed[0, TEXT_AT], packed[-1, VIDEO_AT] = text[0], x[0]
        return packed
    if how == "one word":
        packed[:, :TEXT], packed[:, TEXT:] = text[:, :1], x
        return packed
    if how == "one word by index":
        packed[:, TEXT_AT], packed[:, VIDEO_AT] = text[0, 0], x
        return packed
    if how == "masked_scatter":
        is_text = (torch.arange(TEXT + VIDEO) < TEXT)[None, :, None].expand(1, -1, WIDTH)
        return packed.masked_scatter(is_text, text).masked_scatter_(~is_text, x)
    if how == "scatter by a part of an index":
        at = torch.arange(TEXT + VIDEO)
        packed = packed.scatter(1, at[None, :TEXT, None].expand(1, TEXT, WIDTH), text)
        return packed.scatter_(1, at[None, TEXT:, None].expand(1, VIDEO, WIDTH), x)
    if how == "slice_scatter":
        packed = torch.slice_scatter(packed, text, 1, 0, TEXT)
        return packed.slice_scatter(x, dim=1, start=TEXT)
    if how == "scatter":
        at = TEXT_AT[None, :, None].expand(1, TEXT, WIDTH)
        packed = packed.scatter(1, at, text)
        return packed.scatter(1, VIDEO_AT[None, :, None].expand(1, VIDEO, WIDTH), x)
    return packed.index_copy(1, TEXT_AT, text).index_copy(1, VIDEO_AT, x)


def last(text: Tensor) -> Tensor:
    """Text behind as much filling as there is video."""
    filled = text.new_zeros(1, VIDEO + TEXT, WIDTH)
    filled[:, VIDEO:].copy_(text)
    return filled


def overwritten(x: Tensor, text: Tensor, how: str) -> Tensor:
    """Words for every token, of which patches take the places of all but the first TEXT."""
    words = text[:, :1].expand(1, TEXT + VIDEO, WIDTH).clone()
    if how == "index":
        words[:, VIDEO_AT] = x
        return words
    is_video = torch.arange(TEXT + VIDEO) >= TEXT
    if how == "masked_scatter":
        return words.masked_scatter(is_video[:, None], x)
    return torch.where(is_video[:, None], F.pad(x, (0, 0, TEXT, 0)), words)


def framewise(x: Tensor, text: Tensor) -> Tensor:
    """A word behind the patches of each of 8 frames, apart and together again."""
    frames = torch.cat([x.unflatten(1, (8, -1)), text[:, None, :1].expand(1, 8, 1, WIDTH)], 2)
    return frames.flatten(1, 2).view(1, 8, 16, WIDTH).reshape(1, 128, WIDTH)


# What becomes one sequence, and where its exact tokens are.
PACKED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "video alone": (lambda m, x, t: x, ""),
    "text last": (lambda m, x, t: torch.cat([x, t], 1), "120:129"),
    "text longer than the video's parts": (lambda m, x, t: torch.cat([t, x], 1), "0:9"),
    "two cats": (
        lambda m, x, t: torch.cat([t[:, :4], torch.cat([x, t[:, 4:]], 1)], 1), "0:4, 124:129",
    ),
    "sliced to a valid length": (lambda m, x, t: torch.cat([x, t], 1)[:, :125], "120:125"),
    "a slice past the end": (lambda m, x, t: torch.cat([x, t], 1)[:, 4:400], "116:125"),
    "padded after": (lambda m, x, t: F.pad(torch.cat([x, t], 1), (0, 0, 0, 7)), "120:129"),
    "padded before": (lambda m, x, t: torch.cat([x, F.pad(t, (0, 0, 0, 3))], 1), "120:129"),
    "zeros after": (
        lambda m, x, t: torch.cat([torch.cat([x, t], 1), x.new_zeros(1, 7, WIDTH)], 1), "120:129",
    ),
    "flipped": (lambda m, x, t: torch.cat([x, t], 1).flip(1), "0:9"),
    "narrowed": (lambda m, x, t: torch.cat([x, t], 1).narrow(1, 4, 121), "116:121"),
    "narrowed from the end": (lambda m, x, t: torch.cat([x, t], 1).narrow(1, -125, 125), "116:125"),
    "sliced by ATen": (
        lambda m, x, t: torch.ops.aten.slice.Tensor(torch.cat([x, t], 1), 1, 4, 125), "116:121"
    ),
    "reordered by ATen": (
        lambda m, x, t: torch.ops.aten.index.Tensor(
            torch.cat([x, t], 1), [None, torch.arange(128, -1, -1)]
        ), "an unknown number",
    ),
    "normalised by ATen": (
        lambda m, x, t: torch.native_layer_norm(
            torch.cat([x, t], 1), (WIDTH,), None, None, 1e-5
        )[0], "120:129",
    ),
    "a product of features": (
        lambda m, x, t: torch.bmm(torch.cat([x, t], 1), torch.eye(WIDTH)[None]), "120:129"
    ),
    "rolled": (lambda m, x, t: torch.cat([x, t], 1).roll(4, 1), "0:4, 124:129"),
    "reordered": (
        lambda m, x, t: torch.cat([x, t], 1)[:, torch.arange(128, -1, -1)], "an unknown number"
    ),
    "gathered": (
        lambda m, x, t: torch.cat([x, t], 1).gather(
            1, torch.arange(128, -1, -1)[None, :, None].expand(1, -1, WIDTH)
        ), "an unknown number",
    ),
    "padded and added": (
        lambda m, x, t: F.pad(x, (0, 0, TEXT, 0)) + F.pad(t, (0, 0, 0, VIDEO)), "0:9"
    ),
    "added to padding": (lambda m, x, t: F.pad(x, (0, 0, 0, TEXT)) + last(t), "120:129"),
    "registers": (lambda m, x, t: torch.cat([m.registers, x], 1), "0:4"),
    "split and joined": (
        lambda m, x, t: torch.cat(torch.cat([x, t], 1).split([100, 20, 9], 1)[::-1], 1), "0:9"
    ),
    "by index_copy": (lambda m, x, t: placed(x, t, "index_copy"), "9 by index"),
    "by setitem": (lambda m, x, t: placed(x, t, "setitem"), "9 by index"),
    "by mask": (lambda m, x, t: placed(x, t, "mask"), "9 by index"),
    "by scatter": (lambda m, x, t: placed(x, t, "scatter"), "9 by index"),
    "by slices": (lambda m, x, t: placed(x, t, "slices"), "0:9"),
    "by slice_scatter": (lambda m, x, t: placed(x, t, "slice_scatter"), "0:9"),
    "one word": (lambda m, x, t: placed(x, t, "one word"), "0:9"),
    "one word by index": (lambda m, x, t: placed(x, t, "one word by index"), "9 by index"),
    "by masked_scatter": (lambda m, x, t: placed(x, t, "masked_scatter"), "9 by index"),
    "by a mask of the batch": (lambda m, x, t: placed(x, t, "mask of the batch"), "9 by index"),
    "by a part of an index": (
        lambda m, x, t: placed(x, t, "scatter by a part of an index"), "9 by index"
    ),
    "over words by index": (lambda m, x, t: overwritten(x, t, "index"), "9 by index"),
    "over words by mask": (lambda m, x, t: overwritten(x, t, "masked_scatter"), "9 by index"),
    "chosen": (lambda m, x, t: overwritten(x, t, "where"), "an unknown number"),
    "chosen in the video's places": (
        lambda m, x, t: x.where(
            torch.arange(VIDEO)[:, None] >= TEXT, F.pad(t, (0, 0, 0, VIDEO - TEXT))
        ),
        "an unknown number",
    ),
    "a table of tokens": (
        lambda m, x, t: F.embedding(torch.arange(128, -1, -1), torch.cat([x, t], 1)[0])[None],
        "an unknown number",
    ),
    "placed in the only sample": (
        lambda m, x, t: placed(x, t, "sample and index"), "9 by index"
    ),
    "channels first": (lambda m, x, t: torch.cat([t.mT, x.mT], 2).mT, "0:9"),
    "channels first, two cats": (
        lambda m, x, t: torch.cat([torch.cat([x.mT, t.mT], -1), t.mT[..., :3]], -1).transpose(1, 2),
        "120:132",
    ),
    "a convolution after it": (
        lambda m, x, t: F.conv1d(torch.cat([x.mT, t.mT], 2), m.ff.weight[..., None]).mT, "120:129"
    ),
    "hstack": (lambda m, x, t: torch.hstack([x, t]), "120:129"),
    "column_stack": (lambda m, x, t: torch.column_stack((t, x)), "0:9"),
    "vstack": (lambda m, x, t: torch.vstack([x.mT.mT[0], t[0]])[None], "120:129"),
    "in every frame": (lambda m, x, t: framewise(x, t), "8 in 8 spans"),
}  # fmt: skip


ORIGINS = {"registers": "learned tokens"}

# One of each kind of places goes on through AOTAutograd.
THROUGH_AOT = ("text last", "by setitem", "reordered", "in every frame")


@pytest.mark.parametrize("name", PACKED)
def test_text_is_found_wherever_it_lies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its places, by the keys that are exact when the graph runs, and by the same output."""
    pack, places = PACKED[name]
    seen: list[list[int]] = []

    def heard(q: Tensor, k: Tensor, *more: Any, kinds: TokenKinds, **named: Any) -> Any:
        seen.append(exact_keys_of(kinds, k.shape[2]))
        return attended(q, k, *more, kinds=kinds, **named)

    attended = registry.sparse_attention
    monkeypatch.setattr(registry, "sparse_attention", heard)
    module, backend = Stack(pack), Rewriting(aot=name in THROUGH_AOT)
    out = run_rewritten(module, *inputs(), backend=backend)
    assert len(backend.sites) == backend.rewritten == 2
    for site in backend.sites:
        assert site.role is (Role.JOINT if places else Role.SELF)
        assert site.exact.spans == (places, places)
        assert not site.exact.guessed
        assert site.exact.origin == ("" if not places else ORIGINS.get(name, "text"))
    wanted = [
        i for span in places.split(", ") if ":" in span for i in range(*map(int, span.split(":")))
    ]
    if "by index" in places or "unknown" in places:
        wanted = list(range(9))
    if "spans" in places:
        wanted = list(range(15, 128, 16))
    assert seen == [wanted, wanted]
    with torch.no_grad():
        torch.testing.assert_close(out, module(*inputs()), atol=1e-5, rtol=1e-4)


def exact_keys_of(kinds: TokenKinds, keys: int) -> list[int]:
    """Places of the exact keys of the first sample; all others have room among the clustered."""
    found = [] if kinds.keys is None else (kinds.keys[0, 0] == EXACT).nonzero()[:, 0].tolist()
    assert kinds.counts(1, keys)[1] >= keys - len(found)
    return found


def exact_keys_seen(module: nn.Module, *given_here: Tensor) -> list[list[int]]:
    """Places of the exact keys of every call, as a capture of calls gets them."""
    seen: list[list[int]] = []

    def keep(call: CapturedCall) -> None:
        seen.append(exact_keys_of(call.kinds, call.k.shape[2]))

    torch._dynamo.reset()
    capture_attention(module, given_here, {}, keep)
    return seen


@pytest.mark.parametrize("how", ["written", "taken", "repeated", "of each token"])
def test_an_index_that_does_not_say_places_when_attention_runs(how: str) -> None:
    """It is written later on, or says one place for several tokens, or one for each feature."""

    def pack(module: Stack, x: Tensor, text: Tensor, index: Tensor) -> Tensor:
        if how == "written":
            packed = x.new_zeros(1, TEXT + VIDEO, WIDTH)
            packed[:, index[:TEXT]], packed[:, index[TEXT:]] = text, x
            index.zero_()
            return packed
        both = torch.cat([text, x], 1)
        if how == "taken":
            found = both.index_select(1, index)
            index.zero_()
            return found
        if how == "repeated":
            return both.gather(1, index[:1, None, None].expand(1, VIDEO, WIDTH))
        return both.gather(1, index[None, :, None] + torch.arange(WIDTH) * 0)

    module, backend = Stack(pack), Rewriting()
    given_here = (*inputs(), torch.arange(TEXT + VIDEO))
    with torch.no_grad():
        wanted = module(*(t.clone() for t in given_here))
    out = run_rewritten(module, *(t.clone() for t in given_here), backend=backend)
    assert backend.rewritten == 2
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)
    assert exact_keys_seen(module, *given_here) == [[], []]


def test_lengths_that_are_symbolic() -> None:
    module = Stack(lambda m, x, t: torch.cat([t, x, t[:, :2]], 1)[:, : x.shape[1] + t.shape[1]])
    (graph,) = graphs_of(module, *inputs(), dynamic=True)
    for site in find_sites(graph):
        assert site.exact.spans == ("0:9", "0:9")


def test_history_is_video() -> None:
    """Clips of other inputs, patched by convolutions of their own."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.now, self.past = (nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)) for _ in range(2))
            self.stack = Stack(lambda m, x, t: x)
            self.words = nn.Linear(16, WIDTH)

        def forward(self, clip: Tensor, past: Tensor, text: Tensor) -> Tensor:
            now, before = (
                conv(x).flatten(2).transpose(1, 2)
                for conv, x in ((self.now, clip), (self.past, past))
            )
            return self.stack.block(torch.cat([self.words(text), before, now], 1))

    clip = torch.randn(1, 4, 2, 8, 8)
    (site,) = sites_of(Frames(), clip, torch.randn(1, 4, 5, 8, 8), inputs()[1])
    assert site.exact.spans == ("0:9", "0:9")


def test_a_token_that_a_condition_became_is_exact() -> None:
    class Timed(Stack):
        def forward(self, video: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
            time = self.words(timestep * torch.ones(16))[None, None]
            return self.block(torch.cat([time, self.patches(video)], 1))

    (site,) = sites_of(Timed(lambda m, x, t: x), *inputs(), torch.ones(1))
    assert (site.exact.spans[1], site.exact.origin) == ("0:1", "conditions")


def test_timesteps_of_every_token_do_not_hide_the_video() -> None:
    class Modulated(Stack):
        def __init__(self) -> None:
            super().__init__(lambda m, x, t: x)
            self.scales = nn.Linear(1, WIDTH)

        def forward(self, video: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
            scale = self.scales(timestep[..., None])
            x, t = self.patches(video), self.words(text)
            return self.block(torch.cat([(1 + scale) * x, t], 1))

    (site,) = sites_of(Modulated(), *inputs(), torch.rand(1, VIDEO))
    assert site.exact.spans == ("120:129", "120:129")


@pytest.mark.parametrize("how", ["put back", "written from a place"])
def test_tokens_without_positions_are_a_guess_at_text(how: str) -> None:
    """One sequence comes in, and all but its first tokens are rotated."""

    def rotated(q: Tensor, cos: Tensor) -> Tensor:
        if how == "put back":
            return torch.cat([q[:, :TEXT], q[:, TEXT:] * cos], 1)
        q[:, TEXT:] = q[:, TEXT:] * cos
        return q

    class Whole(Stack):
        def forward(self, x: Tensor, cos: Tensor) -> Tensor:
            q, k = (rotated(layer(x), cos) for layer in (self.to_q, self.to_k))
            return attend(q, k, self.to_v(x))

    x, cos = torch.randn(1, TEXT + VIDEO, WIDTH), torch.randn(VIDEO, WIDTH)
    (site,) = sites_of(Whole(lambda m, x, t: x), x, cos)
    assert site.exact.spans == ("0:9", "0:9")
    assert (site.exact.guessed, site.exact.origin) == (True, "tokens without positions")


@given(
    text=st.integers(1, 40),
    video=st.integers(41, 90),
    first=st.booleans(),
    start=st.integers(0, 30),
)
def test_given_slices(text: int, video: int, first: bool, start: int) -> None:
    q = torch.zeros(1, 2, text + video, 32)
    site = _site(q.shape[2])
    spans = ((start, start + text),) if first else ((-text, None), (0, 1))
    found = given_tokens(site.call, spans)
    assert found is not None
    tokens = torch.zeros(q.shape[2], dtype=torch.bool)
    for begin, end in spans:
        tokens[begin:end] = True
    assert found.counts == (int(tokens.sum()),) * 2


_SITES: dict[int, AttentionSite] = {}


def _site(tokens: int) -> AttentionSite:
    if tokens not in _SITES:
        q = torch.zeros(1, 2, tokens, 32)
        (_SITES[tokens],) = sites_of(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    return _SITES[tokens]


@pytest.mark.parametrize(
    "spans", [((0, 100),), ((0, 101),), ((90, 120),), ((-101, None),), ((5, 5),)]
)
def test_slices_that_do_not_fit(spans: tuple[tuple[int | None, int | None], ...]) -> None:
    assert given_tokens(_site(100).call, spans) is None


def test_text_cut_at_a_length_that_a_mask_says() -> None:
    """The length is known at run time only; all that is cut is exact."""

    def pack(module: Stack, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        both = torch.cat([text, module.registers], 1)
        return torch.cat([x, both[:, : mask.sum().item()]], 1)

    module, backend = Stack(pack), Rewriting()
    mask = torch.arange(TEXT) < 5
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        out = run_rewritten(module, *inputs(), mask, backend=backend)
        assert exact_keys_seen(module, *inputs(), mask) == [list(range(VIDEO, VIDEO + 5))] * 2
    assert backend.rewritten == 2
    with torch.no_grad():
        torch.testing.assert_close(out, module(*inputs(), mask), atol=1e-5, rtol=1e-4)


def test_exact_tokens_lie_on_the_device_of_each_call() -> None:
    """A model that goes on on another device in the middle of its graph."""

    class Halves(Stack):
        def forward(self, video: Tensor, text: Tensor, *more: Tensor) -> Tensor:
            x = self.pack(self, self.patches(video), self.words(text))
            x = x + attend(self.to_q(x), self.to_k(x), self.to_v(x))
            x = x.to("meta")
            return x + attend(x * 2, x * 3, x)

    module = Halves(lambda module, x, text: torch.cat([text, x], 1))
    (graph,) = graphs_of(module, *inputs())
    sites = find_sites(graph)
    assert [str(site.device) for site in sites] == ["cpu", "meta"]
    calls = rewrite(graph, [(site, ALL_BLOCKS) for site in sites])
    exact = [call.all_input_nodes[0].args[8:10] for call in calls]  # results of the operator
    assert all(node is not None for pair in exact for node in pair)
    assert not set(exact[0]) & set(exact[1])
