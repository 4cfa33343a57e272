"""The routing threshold that follows from the multiplier of a knapsack solution."""

from __future__ import annotations

from svg_ear_compile.cost_model.stages import AttentionShape


def routing_threshold(
    multiplier: float,
    ms_per_density: float,
    sensitivity: float,
    mean_square_row: float,
    shape: AttentionShape,
) -> float:
    """Smallest ``rho`` of a block that is worth computing exactly in one layer.

    Compensating a block of m queries and n keys adds ``rho m n`` to the squared error of the
    attention output, and ``sensitivity * rho m n / (rows * mean_square_row)`` to the squared
    relative error of the model's output. Computing the block exactly takes
    ``ms_per_density * m n / (rows * N_k)`` milliseconds, each of which would save ``multiplier`` of
    squared error in another layer. At the threshold the added error equals the error that the same
    time would save elsewhere.

    Args:
        multiplier: squared relative error of the model's output that one millisecond saves.
        ms_per_density: milliseconds per unit of density of this layer.
        sensitivity: squared relative error of the model's output over squared relative error of
            the attention output of this layer.
        mean_square_row: mean over queries of the squared norm of the attention output.
        shape: shape of the call.
    """
    return multiplier * ms_per_density * mean_square_row / (sensitivity * shape.k_tokens)
