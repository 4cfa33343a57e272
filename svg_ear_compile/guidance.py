"""Guidance branches: which forwards, or parts of a batch, belong to the same video.

Guidance branches of one video have equal latents. A layout that is not declared is detected by
comparing the values of latents. The latents of reference branches are copied for it, because a
pipeline may write the latents of every step into one static buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from svg_ear_compile.kernels.checked import checked

Layout = Literal["batched", "sequential"]

LATENT_NAMES = (
    "hidden_states", "latents", "latent_model_input", "noisy_latents", "sample", "x",
    "noisy_image_or_video", "noisy_model_input", "noisy_input", "noisy", "x_t", "z_t", "z",
    "x_B_C_T_H_W", "latent", "img", "video",
)  # fmt: skip
"""Names under which the arguments of a model are searched for its latents, in this order."""

MAX_BRANCHES = 8
"""Forwards at one timestep whose clusters are kept: guidance branches and a few other videos. A
model that is called at one timestep over and over (a benchmark loop) must not fill the device."""

_DETECTED_COUNTS = (2, 3)  # branches along a batch


@dataclass(frozen=True)
class Latents:
    """The latents of a forward.

    Attributes:
        tensors: one tensor with a batch, or, if `listed`, one tensor for each video.
        listed: the model got a list, which may have one entry.
    """

    tensors: tuple[Tensor, ...] = ()
    listed: bool = False

    @property
    def batch(self) -> int:
        """Number of videos, each guidance branch counted."""
        if self.listed:
            return len(self.tensors)
        return self.tensors[0].shape[0] if self.tensors and self.tensors[0].dim() else 1

    @property
    def kind(self) -> tuple[object, ...]:
        """Shape of one video and device, which do not change within a generation."""
        if not self.tensors:
            return ()
        first = self.tensors[0]
        return (first.shape if self.listed else first.shape[1:], first.device)

    def parts(self, count: int) -> list[Latents]:
        """The batch in `count` equal parts."""
        size = self.batch // count
        if self.listed:
            return [Latents(self.tensors[i * size :][:size], True) for i in range(count)]
        return [Latents((part,)) for part in self.tensors[0].split(size)]

    def equal(self, other: Latents) -> bool:
        """Whether all values are equal; waits for the device."""
        return len(self.tensors) == len(other.tensors) > 0 and all(
            a.device == b.device and torch.equal(a, b)
            for a, b in zip(self.tensors, other.tensors, strict=True)
        )

    def copy(self) -> Latents:
        """The same values, whatever becomes of the tensors."""
        return Latents(tuple(tensor.detach().clone() for tensor in self.tensors), self.listed)

    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


def find_latents(given: Mapping[str, Any], name: str | None) -> Latents:
    """The latents among the arguments of a forward, without its timestep.

    Args:
        given: argument names to values.
        name: the declared one. Otherwise the first of `latents_arguments`.

    Raises:
        ValueError: the declared argument is missing or holds no tensor.
    """
    if name is not None:
        found = _latents(given.get(name))
        if not found.tensors:
            raise ValueError(f"the model was called without the latents {name!r}")
        return found
    return next((_latents(given[taken]) for taken in latents_arguments(given)), Latents())


def latents_arguments(given: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that may hold the latents, the likeliest first.

    One name if `LATENT_NAMES` has it. Otherwise all arguments with floating-point tensors of three
    dimensions or more (or else of the most) in the order of the signature, in which latents come
    first. Sizes say nothing: text may be larger than a video.
    """
    floats = {name: tensors for name, value in given.items() if (tensors := _floats(value))}
    if known := next((name for name in LATENT_NAMES if name in floats), None):
        return [known]
    dims = {name: min(3, max(t.dim() for t in tensors)) for name, tensors in floats.items()}
    return [name for name in dims if dims[name] == max(dims.values())]


def _latents(value: object) -> Latents:
    return Latents(_floats(value), listed=not isinstance(value, Tensor))


def _floats(value: object) -> tuple[Tensor, ...]:
    return tuple(
        leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


@dataclass(frozen=True)
class Guidance:
    """Declared guidance layout of a model.

    Attributes:
        layout: ``"batched"`` (along the batch, one branch of all videos after the other),
            ``"sequential"`` (forwards that follow each other), or None to detect both by values.
        branches: number of branches of a declared layout, None for 2.

    Raises:
        ValueError: the layout is unknown, or the branches are fewer than 2, more than
            `MAX_BRANCHES`, or given without a layout.
    """

    layout: Layout | None = None
    branches: int | None = None

    def __post_init__(self) -> None:
        checked("guidance", self.layout, Layout | None)
        if checked("branches", self.branches, int | None) is None:
            return
        if self.layout is None:
            raise ValueError("branches belongs to a declared guidance layout: give guidance=, too")
        if not 2 <= self.branches <= MAX_BRANCHES:  # type: ignore[operator]
            raise ValueError(f"branches must be in [2, {MAX_BRANCHES}], got {self.branches!r}")

    @property
    def count(self) -> int:
        """Number of branches of a declared layout."""
        return self.branches or 2


@dataclass
class Branches:
    """The guidance branches of one generation.

    Attributes:
        guidance: the declared layout.
        videos: least number of different videos in a batch.
        largest: largest batch of each model; a smaller batch has one branch of each video.
        references: copied latents of reference branches at this timestep, by model and forward.
        stream: CUDA stream that copied the latents.
    """

    guidance: Guidance
    videos: int = 1
    largest: dict[int, int] = field(default_factory=dict)
    references: dict[tuple[int, int], Latents] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None

    def place(
        self, model: int, forward: int, latents: Latents, dense: bool
    ) -> tuple[int, int | None]:
        """Number of branches along the batch of a forward, and its reference branch, if any.

        Waits for the device to detect an undeclared layout. Dense forwards reuse nothing: their
        latents need no comparison.
        """
        self.largest[model] = max(latents.batch, self.largest.get(model, 1))
        if dense:
            return 1, None
        return self._in_batch(model, latents), self._reference_of(model, forward, latents)

    def _in_batch(self, model: int, latents: Latents) -> int:
        batch, layout = latents.batch, self.guidance.layout
        if layout == "sequential" or (layout == "batched" and batch < self.largest[model]):
            return 1
        for count in (self.guidance.count,) if layout == "batched" else _DETECTED_COUNTS:
            if batch and batch % (count * self.videos) == 0:
                first, *others = latents.parts(count)
                if layout == "batched" or all(first.equal(other) for other in others):
                    return count
        return 1

    def _reference_of(self, model: int, forward: int, latents: Latents) -> int | None:
        """Index of the forward at this timestep that is the reference branch of this forward.

        None if this forward is a reference branch.
        """
        if self.guidance.layout == "batched":
            return None
        if self.guidance.layout == "sequential":
            branch = forward % self.guidance.count
            return forward - branch if branch else None
        self._hand_over(latents)
        for (other, reference), kept in self.references.items():
            if other == model and kept.equal(latents):
                return reference
        if forward < MAX_BRANCHES:
            self.references[model, forward] = latents.copy()
        return None

    def next_step(self) -> None:
        """Drop the latents of the step before."""
        self.references.clear()

    def _hand_over(self, latents: Latents) -> None:
        """Make the current stream wait for the stream that copied the latents."""
        devices = {t.device for t in latents.tensors if t.is_cuda}
        for device in devices:
            current = torch.cuda.current_stream(device)
            if self.stream is not None and self.stream != current:
                current.wait_stream(self.stream)
                for tensor in (t for kept in self.references.values() for t in kept.tensors):
                    tensor.record_stream(current)
            self.stream = current
