"""Figures in messages and tables: never with an exponent where a reader wants seconds."""

from __future__ import annotations

import pytest

from svg_ear_compile.digits import three_digits


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1714, "0.171"), (31.46, "31.5"), (999.4, "999"), (999.5, "1,000"), (1180.4, "1,180"),
        (4242.0, "4,242"), (1_234_567.0, "1,234,567"), (0.0, "0"), (-1180.0, "-1,180"),
    ],
)  # fmt: skip
def test_large_numbers_have_no_exponent(value: float, text: str) -> None:
    assert three_digits(value) == text
