"""Measurements, never tests: times and memory against the floor that arithmetic gives (benchmarks/RESULTS.md)."""
