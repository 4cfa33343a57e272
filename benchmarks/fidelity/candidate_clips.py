"""`python -m benchmarks.fidelity.candidate_clips --out DIR`: what candidates do to whole clips.

The candidates of `candidates.py` that lowered the attention error, in generations: PSNR against
the dense clips of the same seeds. Everything is plain PyTorch and clusters afresh at every call, so
that only the candidate differs. `dense` in a row is the share of the sparse phase's steps that a
candidate computes dense.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity.candidates import (
    Case,
    Features,
    Form,
    Labels,
    Routing,
    by_spreads,
    cases_of,
    centroids,
    first_order,
    labels_of,
    logit_metric,
    plain,
    with_covariance,
    with_shared_covariance,
)
from benchmarks.fidelity.grid import WARM_UPS
from benchmarks.fidelity.scores import interval, score_clips
from benchmarks.fidelity.subject import Subject
from benchmarks.provenance import provenance
from benchmarks.tuning.recorded import Recording
from benchmarks.video_dit.zoo import MODELS
from svg_ear_compile.kernels.plan import AttentionPlan

_Dense = Callable[..., Tensor]


@dataclass
class Method:
    """One way to generate, with what it remembers of every layer.

    Attributes:
        form: what skipped blocks do.
        route: which blocks are exact.
        features: of the clusters.
        period: clusters (and what `keeps_blocks` says) are made anew every so many steps.
        keeps_blocks: exact blocks are those of the step that clustered.
        refresh: dense every so many steps after the last leading dense step; None is never.
        adds_difference: what the blocks lost at the last dense step is added.
    """

    form: Form = first_order
    route: Routing = Case.by_error
    features: Features = plain
    period: int = 1
    keeps_blocks: bool = False
    refresh: int | None = None
    adds_difference: bool = False
    labels: dict[int, Labels] = field(default_factory=dict)
    blocks: dict[int, list[Tensor]] = field(default_factory=dict)
    lost: dict[int, Tensor] = field(default_factory=dict)

    def is_dense(self, age: int) -> bool:
        """Whether a step is dense, `age` steps after the last leading dense step."""
        return age <= 0 or (self.refresh is not None and age % self.refresh == 0)

    def answer(
        self, dense: _Dense, call: Recording, plan: AttentionPlan, text: int, age: int
    ) -> Tensor:
        """The attention output of one call."""
        layer = call.layer
        if self.is_dense(age):
            out = dense(call.q, call.k, call.v)
            # Only the last dense step before a sparse one is worth remembering.
            if self.adds_difference and not self.is_dense(age + 1):
                self.labels[layer] = labels_of(self.features(call), plan, text)
                cases = cases_of(call, self.labels[layer], plan, text)
                self.blocks[layer] = [self.route(case, plan.density) for case in cases]
                self.lost[layer] = out - self._attend(cases, plan, layer, call.q)
            return out
        if not self.adds_difference and (age - 1) % self.period == 0:
            self.labels[layer] = labels_of(self.features(call), plan, text)
            self.blocks.pop(layer, None)
        cases = cases_of(call, self.labels[layer], plan, text)
        if self.keeps_blocks and layer not in self.blocks:
            self.blocks[layer] = [self.route(case, plan.density) for case in cases]
        out = self._attend(cases, plan, layer, call.q)
        return out + self.lost[layer] if self.adds_difference else out

    def _attend(self, cases: list[Case], plan: AttentionPlan, layer: int, q: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for place, case in enumerate(cases):
            exact = (
                self.blocks[layer][place]
                if layer in self.blocks
                else self.route(case, plan.density)
            )
            found = self.form(case, exact)
            out[divmod(place, q.shape[1])] = found.to(q.dtype)
        return out


_SHARED, _SECOND = with_shared_covariance(), with_shared_covariance("diagonal")

METHODS: dict[str, tuple[float, Callable[[], Method]]] = {
    "first order": (0.1, Method),
    "paper": (0.1, lambda: Method(centroids)),
    "second order": (0.1, lambda: Method(_SECOND)),
    "shared covariance": (0.1, lambda: Method(_SHARED)),
    "shared covariance, isotropic mass": (
        0.1, lambda: Method(with_shared_covariance("isotropic")),
    ),
    "labels and blocks kept for 3 steps": (0.1, lambda: Method(period=3, keeps_blocks=True)),
    "difference to dense added": (0.1, lambda: Method(adds_difference=True)),
    "dense every 8th step, difference added": (
        0.1, lambda: Method(refresh=8, adds_difference=True),
    ),
    "the same, second order": (
        0.1, lambda: Method(_SECOND, refresh=8, adds_difference=True),
    ),
    "dense every 4th step, difference added": (
        0.1, lambda: Method(refresh=4, adds_difference=True),
    ),
    "dense every 4th step": (0.1, lambda: Method(refresh=4)),
    "routing: spread of values x keys": (0.1, lambda: Method(route=by_spreads)),
    "clusters in the metric of logits": (0.1, lambda: Method(features=logit_metric)),
    "second order, metric of logits": (0.1, lambda: Method(_SECOND, features=logit_metric)),
    "covariance": (0.1, lambda: Method(with_covariance(None))),
    "first order at density 0.05": (0.05, Method),
    "second order at density 0.05": (0.05, lambda: Method(_SECOND)),
    "first order at density 0.2": (0.2, Method),
    "second order at density 0.2": (0.2, lambda: Method(_SECOND)),
    "first order at density 0.3": (0.3, Method),
}  # fmt: skip
"""By name: density, and how a fresh one is made."""


def clips_of(subject: Subject, method: Method, plan: AttentionPlan, dense_steps: int) -> Tensor:
    """The subject's clips by a method."""

    def answer(dense: _Dense, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int) -> Tensor:
        return method.answer(
            dense, Recording(layer, step, q, k, v), plan, subject.text, step - dense_steps + 1
        )

    return subject.generate(answer)


