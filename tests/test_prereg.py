"""Locks are written once and notice every change; EC's three tests as EC ran them."""

import copy
import itertools
import json
import pathlib
import subprocess
import sys

import pytest

from listopd_jax.errors import UserError
from listopd_jax.prereg import __main__ as prereg
from listopd_jax.prereg import lock as locks
from listopd_jax.prereg.verdict import judge

EC_GRID = {  # method.md §4: seeds 7, 13, 21, 42, 95
    1.18: [0.901, 0.934, 0.863, 0.934, 0.858],
    1.20: [0.830, 0.797, 0.802, 0.934, 0.689],
    1.22: [0.731, 0.873, 0.901, 0.651, 0.788],
    1.24: [0.679, 0.486, 0.561, 0.684, 0.877],
}
SEEDS = [7, 13, 21, 42, 95]
SMALL_CLIP = {0.95: 0.943, 1.0: 0.892, 1.05: 0.939, 1.075: 0.632, 1.1: 0.670, 1.15: 0.297, 1.2: 0.255}
BUDGET = {1.0: 0.934, 1.05: 0.703, 1.1: 0.5}


def records(curve, steps, seeds=(42,)):
    columns = {lam: y if isinstance(y, list) else [y] for lam, y in curve.items()}
    return [
        {"stage": "opd", "lambda": lam, "seed": seed, "steps": steps, "parse": y}
        for lam, column in columns.items()
        for seed, y in zip(seeds, column, strict=True)
    ]


def config(grid, seeds, steps, clip=5.0):
    return {"opd": {"lambdas": list(grid), "seeds": list(seeds), "steps": steps, "clip": clip}}


def lock_of(template, lam_star, curve, steps, seeds=(42,), **given):
    grid = sorted(curve)
    return locks.make_lock(template, lam_star, seeds, steps, config(grid, seeds, steps), grid=grid, **given)


