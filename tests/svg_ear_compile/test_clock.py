"""The clock: steps and forwards are counted, and noise lies where the timesteps say."""

from __future__ import annotations

import pytest

from svg_ear_compile.clock import Clock, RestartWatch, is_noisier


def test_forwards_are_counted_for_each_model_in_each_step() -> None:
    clock = Clock()
    ticks = [(0, 9.0), (0, 9.0), (1, 9.0), (0, 9.0), (1, 5.0), (0, 5.0), (0, 5.0), (0, 0.0)]
    assert [clock.tick(*tick) for tick in ticks] == [0, 1, 0, 2, 0, 0, 1, 0]
    assert (clock.step, clock.timestep, clock.started_at) == (2, 0.0, 9.0)


@pytest.mark.parametrize("ascending", [False, True])
def test_noise_is_where_timesteps_begin(ascending: bool) -> None:
    assert is_noisier(0.2, 0.7, ascending) is ascending
    assert is_noisier(0.7, 0.2, ascending) is not ascending
    assert not is_noisier(0.7, 0.7, ascending)


@pytest.mark.parametrize(
    ("steps", "begins", "warned"),
    [(1, (1.0, 2.0, 3.0), True), (3, (1.0, 2.0, 3.0), False), (1, (9.0, 9.0, 9.0), False)],
    ids=["short and unlike", "of three steps", "alike"],
)
def test_only_short_generations_that_start_unlike_are_warned_of(
    steps: int, begins: tuple[float, ...], warned: bool
) -> None:
    watch = RestartWatch()
    for begin in begins:
        ended = Clock()
        for step in range(steps):
            ended.tick(0, 9.0 - step)
        watch.restarted(ended, begin, False)
    assert watch.warned is warned
