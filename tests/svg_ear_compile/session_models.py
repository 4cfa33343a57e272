"""Hand-made models for the session's tests: their graphs call the operator themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import svg_ear_compile.kernels.op  # noqa: F401
from svg_ear_compile.kernels.call import AttentionCall, CallRequest, active_source
from svg_ear_compile.kernels.reference import Result
from svg_ear_compile.session import Session

HEADS, DIM, TOKENS = 2, 32, 160
# More clusters than these few tokens would get, so that warm and cold starts differ.
PLAN = '{"density": 0.3, "q_clusters": 4, "k_clusters": 16}'


class Attention(nn.Module):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.to_q = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.to_k = nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (self.to_q(x), self.to_k(x), x)
        )
        out = torch.ops.svg_ear.attention(
            q, k, v, None, self.to_q.weight,
            plan=PLAN, site=self.site, layer_owner=f"{self.site}.to_q",
        )  # fmt: skip
        return out[0].transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, site: str) -> None:
        super().__init__()
        self.attn1 = Attention(site)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(x)


class Model(nn.Module):
    """Blocks whose sites are named as in the graph of the whole model, or as in a shared one."""

    def __init__(self, whole: bool, blocks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        names = [f"blocks.{i}.attn1" if whole else "attn1" for i in range(blocks)]
        self.blocks = nn.ModuleList(Block(name) for name in names)
        self.requires_grad_(False)
        self.fail: BaseException | None = None

    def forward(self, hidden_states: Tensor, timestep: Any, text: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        if self.fail is not None:
            raise self.fail
        return hidden_states


def shared(blocks: int = 3, seed: int = 0) -> Model:
    """A model whose blocks share one graph, the model itself eager."""
    model = Model(whole=False, blocks=blocks, seed=seed)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


def whole(blocks: int = 3, seed: int = 0) -> Any:
    return torch.compile(Model(True, blocks, seed), backend="aot_eager", fullgraph=True)


BUILD = pytest.mark.parametrize("build", [shared, whole])


def in_place() -> Model:
    model = Model(True)
    model.compile(backend="eager", fullgraph=True)
    return model


def latents(seed: int = 0, tokens: int = TOKENS, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, HEADS * DIM, generator=generator)


def run(model: Callable[..., Tensor], *timesteps: float, seed: int = 0) -> Tensor:
    """A generation without a scheduler: each step's input is the last one's output."""
    x = latents(seed)
    for timestep in timesteps:
        x = model(x, torch.tensor([timestep])) * 0.5
    return x


class Heard:
    """A source that passes everything on and keeps the calls."""

    def __init__(self, calls: list[Any]) -> None:
        self.source, self.seen = active_source(), calls

    def calls(self, request: CallRequest) -> Iterator[AttentionCall]:
        for call in self.source.calls(request):
            self.seen.append(call)
            yield call

    def finished(self, call: AttentionCall, result: Result) -> None:
        self.source.finished(call, result)


def densities(calls: list[Any]) -> list[float]:
    """Densities of the calls heard so far, which are forgotten."""
    found = [call.plan.density for call in calls]
    calls.clear()
    return found


def paths(session: Session, model: int = 0) -> list[str]:
    """Layers of a bound model that have called the operator."""
    return [layer.path for layer in session.report() if layer.model == model]
