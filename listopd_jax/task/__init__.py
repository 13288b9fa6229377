"""The listwise task: prompt, output contract, metrics. NumPy and the standard library only, no models."""