def main() -> None:
    """Generate, compare, write after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="self")
    parser.add_argument("--clip", choices=("short", "long"), default="long")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clusters", default="128/64", help="queries and keys a cluster")
    parser.add_argument("--methods", help="positions in the list, for example 0,1,9")
    parser.add_argument("--minutes", type=float, help="start no method later")
    given = parser.parse_args()
    began = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    trained = MODELS[given.model]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = getattr(trained, given.clip)
    subject = Subject(trained, range(given.seeds), given.steps, 2.0, shape, device)
    queries, keys = map(int, given.clusters.split("/"))
    dense_steps = round(WARM_UPS[0] * given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = list(METHODS.items())
    if given.methods is not None:
        chosen = [chosen[int(place)] for place in given.methods.split(",")]
    record: dict[str, Any] = {
        **provenance(),
        "settings": {**vars(given), "out": None}, "tokens": subject.tokens, "rows": [],
    }  # fmt: skip
    for name, (density, make) in chosen:
        if given.minutes is not None and time.perf_counter() - began > 60 * given.minutes:
            break
        method, started = make(), time.perf_counter()
        plan = AttentionPlan(
            density=density,
            q_clusters=math.ceil(subject.tokens / queries),
            k_clusters=math.ceil(subject.tokens / keys),
        )
        found = score_clips(clips_of(subject, method, plan, dense_steps), subject.dense_clips)
        ages = range(1, given.steps - dense_steps + 1)
        dense = sum(method.is_dense(age) for age in ages) / len(ages)
        row = {"method": name, "density": density, "dense": dense, **found}
        record["rows"].append(row)
        record["seconds"] = time.perf_counter() - began
        (given.out / "candidate_clips.json").write_text(json.dumps(record, indent=1) + "\n")
        base = record["rows"][0]
        gains = [a - b for a, b in zip(found["psnr"], base["psnr"], strict=True)]
        print(
            f"{name}, density {density:g}, {dense:.0%} of the later steps dense: "
            f"{interval(found['psnr'])} dB, {interval(gains)} over {base['method']} "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
