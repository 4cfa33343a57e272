"""Dense or sparse by size alone: the rule that stands until a device is calibrated."""

from __future__ import annotations

# Clustering, probe and routing cost about as much per token as dense attention over a few thousand
# keys, so a sequence has to be several times that before skipping keys pays. On an H200 the whole
# operator at density 0.2 is measured to break even near 32,000 tokens with 128 channels a head.
MIN_TOKENS = {"cuda": 32768, "cpu": 4096}


def min_tokens(device_type: str) -> int:
    """Fewest video tokens at which attention goes sparse on that kind of device."""
    return MIN_TOKENS.get(device_type, MIN_TOKENS["cuda"])
