"""Clock of a generation: counts denoising steps by the timestep argument of the model."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

# Few-step models have generations as short, but all start at the same timestep.
_SHORT = 2  # steps
_RESTARTS = 3


@dataclass
class Clock:
    """The denoising step of one generation; a new generation is a new clock.

    Attributes:
        timestep: timestep of the current step, None before the first.
        step: index of the current step, -1 before the first.
        started_at: timestep of the first step.
        forwards: number of forwards of each model at this timestep.
    """

    timestep: float | None = None
    step: int = -1
    started_at: float | None = None
    forwards: Counter[int] = field(default_factory=Counter)

    def tick(self, model: int, timestep: float) -> int:
        """Count a forward of a model; returns its index among its forwards at this timestep."""
        if timestep != self.timestep:
            self.timestep = timestep
            self.step += 1
            self.forwards.clear()
        if self.started_at is None:
            self.started_at = timestep
        self.forwards[model] += 1
        return self.forwards[model] - 1


def is_noisier(timestep: float, other: float, ascending: bool) -> bool:
    """Whether `timestep` is nearer to noise than `other`.

    Args:
        ascending: True if timesteps rise from noise to video.
    """
    return timestep < other if ascending else timestep > other


@dataclass
class RestartWatch:
    """Warns once if generations keep ending after a step or two, as no scheduler makes them."""

    restarts: int = 0
    warned: bool = False

    def restarted(self, ended: Clock, timestep: float, ascending: bool) -> None:
        """Count a generation that ended because a forward had a noisier timestep."""
        unlike = ended.step < _SHORT and ended.started_at != timestep
        self.restarts = self.restarts + 1 if unlike else 0
        if self.restarts == _RESTARTS and not self.warned:
            self.warned = True
            log.warning(
                "%d generations in a row ended after a step or two, each at another timestep. Does "
                "the timestep of this model run from noise to video the other way? Then bind it "
                "with ascending=%s. Do several generations take turns? Then give each a name: "
                "with session.generation(name): ...",
                _RESTARTS + 1,
                not ascending,
            )
