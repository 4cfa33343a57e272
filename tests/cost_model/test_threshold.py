"""The routing threshold: where computing a block and compensating it cost the same error."""

from __future__ import annotations

import pytest

from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.cost_model.threshold import routing_threshold


def test_at_the_threshold_a_block_adds_the_error_that_its_time_saves_elsewhere() -> None:
    shape = AttentionShape(2, 3, 3, 700, 900, 64, "float16")
    multiplier, ms_per_density, sensitivity, mean_square_row = 0.002, 11.0, 0.3, 7.0
    rho = routing_threshold(multiplier, ms_per_density, sensitivity, mean_square_row, shape)
    queries, keys, rows = 31, 57, 2 * 3 * 700
    added = sensitivity * rho * queries * keys / (rows * mean_square_row)
    took_ms = ms_per_density * queries * keys / (rows * 900)
    assert added == pytest.approx(multiplier * took_ms)