def workdir(tmp_path, curve, steps, seeds=(42,), **fields):
    saved = {"config": config(curve, seeds, steps, **fields), "revision": "abc"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    return tmp_path


def test_ecs_three_tests_on_ecs_figures():
    fine = lock_of("fine_grid", 1.2216, EC_GRID, 42, SEEDS)
    budget = lock_of("budget", 1.2216, BUDGET, 196)
    small = lock_of("small_clip", 1.0698, SMALL_CLIP, 196)
    result = judge(fine, records(EC_GRID, 42, SEEDS))  # seed 95 is at .877 at 1.24, the grid's end
    assert result["verdict"] == "inconclusive" and result["checks"][0]["reason"].startswith("1 of 5 onsets")
    assert fine["window"][0] <= result["checks"][0]["value"] <= fine["window"][1]  # EC's pass
    assert judge(budget, records(BUDGET, 196))["verdict"] == "pass"
    result = judge(small, records(SMALL_CLIP, 196))
    assert result["verdict"] == "pass" and round(result["checks"][0]["value"], 4) == 1.0695
    assert budget["window"] == [1.0, pytest.approx(1.0997, abs=1e-4)]  # EC locked [1.00, 1.10]
    assert small["window"] == [1.0, pytest.approx(1.1194, abs=1e-4)]  # EC locked [1.00, 1.12]


@pytest.mark.parametrize(
    ("curve", "failing"),
    [
        (SMALL_CLIP | {1.2: 0.6}, "parse at λ = 1.2 ≤ 0.5"),
        (SMALL_CLIP | {0.95: 0.8}, "parse at λ = 0.95 ≥ 0.85"),
        (SMALL_CLIP | {1.075: 0.9, 1.1: 0.9, 1.15: 0.8}, "midpoint"),
        (dict.fromkeys(SMALL_CLIP, 0.95), "midpoint"),
    ],
)
def test_each_check_of_a_rule_can_fail(curve, failing):
    result = judge(lock_of("small_clip", 1.0698, SMALL_CLIP, 196), records(curve, 196))
    assert result["verdict"] == "fail"
    assert any(check["check"].startswith(failing) and not check["pass"] for check in result["checks"])


def test_a_cliff_beyond_the_grid_never_passes():
    curve = {1.18: 0.95, 1.2: 0.4, 1.22: 0.95, 1.24: 0.82}
    result = judge(lock_of("fine_grid", 1.2216, curve, 42), records(curve, 42))
    assert result["verdict"] == "inconclusive" and "beyond the grid's end" in result["checks"][0]["reason"]
    flat = dict.fromkeys(curve, 0.95)
    assert judge(lock_of("fine_grid", 1.2216, curve, 42), records(flat, 42))["verdict"] == "inconclusive"
    early = lock_of("fine_grid", 1.2216, curve, 42, window=[1.19, 1.22])
    assert (
        judge(early, records(flat, 42))["verdict"] == "fail"
    )  # wherever the cliff is, it is past the window


@pytest.mark.parametrize(
    ("at_the_end", "verdict"),
    [([0.7, 0.7, 0.7, 0.7, 0.7], "pass"), ([0.9, 0.7, 0.7, 0.7, 0.7], "inconclusive"), ([0.9] * 5, "fail")],
)
def test_one_censored_seed_leaves_a_verdict_open_and_all_of_them_may_refute(at_the_end, verdict):
    curve = {1.0: [0.95] * 5, 1.3: [0.9] * 5, 1.6: [0.3] * 5, 3.0: at_the_end}
    lock = lock_of("fine_grid", 1.4, curve, 42, SEEDS, window=[1.1, 1.7])
    assert judge(lock, records(curve, 42, SEEDS))["verdict"] == verdict


def test_a_cliff_before_the_grid_refutes_a_window_on_it_and_not_one_that_begins_earlier():
    low = {1.3: 0.5, 1.5: 0.3, 1.6: 0.2, 2.0: 0.0}
    assert judge(lock_of("fine_grid", 1.6, low, 42, window=[1.5, 1.7]), records(low, 42))["verdict"] == "fail"
    wide = lock_of("fine_grid", 1.6, low, 42, window=[1.1, 1.55])
    assert judge(wide, records(low, 42))["verdict"] == "inconclusive"


def test_a_refuted_check_outweighs_an_open_one():
    curve = dict.fromkeys(SMALL_CLIP, 0.95)
    lock = lock_of("small_clip", 1.0698, SMALL_CLIP, 196, window=[1.0, 1.3])
    result = judge(lock, records(curve, 196))
    assert result["checks"][0]["inconclusive"] and result["verdict"] == "fail"


@pytest.mark.parametrize(
    ("template", "grid", "window"),
    [
        ("fine_grid", [1.0, 1.3], [1.0, 1.2]),  # whatever is seen, an onset that is not censored is at 1
        ("fine_grid", [1.0, 1.1, 1.3], [1.0, 1.15]),
        ("budget", [1.0, 1.05, 1.1], [1.0, 1.1]),
    ],
)
def test_a_lock_that_cannot_fail_is_refused(template, grid, window):
    with pytest.raises(UserError, match="cannot fail the window"):
        lock_of(template, 1.1, dict.fromkeys(grid), 42, window=window)
    wider = [*grid, grid[-1] + 0.2]
    assert lock_of(template, 1.1, dict.fromkeys(wider), 42, window=window)["grid"] == wider


def test_no_cliff_template_is_the_rival_prediction():
    flat = {1.0: 0.93, 1.5: 0.94, 2.0: 0.92}
    lock = lock_of("no_cliff", 1.5, flat, 42)
    assert judge(lock, records(flat, 42))["verdict"] == "pass"
    assert judge(lock, records(flat | {2.0: 0.5}, 42))["verdict"] == "fail"


def test_templates_scale_to_any_pair():
    for template, lam_star in itertools.product(locks.TEMPLATES, (1.05, 1.6, 2.2)):
        grid = [round(1 + u * (lam_star - 1), 4) for u in locks.TEMPLATES[template]["grid"]]
        lock = locks.make_lock(template, lam_star, [0], 10, config(grid, [0], 10))
        assert lock["grid"] == sorted(grid)
        assert all(grid[0] <= x <= grid[-1] for x in lock["window"])


def test_a_lock_is_written_once_and_reads_back(tmp_path):
    lock, path = lock_of("budget", 1.2216, BUDGET, 196), tmp_path / "lock.json"
    locks.write_lock(path, lock)
    before = path.read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        locks.write_lock(path, lock_of("budget", 1.21, BUDGET, 196))
    assert path.read_bytes() == before and locks.read_lock(path) == lock


@pytest.mark.parametrize(
    "change",
    [
        lambda lock: lock.update(window=[1.0, 9.0]),
        lambda lock: lock["seeds"].append(43),
        lambda lock: lock["rule"].pop(),
        lambda lock: lock.update(extra=1),
        lambda lock: lock["prediction"].update({"lambda": 1.3}),
        lambda lock: lock.update(sha256="0" * 64),
        lambda lock: lock.pop("sha256"),
    ],
)
def test_every_change_of_a_lock_is_noticed(tmp_path, change):
    lock = lock_of("small_clip", 1.07, SMALL_CLIP, 196)
    changed = copy.deepcopy(lock)
    change(changed)
    path = tmp_path / "lock.json"
    locks.write_lock(path, changed)
    with pytest.raises(UserError, match="changed since|no lock"):
        locks.read_lock(path)


def test_reformatting_a_lock_is_no_change(tmp_path):
    lock, path = lock_of("budget", 1.2216, BUDGET, 196), tmp_path / "lock.json"
    path.write_text(json.dumps(dict(reversed(lock.items())), indent=7))
    assert locks.read_lock(path) == lock


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ([{"quantity": "__import__('os')"}], "cannot be read by a verdict"),
        ([{"quantity": "parse", "at": "first"}], "cannot be read by a verdict"),
        ([{"quantity": "onset", "reading": "grid", "within": "window"}], "cannot be read by a verdict"),
        (["midpoint < 1.2"], "cannot be read by a verdict"),
        ("midpoint", "not a list"),
    ],
)
def test_a_strange_rule_is_refused_even_under_a_right_hash(tmp_path, rule, message):
    content = {k: v for k, v in lock_of("budget", 1.2, BUDGET, 196).items() if k != "sha256"} | {"rule": rule}
    locks.write_lock(tmp_path / "lock.json", content | {"sha256": locks.sha256(content)})
    with pytest.raises(UserError, match=message):
        locks.read_lock(tmp_path / "lock.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows.pop(), "0 records of λ = 1.1, seed 42"),
        (lambda rows: rows.append(rows[0]), "2 records of λ = 1, seed 42"),
        (lambda rows: rows[0].update(parse=None), "not a rate"),
        (lambda rows: rows[0].update(steps=42), "0 records"),
    ],
)
def test_incomplete_results_give_no_verdict(spoil, message):
    rows = records(BUDGET, 196)
    spoil(rows)
    with pytest.raises(UserError, match=message):
        judge(lock_of("budget", 1.2216, BUDGET, 196), rows)


