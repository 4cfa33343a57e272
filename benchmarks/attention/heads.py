"""`python -m benchmarks.attention.heads [--out DIR]`: errors of sparse attention on known heads.

A mean over the heads of a model hides its worst head. Here every type of head that video
transformers are known to have gets inputs of its own, made so that dense attention has a known
answer: one token, near neighbours in space, one place at all times, everything alike, a few sinks,
one token and everything at once. Heads of places have the same query and key everywhere, rotated by
RoPE, plus a little of what is seen there. Prints the error of each type and names the worst.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.data import LATENT, grid_of, latent_video, rope, video_like
from benchmarks.attention.gate import relative_error
from benchmarks.attention.inputs import plan_of
from benchmarks.provenance import provenance, where
from svg_ear_compile.kernels.registry import sparse_attention

DENSITIES = (0.1, 0.2)
SINKS = 4
SINK_MASS = 0.8
"""Tokens that a head of sinks looks at, and their part of the mass."""

_SHARP, _SOFT = 80.0, 6.0  # weights of an axis: the next token has e^-11 or e^-1 of the mass
_SEEN = 0.15  # part of what is seen in their queries and keys
_FAINT = 0.3  # size of queries and keys of heads that look at everything

Head = tuple[Tensor, Tensor, Tensor]
"""q, k, v (N, D)."""


@dataclass(frozen=True)
class Scene:
    """One video that heads look at.

    Attributes:
        code: (N, LATENT) what is seen at every token.
        at: (N, 3) its frame, row and column.
        dim: head dim.
        generator: of everything random.
    """

    code: Tensor
    at: Tensor
    dim: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, device=self.code.device)

    def seen(self) -> Tensor:
        """(N, D): a projection of the code, each token of norm 1 in the mean square."""
        x = self.code @ self.normal(LATENT, self.dim)
        return x * x.square().mean(-1, keepdim=True).rsqrt()

    def values(self) -> Tensor:
        """(N, D) values, another projection of the code."""
        return self.code @ self.normal(LATENT, self.dim) / math.sqrt(LATENT)

    def place(self, weights: tuple[float, float, float], frames_back: int = 0) -> Tensor:
        """(N, D): one vector, rotated to the place of every token.

        The logit of two tokens is ``sum_axes weight * mean_bands cos(frequency * distance)``.

        Args:
            weights: of time, rows and columns.
            frames_back: how many frames before its own a token's place lies.
        """
        half = self.dim // 2
        of_pairs = torch.zeros(half)
        starts = (0, half - 2 * (half // 3), half - half // 3)
        for start, weight in zip(starts, weights, strict=True):
            bands = half // 3 // 4 + 1  # those that turn fastest, down to a tenth for each token
            of_pairs[start : start + bands] = math.sqrt(weight / bands)
        vector = torch.stack([of_pairs, torch.zeros(half)], -1).flatten().to(self.at)
        at = self.at - torch.tensor([frames_back, 0, 0], device=self.at.device)
        return self.dim**0.25 * rope(vector.expand(len(at), -1), at)

    def of_places(self, weights: tuple[float, float, float]) -> Head:
        """A head that looks at near places, see `place`."""
        x = self.place(weights)
        return x + _SEEN * self.seen(), x + _SEEN * self.seen(), self.values()


def own_token(scene: Scene) -> Head:
    """Every token looks at itself."""
    return scene.of_places((_SHARP, _SHARP, _SHARP))


def same_place_before(scene: Scene) -> Head:
    """Every token looks at its place in the frame before, those of the first frame at their own."""
    weights = (_SHARP, _SHARP, _SHARP)
    q, k = scene.place(weights, frames_back=1), scene.place(weights)
    return q + _SEEN * scene.seen(), k + _SEEN * scene.seen(), scene.values()


def near_in_space(scene: Scene) -> Head:
    """Every token looks at its neighbours, some two tokens around, in its frame."""
    return scene.of_places((_SHARP, _SOFT, _SOFT))


def near_in_time(scene: Scene) -> Head:
    """Every token looks at its own place, in all frames alike."""
    return scene.of_places((0.0, _SHARP, _SHARP))


def everything(scene: Scene) -> Head:
    """Every token looks at all others nearly alike."""
    return _FAINT * scene.seen(), _FAINT * scene.seen(), scene.values()


def sinks(scene: Scene) -> Head:
    """Every token gives `SINK_MASS` to the same `SINKS` tokens, the rest to all alike."""
    q, k, v = everything(scene)
    tokens = len(q)
    logit = math.log(tokens / SINKS * SINK_MASS / (1 - SINK_MASS))
    toward = torch.zeros(scene.dim, device=q.device)
    toward[0] = math.sqrt(logit) * scene.dim**0.25
    k[sink_places(tokens, q.device)] += toward
    return q + toward, k, v


def own_and_everything(scene: Scene) -> Head:
    """Every token gives half of its mass to itself, known by a number of its own, half to all."""
    tokens, dim = scene.code.shape[0], scene.dim
    x = F.normalize(scene.normal(tokens, dim), dim=-1) * dim**0.25
    # The logits of other tokens are normal: their mass is N exp(variance / 2).
    logit = math.log(tokens)
    for _ in range(20):
        logit = math.log(tokens) + logit**2 / (2 * dim)
    x = x * math.sqrt(logit)
    return x, x, scene.values()


def what_is_seen(scene: Scene) -> Head:
    """Sharp inputs like those of the benchmark: nearly all mass is a token's own, by its noise."""
    seed = int(torch.randint(1 << 30, (), generator=scene.generator, device=scene.code.device))
    device, dtype = scene.code.device.type, scene.code.dtype
    found = video_like(
        1, 1, len(scene.code), scene.dim, seed=seed, device=device, dtype=dtype, sharpness=2.5
    )
    return found[0][0, 0], found[1][0, 0], found[2][0, 0]


