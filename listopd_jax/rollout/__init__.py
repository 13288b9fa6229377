"""Sampling and scoring of completions: prefill, decoding in segments, forced scoring."""