def test_other_records_do_not_matter():
    lock, rows = lock_of("budget", 1.2216, BUDGET, 196), records(BUDGET, 196)
    others = [{"stage": "sft_student", "lambda": None, "parse": 0.3}, *records({1.0: 0.1}, 42)]
    assert judge(lock, rows + others) == judge(lock, rows)


def test_lock_run_verdict_as_a_user_does(tmp_path):
    run = workdir(tmp_path, BUDGET, 196)
    flags = ["lock", "--template=budget", "--threshold=1.2216", "--grid=1.0,1.05,1.1", "--window=1.0,1.09"]
    flags += [f"--config={run / 'config.json'}", f"--out={run / 'lock.json'}"]
    text, code = prereg.run(flags)
    assert code == 0 and "locked" in text
    verdict = ["verdict", f"--lock={run / 'lock.json'}", f"--workdir={run}"]
    with pytest.raises(UserError, match="no such file"):
        prereg.run(verdict)
    (run / "results.json").write_text(json.dumps(records(BUDGET, 196)))
    text, code = prereg.run(verdict)
    assert code == 0 and text.startswith("PASSED") and "note" in text  # the revision differs
    (run / "results.json").write_text(json.dumps(records(BUDGET | {1.05: 0.9, 1.1: 0.85}, 196)))
    text, code = prereg.run([*verdict, "--json"])
    assert code == 1 and json.loads(text)["verdict"] == "fail"
    (run / "results.json").write_text(json.dumps(records(BUDGET | {1.1: 0.75}, 196)))
    lock = lock_of("budget", 1.2216, BUDGET, 196, window=[1.01, 1.2])
    locks.write_lock(run / "wide.json", lock)
    text, code = prereg.run(["verdict", f"--lock={run / 'wide.json'}", f"--workdir={run}"])
    assert code == 3 and text.startswith("INCONCLUSIVE") and "  open  midpoint" in text
    with pytest.raises(UserError, match="comes before"):
        prereg.run([*flags[:-1], f"--out={run / 'late.json'}"])


