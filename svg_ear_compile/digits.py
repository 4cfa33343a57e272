"""Figures in messages and tables."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """Three significant digits, never with an exponent for a large number: 0.171, 31.5, 4,242."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
