"""Measurements, never tests: times and memory beside the floor that arithmetic gives (benchmarks/RESULTS.md)."""
