"""Guidance branches: declared or told by values, in one batch or in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_models import (
    BUILD,
    DIM,
    HEADS,
    TOKENS,
    Attention,
    Block,
    densities,
    latents,
    shared,
    whole,
)
from torch import Tensor, nn

from svg_ear_compile import Session, bind
from svg_ear_compile.guidance import MAX_BRANCHES, Branches, Guidance, Latents, find_latents

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def reused(session: Session) -> list[float | None]:
    return [layer.reused_fraction for layer in session.report()]


@pytest.mark.parametrize("stacked", [False, True])
@BUILD
def test_branches_with_the_same_latents_share_their_blocks(
    build: Callable[[], Any], stacked: bool
) -> None:
    model = build()
    with bind(model) as session:
        for timestep in (900.0, 800.0):
            x = latents(int(timestep))
            if stacked:
                model(torch.cat([x, x]), timestep, torch.zeros(2, 7))
            else:
                for text in (7, 9):
                    model(x, timestep, torch.zeros(1, text))
        assert reused(session) == [0.5] * 3
        assert {layer.density for layer in session.report()} != {None}


@pytest.mark.parametrize("stacked", [False, True])
def test_other_videos_of_a_step_are_clustered_by_themselves(stacked: bool) -> None:
    model = whole()
    with bind(model) as session:
        for timestep in (900.0, 800.0):
            videos = [latents(int(timestep) + video) for video in range(2)]
            for x in [torch.cat(videos)] if stacked else videos:
                model(x, timestep)
        assert reused(session) == [0.0] * 3


def test_a_video_that_no_longer_is_the_same_is_on_its_own() -> None:
    """Two prompts start from one noise: alike at the first step, and then no more."""
    model = whole()
    with bind(model) as session:
        x = latents()
        model(torch.cat([x, x]), 900.0)
        assert reused(session) == [0.5] * 3
        out = model(torch.cat([x, latents(1)]), 800.0)
        assert reused(session) == [1 / 3] * 3
        assert out.isfinite().all()


def test_three_branches_along_the_batch_are_led_by_the_first() -> None:
    model = whole()
    with bind(model) as session:
        model(torch.cat([latents()] * 3), 900.0)
        assert reused(session) == [2 / 3] * 3


@pytest.mark.parametrize("switched", ["off", "on", "interval"])
def test_guidance_that_is_switched_is_the_same_generation(switched: str, calls: list[Any]) -> None:
    model = whole(1)
    batches = {"off": [2, 2, 2, 1, 1], "on": [1, 1, 1, 2, 2], "interval": [2, 2, 1, 2, 1]}[switched]
    with bind(model, dense_steps=2) as session:
        for step, batch in enumerate(batches):
            model(latents(step).repeat(batch, 1, 1), 900.0 - step)
            assert session.step == step
    assert densities(calls) == [1.0, 1.0] + [0.3] * sum(batches[2:])


def test_a_branch_goes_on_warm_where_guidance_is_switched_off(calls: list[Any]) -> None:
    model = whole(1)
    with bind(model):
        for step, batch in enumerate((2, 2, 1, 1)):
            model(latents(step).repeat(batch, 1, 1), 900.0 - step)
    warm = [call.centroids is not None for call in calls]
    assert warm == [False, True, True, True, True, True]
    assert calls[-1].memory is calls[0].memory


def test_videos_in_one_static_buffer_are_no_branches_of_each_other() -> None:
    """Pipelines that capture CUDA graphs write every input into one and the same tensor."""
    model, buffer = whole(), torch.empty_like(latents())
    with bind(model) as session:
        for timestep in (900.0, 800.0):
            for video in range(2):
                buffer.copy_(latents(int(timestep) + video))
                model(buffer, timestep)
        assert reused(session) == [0.0] * 3


def test_branches_in_one_static_buffer_are_branches() -> None:
    model, buffer = whole(), torch.empty_like(latents())
    with bind(model) as session:
        for timestep in (900.0, 800.0):
            for _branch in range(2):
                buffer.copy_(latents(int(timestep)))
                model(buffer, timestep)
        assert reused(session) == [0.5] * 3


def test_every_video_leads_its_own_branches() -> None:
    model = whole(1)
    with bind(model) as session:
        first, second = latents(1), latents(2)
        for x in (first, second, first, second):
            model(x, 900.0)
        (layer,) = session.report()
        assert (layer.cold, layer.recomputed, layer.reused, layer.branches) == (2, 0, 2, 4)


def test_a_layer_that_the_reference_branch_left_out_is_not_reused() -> None:
    """Caches of features skip layers in some forwards."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = Attention("attn1")

        def forward(self, x: Tensor, timestep: float, skip: bool) -> Tensor:
            return x if skip else self.attn1(x)

    model = Skipping().requires_grad_(False)
    with bind(model) as session:
        for step, skip in enumerate((False, True)):
            for reference in (True, False):
                model(latents(step), 900.0 - step, skip and reference)
        (layer,) = session.report()
        assert (layer.cold, layer.reused) == (2, 1)


