"""Calls over several query chunks in a session: memories of their own, warm from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chunked_models import CHUNK, HEADS, video
from torch import Tensor, nn

from benchmarks.attention.data import LATENT
from svg_ear_compile import bind

CHUNKS, STEPS = 4, (900.0, 700.0, 500.0)
TOKENS = CHUNKS * CHUNK - 31  # the last chunk is a part of one

pytestmark = pytest.mark.usefixtures("without_inductor")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(LATENT, 3 * LATENT)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        q, k, v = qkv.unbind(2)
        out = F.scaled_dot_product_attention(6.0 * q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


class DiffusionForcing(nn.Module):
    """Two layers of one graph; every token sees its own chunk and earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states
        number = torch.arange(x.shape[1]) // CHUNK
        mask = number[:, None] >= number[None]
        for layer in self.layers:
            x = layer(x, mask)
        return x


def steps(model: Any, seed: int = 0) -> list[Tensor]:
    clean = video(CHUNKS, seed)[:, :TOKENS]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return [model(clean + t / 1000 * noise, torch.tensor([t])) for t in STEPS]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return sum(((a - b).norm() / b.norm()).item() for a, b in pairs) / len(found)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="svg_ear", options={"min_tokens": 1, **options})


def test_chunks_have_memories_of_their_own() -> None:
    model = DiffusionForcing()
    sparse, wanted = compiled(model, density=0.3, max_drift=1.0), steps(model)
    anew = error(steps(sparse), wanted)
    with bind(sparse) as session:
        out = steps(sparse)
        for layer in session.report():
            # The first chunk is cold, and gives its clusters to those after it.
            assert (layer.cold, layer.kept) == (1, CHUNKS - 1)
            assert (layer.recomputed, layer.reused) == (CHUNKS, CHUNKS)
        assert [layer.index for layer in session.report()] == [0, 1]
        assert session.chunk == 0
        assert 0.005 < error(out, wanted) < 1.1 * anew
        for mine, same in zip(steps(sparse), out, strict=True):
            assert torch.equal(mine, same)


@pytest.mark.parametrize("dense", ["density", "steps", "layers"])
def test_what_is_dense_is_exact(dense: str) -> None:
    model = DiffusionForcing()
    sparse, wanted = compiled(model, density=1.0 if dense == "density" else 0.3), steps(model)
    schedule: dict[str, Any] = {"steps": {"dense_steps": 2}, "layers": {"dense_layers": 2}}
    with bind(sparse, **schedule.get(dense, {})):
        out = steps(sparse)
    exact = 2 if dense == "steps" else len(STEPS)
    torch.testing.assert_close(out[:exact], wanted[:exact], atol=1e-5, rtol=1e-4)
    assert (error(out, wanted) > 1e-3) == (dense == "steps")


def test_guidance_branches_along_the_batch_share_the_clusters_of_a_chunk() -> None:
    model = DiffusionForcing()
    sparse = compiled(model, density=0.3)

    def doubled(x: Tensor, timestep: Tensor) -> Any:
        return sparse(x.repeat(2, 1, 1), timestep)

    with bind(sparse) as session:
        for out in steps(doubled):
            assert torch.equal(*out)
        for layer in session.report():
            assert layer.branches == 2
            assert layer.reused >= CHUNKS * len(STEPS)


def test_named_tokens_are_exact_in_every_chunk_that_sees_them() -> None:
    model = DiffusionForcing()
    sparse, wanted = compiled(model, density=0.02), steps(model)
    errors = []
    for named in (slice(0, 1), slice(0, TOKENS - 1)):
        with bind(sparse, exact_tokens=lambda inputs, n=named: n):
            errors.append(error(steps(sparse), wanted))
    assert errors[1] < 1e-4 < errors[0]
