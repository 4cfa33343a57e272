"""What a pipeline holds, and what each of its calls asks for.

A call of one pipeline object is watched by giving that object a class of its own: Python looks up
`__call__` on the class, and other pipelines of the same class must not be watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from svg_ear_compile.layers import TIMESTEP_NAMES, inner_of

_USUAL_NAMES = ("transformer", "transformer_2")
_VIDEOS_PER_PROMPT = ("num_videos_per_prompt", "num_images_per_prompt")
_GIVEN_STEPS = ("timesteps", "sigmas")  # a list of steps takes precedence over their number


@dataclass(frozen=True)
class PipelineCall:
    """What one call of a pipeline asks for.

    Attributes:
        steps: number of denoising steps, None if the call does not tell.
        videos: number of videos that differ from each other, 1 if the call does not tell.
    """

    steps: int | None = None
    videos: int = 1


def denoisers(pipeline: object, timestep: str | None) -> dict[str, nn.Module]:
    """The denoising models of a pipeline by name: the modules that are called with a timestep.

    Args:
        pipeline: diffusers' or any other object that holds its models as attributes.
        timestep: name of the timestep argument, None for one of `TIMESTEP_NAMES`.
    """
    names = set(TIMESTEP_NAMES if timestep is None else (timestep,))
    found: dict[str, nn.Module] = {}
    for name, module in models_of(pipeline).items():
        takes = inspect.signature(inner_of(module).forward).parameters
        if not names.isdisjoint(takes) and module not in found.values():  # held under two names
            found[name] = module
    return found


def models_of(pipeline: object) -> dict[str, nn.Module]:
    """All models that a pipeline holds by name."""
    return {n: each for n, each in held_by(pipeline).items() if isinstance(each, nn.Module)}


def held_by(pipeline: object) -> dict[str, Any]:
    """Everything that a pipeline holds by name: models, a scheduler, its attributes."""
    held = getattr(pipeline, "components", None)  # diffusers
    if not isinstance(held, Mapping):
        held = dict(getattr(pipeline, "__dict__", {}))
        # May be properties, or attributes of the class.
        held |= {name: getattr(pipeline, name, None) for name in _USUAL_NAMES}
    return dict(held)


def timesteps_rise(pipeline: object) -> bool:
    """Whether the scheduler of a running call has timesteps that rise from noise to video."""
    timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
    if not isinstance(timesteps, Tensor) or timesteps.dim() != 1 or len(timesteps) < 2:
        return False
    return bool(timesteps[0] < timesteps[-1])


def read_call(pipeline: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PipelineCall:
    """What a call of `pipeline` with these arguments asks for."""
    given = {**_defaults(pipeline), **_named(pipeline, args, kwargs)}
    return PipelineCall(_steps(given), _videos(given))


def _named(pipeline: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name; of a call that the pipeline will refuse, those given by name."""
    signature = inspect.signature(type(pipeline).__call__)
    try:
        named = dict(signature.bind(pipeline, *args, **kwargs).arguments)
    except TypeError:
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def _defaults(pipeline: Any) -> dict[str, Any]:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    found = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    # Modular pipelines of diffusers name their inputs in their blocks.
    inputs = getattr(getattr(pipeline, "blocks", None), "inputs", ())
    return found | {each.name: each.default for each in inputs if each.default is not None}


def _steps(given: Mapping[str, Any]) -> int | None:
    steps = given.get("num_inference_steps")
    for name in _GIVEN_STEPS:
        if (length := _length(given.get(name))) is not None:
            steps = length
    if isinstance(steps, bool) or not isinstance(steps, int):
        return None
    strength = given.get("strength")  # video to video skips the first steps
    if isinstance(strength, (int, float)) and 0 < strength < 1:
        return min(int(steps * strength), steps)
    return steps


def _length(value: object) -> int | None:
    """The length of a list, an array or a tensor; None of what has none."""
    if not isinstance(value, Sized):
        return None
    try:
        return len(value)
    except TypeError:  # arrays and tensors without dimensions have the method, too
        return None


def _videos(given: Mapping[str, Any]) -> int:
    latents, embeds, prompt = (given.get(n) for n in ("latents", "prompt_embeds", "prompt"))
    if isinstance(latents, Tensor) and latents.dim():  # of all videos
        return max(1, latents.shape[0])
    prompts = 1
    if isinstance(embeds, (Tensor, list, tuple)):
        prompts = _length(embeds) or 1
    elif isinstance(prompt, (list, tuple)):
        prompts = len(prompt) or 1
    asked = [given.get(name) for name in _VIDEOS_PER_PROMPT]
    return prompts * max([1, *(number for number in asked if isinstance(number, int))])


class CallWatch:
    """Runs `around` around every call of one pipeline object.

    Args:
        pipeline: an object that is called; its class may have any name.
        around: makes a context manager from what the call asks for.

    Raises:
        TypeError: the pipeline is no object whose class can be changed.
    """

    def __init__(
        self, pipeline: Any, around: Callable[[PipelineCall], AbstractContextManager[object]]
    ) -> None:
        original: Any = type(pipeline)
        call = original.__call__

        @wraps(call)
        def watched(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not pipeline:  # an object of that class, made by the user
                return call(this, *args, **kwargs)
            with around(read_call(this, args, kwargs)):
                return call(this, *args, **kwargs)

        def reduced(this: Any, protocol: int) -> Any:
            """What pickle and copy make of a pipeline: one of the class that it had before."""
            make, given, *state = original.__reduce_ex__(this, protocol)
            # As one callable: pickle refuses a `make` for objects of another class than `this`.
            plain = partial(make, *(original if x is watched_class else x for x in given))
            return plain, (), *state

        names = ("__module__", "__qualname__", "__doc__")
        body = {name: getattr(original, name) for name in names}
        body |= {"__call__": watched, "__reduce_ex__": reduced, "__slots__": ()}
        self._pipeline = pipeline
        self._original = original
        try:
            watched_class = type(original)(original.__name__, (original,), body)
            pipeline.__class__ = watched_class
        except TypeError as error:
            raise TypeError(
                f"the calls of this {original.__name__} cannot be watched ({error}): give "
                "accelerate its model instead"
            ) from error
        self._watched_class = watched_class

    def stop(self) -> None:
        """Give the pipeline its class back, unless it was given another one meanwhile."""
        if type(self._pipeline) is self._watched_class:
            self._pipeline.__class__ = self._original
