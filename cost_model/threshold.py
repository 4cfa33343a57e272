"""The routing threshold that follows from a knapsack's multiplier."""

from __future__ import annotations

from svg_ear_compile.cost_model.stages import AttentionShape


def routing_threshold(
    multiplier: float,
    ms_per_share: float,
    sensitivity: float,
    mean_square_row: float,
    shape: AttentionShape,
) -> float:
    """Smallest ``rho`` worth computing exactly in one layer.

    Compensating a block of m queries and n keys adds ``rho m n`` to the squared error of the
    attention output, so ``sensitivity * rho m n / (rows * mean_square_row)`` to the squared
    relative error of the model's output; computing it exactly takes
    ``ms_per_share * m n / (rows * N_k)`` milliseconds, which elsewhere would save ``multiplier`` of
    squared error each. The two are equal at the threshold: multiplier times milliseconds per area
    over model error per attention error.

    Args:
        multiplier: squared relative error of the model's output that one millisecond saves.
        ms_per_share: milliseconds per unit of density of this layer.
        sensitivity: squared relative error of the model's output per squared relative error of this
            layer's attention output.
        mean_square_row: mean over queries of the squared norm of the attention output.
        shape: of the call.
    """
    return multiplier * ms_per_share * mean_square_row / (sensitivity * shape.k_tokens)
