"""What a training run needs to go on where it was, in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


@dataclass
class TrainingState:
    """Both sets of weights, the optimiser's moments, and how far training is.

    Attributes:
        model: what is trained.
        smoothed: the mean of its weights.
        optimizer: of the model.
        generator: of everything random.
        step: optimiser steps so far.
        progress: fraction of the training that is done.
        losses: one entry for each line of the log.
    """

    model: nn.Module
    smoothed: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    progress: float = 0.0
    losses: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write ``path`` whole or not at all."""
        tensors = {
            **{f"model.{name}": t for name, t in self.model.state_dict().items()},
            **{f"smoothed.{name}": t for name, t in self.smoothed.state_dict().items()},
            "generator": self.generator.get_state(),
        }
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in moments.items()}
        known = {"step": self.step, "progress": self.progress, "losses": self.losses}
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            part,
            {"known": json.dumps(known)},
        )
        part.rename(path)

    def load(self, path: Path) -> None:
        """Take over what :meth:`save` wrote for a model of the same sizes."""
        with safe_open(path, "pt") as stored:
            known = json.loads(stored.metadata()["known"])
            # What safe_open returns has keys and cannot be iterated over.
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        self.step, self.progress, self.losses = (
            known[name] for name in ("step", "progress", "losses")
        )
        self.generator.set_state(tensors.pop("generator"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        weights: dict[str, dict[str, torch.Tensor]] = {"model": {}, "smoothed": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, moment = rest.partition(".")
                moments.setdefault(int(index), {})[moment] = tensor
            else:
                weights[kind][rest] = tensor
        self.model.load_state_dict(weights["model"])
        self.smoothed.load_state_dict(weights["smoothed"])
        groups: Any = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
