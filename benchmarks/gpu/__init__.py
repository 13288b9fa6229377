"""Checks for one short loan of a GPU: is it right, how fast is each stage, which kernels take the time."""
