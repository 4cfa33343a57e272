"""What is read from a pipeline and from the arguments of its calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from torch import nn

from svg_ear_compile.pipeline_calls import CallWatch, PipelineCall, denoisers, read_call


class Denoiser(nn.Module):
    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return hidden_states


class Encoder(nn.Module):
    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return text


class Pipeline:
    """A call as diffusers' pipelines have it."""

    def __init__(self) -> None:
        self.dit, self.text_encoder = Denoiser(), Encoder()
        self.same_dit: nn.Module | None = None
        self.heard: list[Any] = []

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 30,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | list[torch.Tensor] | None = None,
        num_videos_per_prompt: int | None = 1,
        **others: Any,
    ) -> str:
        self.heard.append(prompt)
        if prompt == "fail":
            raise ValueError("failed")
        return f"video of {prompt}"


@pytest.mark.parametrize(
    ("args", "kwargs", "steps", "videos"),
    [
        (("a",), {}, 30, 1),
        (("a", 8), {}, 8, 1),
        ((["a", "b", "c"],), {"num_inference_steps": 5}, 5, 3),
        ((), {"prompt": ("a", "b"), "timesteps": [900, 500, 100]}, 3, 2),
        ((), {"timesteps": torch.tensor([900.0, 100.0])}, 2, 1),
        ((), {"sigmas": [1.0, 0.5, 0.2, 0.1]}, 4, 1),
        ((), {"strength": 0.5}, 15, 1),
        ((), {"latents": torch.zeros(4, 2, 3)}, 30, 4),
        ((), {"prompt_embeds": torch.zeros(2, 7, 3)}, 30, 2),
        ((), {"prompt_embeds": [torch.zeros(7, 3), torch.zeros(5, 3)]}, 30, 2),
        (("a",), {"num_videos_per_prompt": 2}, 30, 2),
        ((["a", "b"],), {"num_videos_per_prompt": 3}, 30, 6),
        ((["a", "b"],), {"num_videos_per_prompt": None}, 30, 2),
        ((), {"prompt_embeds": torch.zeros(2, 7, 3), "num_images_per_prompt": 2}, 30, 4),
        ((), {"latents": torch.zeros(4, 2, 3), "num_videos_per_prompt": 2}, 30, 4),
        (("a",), {"timesteps": torch.tensor(3.0)}, 30, 1),  # refused by the pipeline
        (("a",), {"sigmas": np.array(0.5)}, 30, 1),
        ((), {"num_inference_steps": None}, None, 1),
        (("a", 8, 9, 10, 11, 12, 13, 14), {"prompt": "twice"}, 30, 1),  # refused by the pipeline
    ],
)
def test_steps_and_videos_are_read_from_a_call(
    args: Any, kwargs: Any, steps: int | None, videos: int
) -> None:
    assert read_call(Pipeline(), args, kwargs) == PipelineCall(steps, videos)


def test_defaults_of_modular_pipelines_stand_in_their_blocks() -> None:
    class Modular:
        blocks = SimpleNamespace(
            inputs=[
                SimpleNamespace(name="num_inference_steps", default=8),
                SimpleNamespace(name="prompt", default=None),
            ]
        )

        def __call__(self, state: Any = None, **kwargs: Any) -> None: ...

    assert read_call(Modular(), (), {"prompt": ["a", "b"]}) == PipelineCall(8, 2)
    assert read_call(Modular(), (), {"num_inference_steps": 4}) == PipelineCall(4, 1)


@pytest.mark.parametrize(
    ("make", "call"), [(tiny.wan, tiny.wan_call), (tiny.ltx, tiny.ltx_call)], ids=["wan", "ltx"]
)
def test_calls_of_diffusers_are_read(make: Any, call: Any) -> None:
    pipe = make()
    assert read_call(pipe, (), call()) == PipelineCall(4, 1)
    assert read_call(pipe, (), {"prompt": "a"}) == PipelineCall(50, 1)


def test_denoising_models_take_a_timestep() -> None:
    pipe = tiny.wan_two_experts()
    assert list(denoisers(pipe, None)) == ["transformer", "transformer_2"]
    plain = Pipeline()
    assert denoisers(plain, None) == {"dit": plain.dit}
    assert denoisers(plain, "text") == {"text_encoder": plain.text_encoder}
    assert denoisers(3, None) == {}
    plain.same_dit = plain.dit
    assert list(denoisers(plain, None)) == ["dit"]


def test_a_model_may_be_a_property() -> None:
    class Wrapper:
        inner = Pipeline()

        @property
        def transformer(self) -> nn.Module:
            return self.inner.dit

    assert denoisers(Wrapper(), None) == {"transformer": Wrapper.inner.dit}


def test_only_the_watched_pipeline_is_watched() -> None:
    asked: list[PipelineCall] = []
    ends: list[str] = []

    @contextmanager
    def around(call: PipelineCall) -> Iterator[None]:
        asked.append(call)
        try:
            yield
        finally:
            ends.append("end")

    pipe, other = Pipeline(), Pipeline()
    watch = CallWatch(pipe, around)
    assert isinstance(pipe, Pipeline)
    assert (type(pipe).__name__, type(pipe).__module__) == ("Pipeline", Pipeline.__module__)
    assert pipe("a", 3) == "video of a"
    assert other("b") == copy.copy(pipe)("b") == copy.deepcopy(pipe)("b") == "video of b"
    with pytest.raises(ValueError, match="failed"):
        pipe("fail", num_inference_steps=7)
    assert asked == [PipelineCall(3, 1), PipelineCall(7, 1)]
    assert ends == ["end", "end"]
    watch.stop()
    assert type(pipe) is Pipeline
    assert pipe("a") == "video of a"
    assert len(asked) == 2


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_watched_pipeline_is_pickled_and_copied_as_a_plain_one(protocol: int) -> None:
    pipe = Pipeline()
    pipe("a")
    plain = pickle.dumps(pipe, protocol)
    watch = CallWatch(pipe, lambda call: pytest.fail("watched"))
    for made in (
        pickle.loads(pickle.dumps(pipe, protocol)), copy.copy(pipe), copy.deepcopy(pipe),
        pickle.loads(plain),
    ):  # fmt: skip
        assert type(made) is Pipeline
        assert made.heard == ["a"]
    assert type(pipe) is not Pipeline
    watch.stop()


def test_a_class_given_meanwhile_is_kept() -> None:
    class Other(Pipeline):
        pass

    pipe = Pipeline()
    watch = CallWatch(pipe, lambda call: pytest.fail("watched"))
    pipe.__class__ = Other
    watch.stop()
    assert type(pipe) is Other


def test_diffusers_saves_a_watched_pipeline_under_its_own_name(tmp_path: Any) -> None:
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    watch = CallWatch(pipe, lambda call: pytest.fail("watched"))
    pipe.save_pretrained(tmp_path)
    watch.stop()
    assert '"_class_name": "WanPipeline"' in (tmp_path / "model_index.json").read_text()
