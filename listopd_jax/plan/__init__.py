"""The planner, a command: what fits on which devices, and how fast it can be."""
