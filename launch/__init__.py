"""Run a grid of λ × seed with existing engines: local processes, SLURM, GKE, TPU VMs. See docs/running_on_pods.md.

The stages that all points share (data, SFT, calibration, forecast) run once; each point starts from a copy of their
workdir with one λ and one seed, so it repeats nothing and computes what a single run of the whole grid would.
"""
