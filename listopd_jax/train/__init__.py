"""The training loop, its checkpoints, and the SFT and OPD steps. Knows no Job."""