class ContextFirst(nn.Module):
    """A model whose context comes before its video, and is the same for all videos."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention("attn1")

    def forward(self, context: Tensor, noisy: Tensor, timestep: float) -> Tensor:
        return self.attn1(noisy) + context.mean()


@pytest.mark.parametrize("declared", [None, "noisy"])
@pytest.mark.parametrize("batched", [False, True])
def test_latents_need_not_be_the_first_input(batched: bool, declared: str | None) -> None:
    model, context = ContextFirst().requires_grad_(False), torch.ones(2, 3, 4)
    with bind(model, latents=declared) as session:
        videos = [latents(0), latents(1)]
        for noisy in [torch.cat(videos)] if batched else videos:
            model(context, noisy, 900.0)
        assert reused(session) == [0.0]
        # Other contexts, as branches have, and the same video.
        session.reset()
        if batched:
            model(torch.randn(2, 3, 4), torch.cat([videos[0]] * 2), 900.0)
        else:
            for _branch in range(2):
                model(torch.randn(2, 3, 4), videos[0], 900.0)
        assert reused(session) == [0.5]


class KnownName(nn.Module):
    """A model whose text comes first, with the argument names of Flux's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention("attn1")

    def forward(self, txt: Tensor, img: Tensor, timesteps: Tensor) -> Tensor:
        return self.attn1(img) + txt.mean()


class UnknownName(KnownName):
    """A model whose video comes first, under a name of its own."""

    def forward(self, mask: Tensor, noised: Tensor, txt: Tensor, timesteps: Tensor) -> Tensor:
        return self.attn1(noised) + txt.mean()


@pytest.mark.parametrize("build", [KnownName, UnknownName])
def test_text_larger_than_the_video_is_not_taken_for_the_latents(
    build: type[KnownName], caplog: pytest.LogCaptureFixture
) -> None:
    model, text = build().requires_grad_(False), torch.zeros(1, 512, 99)

    def step(timestep: float, video: Tensor, text: Tensor) -> None:
        given = [text, video] if build is KnownName else [torch.ones(len(video), 9), video, text]
        model(*given, torch.full((len(video),), timestep))

    with bind(model) as session:
        step(900.0, latents(batch=2), text.expand(2, -1, -1))
        assert reused(session) == [0.0]
        session.reset()
        for timestep in (900.0, 800.0):
            step(timestep, latents(), text)
            step(timestep, latents(), text[:, :77])
        assert (session.step, reused(session)) == (1, [0.5])
    said = [r.getMessage() for r in caplog.records if "latents of this" in r.getMessage()]
    assert len(said) == (build is UnknownName)
    assert all("'noised', the first of its arguments ('noised', 'txt')" in line for line in said)


def test_latents_are_found_by_name_then_by_dimensions_then_by_order() -> None:
    small, large, ids = torch.zeros(1, 2), torch.zeros(1, 9), torch.zeros(99, dtype=torch.int64)
    video, text = torch.zeros(1, 2, 3, 2, 2), torch.zeros(1, 9, 64)
    assert find_latents({"a": large, "b": video, "c": text}, None).tensors == (video,)
    assert find_latents({"a": large, "b": [video, video], "c": text}, None).batch == 2
    assert find_latents({"ids": ids, "a": small, "b": large}, None).tensors == (small,)
    assert find_latents({"a": large, "x": small}, None).tensors == (small,)
    assert find_latents({"a": large, "x": small}, "a").tensors == (large,)
    assert find_latents({"x": ids, "b": small}, None).tensors == (small,)
    assert find_latents({"x": [small, small]}, None).batch == 2
    assert find_latents({"ids": ids}, None).tensors == ()
    with pytest.raises(ValueError, match="called without the latents 'b'"):
        find_latents({"a": large}, "b")


