"""The paper's experiments (EC, arXiv:2605.08737, §4 and appendix), one file each, at two scales.

    python -m listopd_jax.main --config=configs/paper/clip.py:tiny,1.5 --workdir=runs/paper/clip/1.5
    python -m listopd_jax.main --config=configs/paper/clip.py:paper,1.5 --workdir=runs/paper/clip/1.5
    python -m launch.matrix --root=runs/matrix --out=docs/matrix.md      # all of them at tiny, one after another

After the colon: the scale, `tiny` (from scratch, minutes on two cores) or `paper` (Qwen3, EC's recipe), and one of the
experiment's ablations. Budgets are in units of EC's 42 steps, which are 50 of `tiny`.
"""