def test_a_budget_read_on_the_way_can_be_locked():
    plan = config(BUDGET, [42], 196)
    for field, value in (("eval_steps", [42]), ("eval_every", 21)):
        on_the_way = plan | {"opd": plan["opd"] | {field: value}}
        assert locks.make_lock("budget", 1.2216, [42], 42, on_the_way, grid=list(BUDGET))["steps"] == 42
    with pytest.raises(UserError, match="none of the budgets"):
        locks.make_lock("budget", 1.2216, [42], 43, plan, grid=list(BUDGET))


def test_a_changed_config_gives_no_verdict(tmp_path):
    run = workdir(tmp_path, BUDGET, 196)
    lock = locks.make_lock("budget", 1.2, [42], 196, config(BUDGET, [42], 196), grid=list(BUDGET))
    locks.write_lock(run / "lock.json", lock)
    assert prereg.run(["verify", f"--lock={run / 'lock.json'}", f"--config={run / 'config.json'}"])[1] == 0
    workdir(tmp_path, BUDGET, 196, clip=1.5)
    (run / "results.json").write_text(json.dumps(records(BUDGET, 196)))
    for command in ("verify --config=config.json", "verdict --workdir=."):
        name, flag = command.split()
        with pytest.raises(UserError, match="not the one that was locked"):
            prereg.run([name, f"--lock={run / 'lock.json'}", flag.replace("=", f"={run}/")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--p=0.9993", "--b=0.81", "--c=5"], "would not run the locked"),
        (["--p=0.6", "--b=0.9", "--c=5"], "b < p"),
        (["--p=0.9", "--b=0.5", "--predict=flip"], "no such threshold"),
        (["--p=1.2", "--b=0.5"], "p = 1.2"),
        (["--grid=1.0,1.05,1.1"], "give --p and --b"),
        (["--threshold=0.9", "--grid=1.0,1.05,1.1"], "beyond λ = 1"),
        (["--threshold=1.2", "--grid=1.0,1.05,1.1", "--steps=42"], "none of the budgets"),
        (["--threshold=1.2", "--grid=1.0,1.05,1.1", "--steps=0"], "at least 1"),
        (["--threshold=1.2", "--grid=1.0,1.05,1.1", "--window=1.1,1.0"], "LOW,HIGH"),
        (["--threshold=1.2", "--grid=1.0,x"], "invalid"),
        (["--threshold=1.2", "--grd=1.0"], "'--grd=1.0' is not known"),
    ],
)
def test_mistakes_at_lock_time_are_one_line_errors(tmp_path, flags, message):
    run = workdir(tmp_path, BUDGET, 196)
    required = ["lock", "--template=budget", f"--config={run / 'config.json'}", f"--out={run / 'lock.json'}"]
    with pytest.raises(UserError, match=message) as caught:
        prereg.run(required + flags)
    assert "\n" not in str(caught.value) and not (run / "lock.json").exists()


@pytest.mark.slow
def test_the_command_locks_a_config_file_with_overrides(tmp_path):
    flags = ["--template=small_clip", "--p=0.9993", "--b=0.81", "--config=configs/fashion.py:tiny"]
    flags += ["--grid=1.0,1.1", "--config.opd.lambdas=(1.0,1.1)", "--config.opd.clip=1.5"]
    command = [sys.executable, "-m", "listopd_jax.prereg", "lock", *flags, f"--out={tmp_path / 'lock.json'}"]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    lock = locks.read_lock(tmp_path / "lock.json")
    assert round(lock["prediction"]["lambda"], 3) == 1.070 and lock["prediction"]["c"] == 1.5
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert "never overwritten" in again.stderr.splitlines()[-1]
