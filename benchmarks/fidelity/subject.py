"""One model under test: its clips under any attention, and attention calls taken from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.fidelity.grid import Cell
from benchmarks.fidelity.rules import Remembered, attention
from benchmarks.fidelity.scores import relative_error
from benchmarks.video_dit.attention import attention_answered_by
from benchmarks.video_dit.sample import denoise, noise_of
from benchmarks.video_dit.zoo import Shape, TrainedModel
from svg_ear_compile.kernels.plan import AttentionPlan

_Dense = Callable[..., Tensor]
_CAPTURED_STEPS = (0.25, 0.5, 0.75)
_CAPTURED_LAYERS = (0.0, 0.35, 0.7, 1.0)


@dataclass
class Subject:
    """A model that generates the clips of all seeds, with guidance, in one batch.

    A batch element never looks at another, and clusters are each head's own, so that this is what
    single clips would be.

    Attributes:
        seeds: of the clips.
        steps: denoising steps.
        guidance: classifier-free guidance; each step runs both branches in one forward, at 1 the
            branch with conditions alone.
        shape: (frames, height, width).
        calls: q, k, v (1, H, N, D) of some layers and steps of the first dense clip.
    """

    trained: TrainedModel
    seeds: Sequence[int]
    steps: int
    guidance: float
    shape: Shape
    device: torch.device
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = self.trained.load(device=self.device, dtype=dtype)
        self.layers = len(self.model.blocks)
        self.text = self.model.text_tokens
        self.grid = self.model.grid(self.shape)
        self.tokens = math.prod(self.grid)
        prompts = [self.trained.prompt(seed) for seed in self.seeds]
        label = torch.tensor([p[0] for p in prompts], device=self.device)
        camera = torch.tensor([p[1] for p in prompts], device=self.device)
        null = torch.full_like(label, self.model.config.null_label)
        self.branches = 1 if self.guidance == 1 else 2
        branches = [self.model.conditions(n, camera) for n in (label, null)[: self.branches]]
        self._conditions = tuple(torch.cat(parts) for parts in zip(*branches, strict=True))
        self.dense_clips = self._dense_clips()
        self._dense_calls = [
            torch.nn.functional.scaled_dot_product_attention(*c) for c in self.calls
        ]

    def generate(
        self, answer: Callable[[_Dense, Tensor, Tensor, Tensor, int, int], Tensor]
    ) -> Tensor:
        """Clips (S, T, H, W, 3) float32 on the CPU, attention answered by ``answer``.

        ``answer(dense, q, k, v, step, layer)`` gets all clips with, then with guidance all
        without their conditions.
        """
        count = 0

        def counted(dense: _Dense, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal count
            step, layer = divmod(count, self.layers)
            count += 1
            return answer(dense, q, k, v, step, layer)

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            if self.branches == 1:
                return self.model(x, timestep, *self._conditions)
            both = self.model(x.repeat(2, 1, 1, 1, 1), timestep.repeat(2), *self._conditions)
            found, without = both.chunk(2)
            return without + self.guidance * (found - without)

        with attention_answered_by(counted):
            clips = denoise(velocity, noise_of(self.seeds, self.shape, self.device), self.steps)
        return clips.float().cpu()

    def other_backend(self) -> Tensor:
        """The dense clips by another of PyTorch's attention backends: how far noise alone goes."""
        backend = SDPBackend.EFFICIENT_ATTENTION if self.device.type == "cuda" else SDPBackend.MATH

        def answer(dense: _Dense, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
            with sdpa_kernel(backend):
                return dense(q, k, v)

        return self.generate(answer)

    def sparse_clips(self, cell: Cell) -> tuple[Tensor, Remembered]:
        """Clips under a rule, and what is remembered at their end."""
        dense_steps = round(cell.warm_up * self.steps)
        plan = cell.plan(self.tokens)
        plans = [None] * dense_steps + [plan] * (self.steps - dense_steps)
        return self.clips_by_step(cell.rule, plans)

    def clips_by_step(
        self, rule: str, plans: Sequence[AttentionPlan | None]
    ) -> tuple[Tensor, Remembered]:
        """Clips under a plan for each denoising step, None for dense attention."""
        remembered = Remembered(branches=self.branches, batch=self.branches * len(self.seeds))

        def answer(dense: _Dense, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
            plan = plans[step]
            if plan is None:
                return dense(q, k, v)
            return attention(
                q, k, v, rule, plan,
                text=self.text, grid=self.grid, site=str(layer), remembered=remembered,
            )  # fmt: skip

        clips = self.generate(answer)
        return clips, remembered

    def attention_error(self, cell: Cell) -> float:
        """Mean relative L2 error of the output over the captured calls, each cold."""
        plan = cell.plan(self.tokens)
        errors = [
            relative_error(
                attention(*call, cell.rule, plan, text=self.text, grid=self.grid), wanted
            )
            for call, wanted in zip(self.calls, self._dense_calls, strict=True)
        ]
        return sum(errors) / len(errors)

    def _dense_clips(self) -> Tensor:
        wanted = {
            (int(s * self.steps), round(x * (self.layers - 1)))
            for s in _CAPTURED_STEPS
            for x in _CAPTURED_LAYERS
        }

        def answer(dense: _Dense, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
            if (step, layer) in wanted:
                self.calls.append((q[:1].clone(), k[:1].clone(), v[:1].clone()))
            return dense(q, k, v)

        return self.generate(answer)