TYPES: dict[str, Callable[[Scene], Head]] = {
    "one token, by its place": own_token,
    "one token, by what it shows": what_is_seen,
    "one token of the frame before": same_place_before,
    "neighbours in space": near_in_space,
    "one place at all times": near_in_time,
    "one token and everything": own_and_everything,
    "everything": everything,
    "sinks": sinks,
}


def sink_places(tokens: int, device: torch.device) -> Tensor:
    """(SINKS,) places of the sinks, spread over the video."""
    return (torch.arange(SINKS, device=device) * 2 + 1) * tokens // (2 * SINKS)


def scene_of(tokens: int, dim: int, seed: int, device: str) -> Scene:
    """A scene in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    code, at = latent_video(tokens, generator)
    return Scene(code, at, dim, generator)


def errors_of(
    name: str, tokens: int, dim: int, heads: int, device: str, form: str = "gaussian"
) -> dict[float, float]:
    """Relative error of the output by density, over some heads of a type, each of its own scene.

    Args:
        name: name in `TYPES`.
        tokens: of the video.
        dim: head dim.
        heads: number of heads.
        device: ``"cuda"`` or ``"cpu"``.
        form: compensation and metric, see `plan_of`.
    """
    made = [TYPES[name](scene_of(tokens, dim, seed, device)) for seed in range(heads)]
    q, k, v = (torch.stack(part)[None] for part in zip(*made, strict=True))
    dense = F.scaled_dot_product_attention(q, k, v)
    return {
        d: relative_error(sparse_attention(q, k, v, plan_of("default", form, d)).out, dense)
        for d in DENSITIES
    }


def main() -> None:
    """Print the error of every type and name the worst."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, default=32760 if on_gpu else 8190)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=12 if on_gpu else 1, help="of every type")
    parser.add_argument("--form", default="gaussian", help="also centroid, gaussian/euclidean")
    parser.add_argument("--out", type=Path, help="folder of the record, heads.json")
    given = parser.parse_args()
    frames, rows, columns = grid_of(given.tokens)
    print(
        f"{given.tokens} tokens of {frames} x {rows} x {columns}, {given.heads} heads of a type, "
        f"head dim {given.dim}, {given.form}"
    )
    print(f"{'error at density':30s}", *(f"{density:>7g}" for density in DENSITIES))
    found = {}
    for name in TYPES:
        found[name] = errors_of(
            name, given.tokens, given.dim, given.heads, "cuda" if on_gpu else "cpu", given.form
        )
        print(f"{name:30s}", *(f"{e:7.3f}" for e in found[name].values()), flush=True)
    for density in DENSITIES:
        worst = max(found, key=lambda name: found[name][density])
        print(f"worst at {density:g}: {worst}, {found[worst][density]:.3f}")
    if given.out is not None:
        record = {
            **provenance(), "tokens": given.tokens, "dim": given.dim, "heads": given.heads,
            "form": given.form, "errors": found,
        }  # fmt: skip
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "heads.json").write_text(json.dumps(record, indent=1))


def table(record: dict[str, Any]) -> str:
    """The errors of a record, as Markdown."""
    errors: dict[str, dict[str, float]] = record["errors"]
    densities = list(next(iter(errors.values())))
    lines = [
        f"{where([record])}; {record['heads']} heads of a type, {record['tokens']:,} tokens, head "
        f"dim {record['dim']}.",
        "",
        f"| what a head looks at | {' | '.join(f'error at {d}' for d in densities)} |",
        "|---" * (1 + len(densities)) + "|",
    ]
    for name, found in errors.items():
        lines.append(f"| {name} | {' | '.join(f'{found[d]:.3f}' for d in densities)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
