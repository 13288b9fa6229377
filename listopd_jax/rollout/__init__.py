"""What a student writes and how it is scored: prefill, decoding in segments, forced scoring."""