def test_latents_that_cannot_be_meant_are_refused() -> None:
    model = ContextFirst()
    with pytest.raises(ValueError, match=r"forward of ContextFirst has no 'x' among"):
        bind(model, latents="x")
    with (
        bind(model, latents="noisy"),
        pytest.raises(ValueError, match="called without the latents 'noisy'"),
    ):
        model(context=torch.ones(1), timestep=900.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "stacked"}, "guidance must be one of"),
        ({"branches": 2}, "branches belongs to a declared guidance layout"),
        ({"layout": "batched", "branches": 1}, r"branches must be in \[2, 8\], got 1"),
        ({"layout": "batched", "branches": 9}, r"branches must be in \[2, 8\], got 9"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**arguments)


def test_a_declared_batch_is_not_compared() -> None:
    """Branches may get other latents: image conditions that one of them goes without, say."""
    model = whole()
    with bind(model, guidance="batched", branches=3) as session:
        for timestep in (900.0, 800.0):
            model(torch.cat([latents(video) for video in range(3)]), timestep)
        assert reused(session) == [2 / 3] * 3
        model(latents(0), 700.0)  # guidance is off: there is one branch
        assert session.report()[0].cold == 1
        model(latents(0), 700.0)  # and forwards in turns are no branches
        assert session.report()[0].cold == 2


@pytest.mark.parametrize("dense_steps", [0, 1])
def test_a_declared_batch_without_guidance_has_no_followers(
    dense_steps: int, calls: list[Any]
) -> None:
    """The batch with guidance is known from dense steps, too."""
    model, videos = whole(1), latents(batch=2)
    with bind(model, guidance="batched", dense_steps=dense_steps):
        model(torch.cat([videos, videos]), 900.0)
        calls.clear()
        model(videos, 800.0)
    assert [call.follows for call in calls] == [False]


@pytest.mark.parametrize("layout", [None, "batched"])
def test_videos_that_a_call_announces_are_no_branches(layout: Any) -> None:
    """Without guidance from the first step on, only the call tells videos from branches."""
    branches = Branches(Guidance(layout), videos=2)
    same = latents().repeat(4, 1, 1)
    assert branches.place(0, 0, Latents((same[:2],)), dense=False) == (1, None)
    assert branches.place(0, 1, Latents((same,)), dense=False)[0] == 2
    assert branches.place(0, 2, Latents((same[:0],)), dense=False)[0] == 1


class Listed(nn.Module):
    """Takes a list with one video each, as Wan's own code does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block("block.attn1")

    def forward(self, x: list[Tensor], t: float) -> list[Tensor]:
        return list(self.block(torch.stack(x)).unbind(0))


@pytest.mark.parametrize("layout", [None, "batched"])
def test_a_list_of_one_video_goes_on_where_guidance_is_switched_off(
    layout: Any, calls: list[Any]
) -> None:
    model = Listed().requires_grad_(False)
    with bind(model, guidance=layout, dense_steps=2) as session:
        for step, videos in enumerate((2, 2, 2, 1, 1)):
            model([latents(step)[0]] * videos, 900.0 - step)
            assert session.step == step
    assert densities(calls) == [1.0, 1.0] + [0.3] * 4


def test_the_entries_of_a_list_are_its_batch() -> None:
    one = torch.zeros(16, 3, 4)  # 16 channels
    found = find_latents({"x": [one]}, None)
    assert (found.batch, found.kind) == (1, find_latents({"x": (one, one)}, None).kind)
    assert found.copy().batch == 1
    assert [part.tensors for part in find_latents({"x": [one]}, "x").parts(1)] == [(one,)]
    assert find_latents({"x": one}, None).batch == 16


def test_declared_turns_are_not_compared() -> None:
    model = whole(1)
    with bind(model, guidance="sequential") as session:
        for timestep in (900.0, 800.0):
            for place in range(4):  # two videos of two branches
                model(latents(place), timestep)
        (layer,) = session.report()
        assert (layer.cold, layer.reused) == (2, 4)
        model(torch.cat([latents(0)] * 2), 700.0)  # no branches along the batch
        assert session.report()[0].branches == 4


def test_a_constant_timestep_keeps_few_latents() -> None:
    model = shared(1)
    with bind(model) as session:
        for video in range(MAX_BRANCHES + 3):
            model(latents(video), 500)
        held = {row.what: row.nbytes for row in session.held()}
        assert held["latents"] == MAX_BRANCHES * TOKENS * HEADS * DIM * 4
