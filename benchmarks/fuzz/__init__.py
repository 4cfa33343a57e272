"""Fuzzers: random graphs (`python -m benchmarks.fuzz`) and random inputs (`.inputs`)."""
