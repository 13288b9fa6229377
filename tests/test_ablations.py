"""Runs side by side: the table's numbers against NumPy, and what a broken folder gives."""

import json

import numpy as np
import pytest

from listopd_jax.errors import exit_code
from listopd_jax.report import ablations

PARSE = {(50, 1.0): [0.9, 1.0, 0.8], (50, 2.0): [0.5, 0.4, 0.3], (200, 2.0): [0.1, 0.0, 0.2]}


def record(stage, lam, seed, steps, parse):
    return {
        "run": f"{stage}{lam}", "stage": stage, "lambda": lam, "seed": seed, "steps": steps, "n": 10, "parse": parse,
        "useful": parse / 2, "ndcg@1": None if parse == 0 else 0.75, "mae": None,
        "failures": {"ok": round(10 * parse), "truncated_k_minus_1": 10 - round(10 * parse)},
    }  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "guard"
    folder.mkdir()
    records = [record("opd", lam, s, n, p) for (n, lam), ps in PARSE.items() for s, p in enumerate(ps)]
    records.append(record("forecast", 2.0, None, 0, 0.25))
    (folder / "results.json").write_text(json.dumps(records))
    shares = {1: 0.5, 50: 0.25, 51: 0.0}
    rows = [
        {"run": "x", "stage": "opd", "lambda": 2.0, "step": step, "guarded_fraction": share}
        for step, share in shares.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_table_has_means_and_deviations_over_seeds(workdir, capsys):
    assert exit_code(ablations.main, [str(workdir)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    cells = {(int(x[1]), float(x[2])): x for x in lines[2:]}
    assert set(cells) == set(PARSE)
    for key, parse in PARSE.items():
        row = cells[key]
        assert row[4] == f"{np.mean(parse):.3f} ± {np.std(parse, ddof=1):.3f}"
        assert row[8] == f"{1 - np.mean(parse):.3f} ± {np.std(parse, ddof=1):.3f}"
        assert row[3] == "3" and row[7] == "–"
    assert cells[200, 2.0][10].startswith("0.250") and cells[50, 1.0][10].startswith("–")
    assert cells[50, 2.0][9] == "0.375" and cells[200, 2.0][9] == "0.250" and cells[50, 1.0][9] == "–"


def test_one_budget_alone(workdir, capsys):
    ablations.main([str(workdir), "--steps=200"])
    rows = [line.split(" | ")[1:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["200", "2"]]
    assert exit_code(ablations.main, [str(workdir), "--steps=77"]) == 2
    assert "[50, 200]" in capsys.readouterr().err


def test_a_seed_that_parses_nothing_has_no_ranking_and_is_left_out_of_it(workdir, capsys):
    ablations.main([str(workdir)])
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| guard | 200"))
    assert row.split(" | ")[6] == "0.750 ± 0.000"


def test_the_figure_is_the_same_bytes_twice(workdir, tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        assert exit_code(ablations.main, [str(workdir), f"--figure={path}"]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes() and paths[0].read_bytes()[:4] == b"\x89PNG"


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert exit_code(ablations.main, [str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
