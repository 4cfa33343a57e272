"""What an accelerated pipeline did: layers, density, reuse, memory, seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from svg_ear_compile.early_steps import EarlySteps
from svg_ear_compile.generation_state import Held
from svg_ear_compile.layers import LayerReport


@dataclass(frozen=True)
class ModelReport:
    """What one denoising model did in a generation.

    Attributes:
        name: attribute of the pipeline that holds it; of a bare module, its class.
        kind: name of its class.
        regional: whether its repeated blocks are compiled one by one.
        called: whether it ran.
        layers: every layer whose attention was rewritten and has been called.
    """

    name: str
    kind: str
    regional: bool
    called: bool
    layers: tuple[LayerReport, ...]

    @property
    def sparse(self) -> int:
        """Number of layers that ran sparse in at least one step."""
        return sum(layer.density is not None for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Mean density of the last sparse calls of all layers, None if none ran sparse."""
        return _mean_density(self.layers)

    @property
    def reused_fraction(self) -> float | None:
        """Fraction of the sparse calls that reused clusters, None if there was none."""
        calls = sum(layer.sparse_calls for layer in self.layers)
        return sum(layer.reused for layer in self.layers) / calls if calls else None

    def __str__(self) -> str:
        if not self.called:
            return f"{self.name} ({self.kind}): not called"
        if not self.layers:
            return (
                f"{self.name} ({self.kind}): every attention was dense; the line of svg_ear at its "
                "compilation says why"
            )
        if not self.sparse:
            return f"{self.name} ({self.kind}): every call of {_layers(self.layers)} was dense"
        return (
            f"{self.name} ({self.kind}): {self.sparse} of {_layers(self.layers)} ran sparse, "
            f"density {self.density:.3g}, {self.reused_fraction:.0%} of sparse calls reused"
        )


@dataclass(frozen=True)
class AccelerationReport:
    """What ran in the last call of an accelerated pipeline, or in a bare module's generation.

    Attributes:
        calls: number of finished calls of the pipeline; 0 for a bare module.
        seconds: wall-clock time of the last call, None before the first and for a bare module.
        compiled: whether a graph was compiled during the last call.
        steps: denoising steps that ran in the generation that ended last.
        dense_steps: leading steps of it with dense attention.
        early: its early steps, whose density is higher where routing has one; None for none.
        models: one entry for each denoising model.
        held: device memory that the session held at the end of the call.
    """

    calls: int
    seconds: float | None
    compiled: bool
    steps: int
    dense_steps: int
    early: EarlySteps | None
    models: tuple[ModelReport, ...]
    held: tuple[Held, ...]

    @property
    def density(self) -> float | None:
        """Mean density over the layers of all models that ran sparse, None if none did."""
        layers = [layer for model in self.models for layer in model.layers]
        return _mean_density(layers)

    @property
    def memory_bytes(self) -> int:
        """Device memory that the session held, in bytes."""
        return sum(held.nbytes for held in self.held)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.seconds is None and not self.steps:
            return "no call has ended yet"
        if self.seconds is None:
            lines = [f"current generation: {self._schedule()}"]
        else:
            lines = [f"call {self.calls}: {self._schedule()}, {self.seconds:.1f} s"]
            if self.compiled:
                lines[0] += " with compilation"
        lines += map(str, self.models)
        if self.steps:
            lines.append(f"memory held: {_memory(self.held)}")
        return "\n".join(lines)

    def _schedule(self) -> str:
        """The steps that ran, and which of them were dense or denser than others."""
        if not self.steps:
            return "no step of its denoising models ran"
        steps = _counted(self.steps, "step")
        if self.density is None:
            return f"{steps}, all dense"
        steps += f", {self.dense_steps} of them dense"
        if self.early is None or not self.early.count:
            return steps
        first = "the first" if self.early.count == 1 else f"the first {self.early.count}"
        most = max(self.early.factors())
        return f"{steps}, {first} at up to {most:g} times the density of the others"


def _mean_density(layers: Sequence[LayerReport]) -> float | None:
    reached = [layer.density for layer in layers if layer.density is not None]
    return sum(reached) / len(reached) if reached else None


def _layers(layers: Sequence[LayerReport]) -> str:
    return _counted(len(layers), "layer")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _memory(held: Iterable[Held]) -> str:
    by_use: dict[str, int] = {}
    for each in held:
        by_use[each.what] = by_use.get(each.what, 0) + each.nbytes
    return ", ".join(f"{nbytes / 2**20:.1f} MiB {what}" for what, nbytes in by_use.items())
