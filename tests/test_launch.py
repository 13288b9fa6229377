"""The grid of a launch, its points, the local engine and gathering, with a program that only pretends to train."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import NO_LAMBDA, REPO, run_command

from configs import fashion
from launch import cli, gather, local, point
from launch.grid import COMMON, open_grid, read_grid
from listopd_jax import config as config_module
from listopd_jax.errors import UserError

ARGUMENTS = ["--config=configs/fashion.py:tiny", "--config.opd.lambdas=1.0,1.5", "--config.opd.seeds=7,8"]
NAMES = ["lambda1.0_seed7", "lambda1.5_seed7", "lambda1.0_seed8", "lambda1.5_seed8"]

PRETENDER = """
import ast, json, os, pathlib, signal, sys
given = dict(arg.split("=", 1) for arg in sys.argv[1:])
workdir = pathlib.Path(given["--workdir"])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "runs").open("a").write("x")
print("working", flush=True)
if (workdir.parent / "mistake").exists():
    sys.exit(print("error: data.path: no such file") or 2)
if (workdir.parent / "kill").exists():
    os.kill(os.getpid(), signal.SIGKILL)
if (workdir.parent / "stop").exists():
    sys.exit(print("saved at step 3; the same command resumes from there"))
value = lambda field: ast.literal_eval(given["--config." + field])
def read(name):
    return json.loads((workdir / name).read_text()) if (workdir / name).exists() else []
def record(stage, lam=None, seed=None, steps=0):
    return {"run": stage, "stage": stage, "lambda": lam, "seed": seed, "steps": steps, "parse": 0.5, "n": 4}
def write(name, value):
    (workdir / name).write_text(json.dumps(value))
lambdas = value("opd.lambdas")
new = [record("opd", lam, seed, 3) for lam in lambdas for seed in value("opd.seeds")]
if not lambdas:
    kept = read("results.json") or [record("sft_teacher", seed=1), record("sft_student", seed=2)]
    had = [r["lambda"] for r in kept]
    new = kept + [record("forecast", lam) for lam in value("forecast.lambdas") if lam not in had]
    (workdir / "checkpoints" / "sft_teacher").mkdir(parents=True, exist_ok=True)
    (workdir / "checkpoints" / "sft_teacher" / "5").touch()
    (workdir / "export").mkdir(exist_ok=True)
    write("config.json", {"config": {"forecast": {"lambdas": value("forecast.lambdas")}}, "revision": "r1"})
    write("results.json", new)
else:
    write("results.json", read("results.json") + new)
rows, said = ((workdir / name).open("a") for name in ("metrics.jsonl", "completions.jsonl"))
for r in new:
    if r["stage"] != "forecast":
        head = {k: r[k] for k in ("run", "stage", "lambda", "seed")}
        rows.write(json.dumps(head | {"step": 1, "loss": 0.5}) + chr(10))
        if r["stage"] == "opd":
            said.write(json.dumps(head | {"step": 1, "output": "[]"}) + chr(10))
rows.close()
said.close()
(workdir / "report.html").write_text("done")
"""


@pytest.fixture(scope="session")
def pretender(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "pretender.py"
    path.write_text(PRETENDER)
    return [str(path)]


def config_of(**opd):
    config = fashion.get_config("tiny")
    config.opd.update({"lambdas": (1.0, 1.5), "seeds": (7, 8), **opd})
    return config_module.validate(config)


def grid_at(root, **opd):
    return open_grid(root, ARGUMENTS, config_of(**opd))


def test_a_grid_has_its_own_lambdas_and_takes_no_recommendation(tmp_path):
    with pytest.raises(
        UserError, match="opd.recommend=True: a grid trains the λ of opd.lambdas; leave it off"
    ):
        grid_at(tmp_path, recommend=True)


def test_a_grid_predicts_nothing(tmp_path):
    """Its common stages have no λ to predict, and each point has one."""
    config = fashion.get_config("tiny")
    config.predict.anchors = (1.2, 1.4)
    with pytest.raises(UserError, match="section predict: a point of a grid would predict its own λ alone"):
        open_grid(tmp_path, ARGUMENTS, config_module.validate(config))


def ran(grid, name):
    """How often the program ran for a stage."""
    return len((grid.workdir(name) / "runs").read_text())


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory, pretender):
    grid = grid_at(tmp_path_factory.mktemp("once") / "grid")
    assert [point.run(grid, name, pretender) for name in (COMMON, *NAMES)] == [0] * 5
    return grid


@pytest.fixture
def finished(tmp_path, finished_once):
    """A grid of four points, all done."""
    shutil.copytree(finished_once.root, tmp_path / "grid", symlinks=True)
    return read_grid(tmp_path / "grid")


# --- the grid ---


def test_points_are_lambdas_times_seeds_in_the_order_of_one_run(tmp_path):
    assert grid_at(tmp_path).names == NAMES


def test_each_stage_gets_its_own_grid_and_nothing_of_the_whole_one(tmp_path):
    """ml_collections appends to a tuple that is given twice."""
    grid = grid_at(tmp_path)
    common, one = grid.main_arguments(COMMON), grid.main_arguments(NAMES[1])
    assert [x for x in common if "opd.lambdas" in x] == ["--config.opd.lambdas=()"]
    assert "--config.forecast.lambdas=(1.0,1.05,1.15,1.25,1.4,1.5,2.0)" in common
    assert [x for x in one if "opd." in x] == ["--config.opd.lambdas=(1.5,)", "--config.opd.seeds=(7,)"]
    assert one[0] == "--config=configs/fashion.py:tiny"
    assert one[-1] == f"--workdir={tmp_path}/points/lambda1.5_seed7"


def test_main_takes_what_a_stage_gets(tmp_path):
    grid = grid_at(tmp_path)
    code = "import sys; from listopd_jax import main; c, _ = main.parse(sys.argv); print(c.opd.lambdas, c.opd.seeds)"
    for name, shown in ((COMMON, "() (7, 8)"), (NAMES[0], "(1.0,) (7,)")):
        command = [sys.executable, "-c", code, *grid.main_arguments(name)]
        result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == shown


def test_a_folder_of_another_grid_is_refused(tmp_path):
    grid_at(tmp_path)
    with pytest.raises(UserError, match="holds a grid with opd.clip=5.0, not 3.0; choose another --root"):
        grid_at(tmp_path, clip=3.0)
    assert grid_at(tmp_path, lambdas=(1.0, 1.5, 2.0)).names[2] == "lambda2.0_seed7"
    assert len(read_grid(tmp_path).points) == 6


@pytest.mark.parametrize("text", ["[]", "{}", '{"arguments": [], "config": {"opd": 3}}', "{"])
def test_a_broken_record_is_refused(tmp_path, text):
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UserError, match="grid.json: not "):
        grid_at(tmp_path)


def test_the_workdir_of_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the workdir of a run, not of a grid"):
        grid_at(tmp_path)


def test_an_empty_grid_is_refused(tmp_path):
    with pytest.raises(UserError, match="a grid has at least one λ"):
        grid_at(tmp_path, lambdas=())


# --- a point ---


def test_what_is_done_is_not_done_again(finished, pretender):
    assert point.run(finished, NAMES[0], pretender) == point.run(finished, COMMON, pretender) == 0
    assert (
        ran(finished, COMMON) == 1 and ran(finished, NAMES[0]) == 2
    )  # its workdir began with that of the first
    assert finished.pending() == []


def test_a_point_starts_from_the_common_stages(finished):
    workdir = finished.workdir(NAMES[0])
    records = json.loads((workdir / "results.json").read_text())
    assert [r["stage"] for r in records] == ["sft_teacher", "sft_student", *["forecast"] * 7, "opd"]
    assert not (workdir / "export").exists()
    assert os.readlink(workdir / "checkpoints" / "sft_teacher") == "../../../common/checkpoints/sft_teacher"
    assert (workdir / "checkpoints" / "sft_teacher" / "5").exists()
    assert [x.name for x in (finished.root / "points").iterdir() if x.name.startswith(".")] == []


def test_a_point_waits_for_the_common_stages(tmp_path, pretender):
    grid = grid_at(tmp_path / "grid")
    with pytest.raises(UserError, match="the common stages are not done"):
        point.run(grid, NAMES[0], pretender)
    assert grid.state(NAMES[0]).word == "failed" and not grid.workdir(NAMES[0]).exists()


def test_a_new_lambda_is_forecast_once_more_and_old_points_stay(finished, pretender):
    grid = grid_at(finished.root, lambdas=(1.0, 1.5, 3.0))
    assert not grid.done(COMMON) and grid.pending() == ["lambda3.0_seed7", "lambda3.0_seed8"]
    assert [point.run(grid, name, pretender) for name in (COMMON, *grid.pending())] == [0, 0, 0]
    assert ran(grid, COMMON) == 2 and grid.pending() == []


@pytest.mark.parametrize(
    ("trouble", "code", "state"),
    [
        ("mistake", 2, ("failed", "error: data.path: no such file")),
        ("kill", 137, ("failed", "killed by SIGKILL; last said: working")),
        ("stop", 75, ("stopped", "saved at step 3; the same command resumes from there")),
    ],
)
def test_how_a_point_ended_is_kept_and_it_runs_again(tmp_path, pretender, trouble, code, state):
    grid = grid_at(tmp_path / "grid")
    point.run(grid, COMMON, pretender)
    (grid.root / "points").mkdir()
    (grid.root / "points" / trouble).touch()
    assert point.run(grid, NAMES[0], pretender) == code
    assert grid.state(NAMES[0]) == state
    (grid.root / "points" / trouble).unlink()
    assert point.run(grid, NAMES[0], pretender) == 0
    assert grid.state(NAMES[0]).word == "done"
    assert (grid.root / "logs" / f"{NAMES[0]}.log").read_text().count("working") == 2


def test_other_hosts_keep_their_own_log_and_no_status(tmp_path, pretender, monkeypatch):
    grid = grid_at(tmp_path / "grid")
    point.run(grid, COMMON, pretender)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert point.run(grid, NAMES[0], pretender) == 0
    assert (grid.root / "logs" / f"{NAMES[0]}.host3.log").exists()
    assert not (grid.root / "status" / f"{NAMES[0]}.json").exists()


def test_a_grid_may_be_moved(finished, tmp_path):
    shutil.move(finished.root, tmp_path / "elsewhere")
    grid = read_grid(tmp_path / "elsewhere")
    assert (grid.workdir(NAMES[0]) / "checkpoints" / "sft_teacher" / "5").exists() and grid.pending() == []


WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))
print('up', flush=True)
while True: time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_as_sigterm_and_its_last_words_are_heard(tmp_path, number):
    code = f"import pathlib, sys; from launch import point; print(point.logged([sys.executable, '-c', {WAITS!r}], "
    code += f"pathlib.Path({str(tmp_path / 'log')!r})))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "saved\n(0, ['up', 'saved'])\n"
    assert (tmp_path / "log").read_text() == "up\nsaved\n"


# --- local processes ---


def test_n_at_a_time_and_1_if_any_failed(tmp_path):
    code = "import sys, time; t = time.monotonic(); time.sleep(0.3); print(t, time.monotonic(), file=sys.stderr); "
    commands = {f"p{i}": [sys.executable, "-c", code + f"sys.exit({int(i == 1)})"] for i in range(5)}
    assert local.run_all(commands, 2, tmp_path) == 1
    spans = [tuple(map(float, (tmp_path / f"p{i}.log").read_text().split())) for i in range(5)]
    alive = [sum(start <= t < end for start, end in spans) for t, _ in spans]
    assert max(alive) <= 2
    del commands["p1"]
    assert local.run_all(commands, 2, tmp_path) == 0


def test_sigterm_stops_what_runs_and_starts_no_more(tmp_path):
    waits = WAITS.replace("print('up'", "print('up', file=sys.stderr")  # into its log
    commands = {name: [sys.executable, "-c", waits] for name in "abc"}
    code = f"import pathlib; from launch import local; print('go', flush=True); print(local.run_all({commands!r}, 2, "
    code += f"pathlib.Path({str(tmp_path)!r})))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "go\n"
    while sum("up" in log.read_text() for log in tmp_path.glob("*.log")) < 2:
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert out == "143\n" and not (tmp_path / "c.log").exists()
    assert sorted(line.split(":")[0] for line in err.splitlines()) == ["a", "b"]


# --- gathering ---


def gathered(grid):
    return gather.gather(grid), {
        name: (grid.root / name).read_bytes()
        for name in ("results.json", "metrics.jsonl", "completions.jsonl", "config.json", "report.html")
    }


def run_gather(grid, capsys):
    code = gather.main([f"--root={grid.root}"])
    return code, capsys.readouterr()


def test_a_grid_gathers_into_the_records_of_one_run_and_always_the_same_bytes(finished, capsys):
    assert run_gather(finished, capsys)[0] == 0
    records = json.loads((finished.root / "results.json").read_text())
    assert [r["stage"] for r in records[:9]] == ["sft_teacher", "sft_student", *["forecast"] * 7]
    assert [(r["lambda"], r["seed"]) for r in records[9:]] == [(1.0, 7), (1.5, 7), (1.0, 8), (1.5, 8)]
    rows = [json.loads(line) for line in (finished.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["sft_teacher", "sft_student", *["opd"] * 4]
    said = [json.loads(line) for line in (finished.root / "completions.jsonl").read_text().splitlines()]
    assert [(row["lambda"], row["seed"]) for row in said] == [(1.0, 7), (1.5, 7), (1.0, 8), (1.5, 8)]
    saved = json.loads((finished.root / "config.json").read_text())
    assert saved["config"]["opd"]["lambdas"] == [1.0, 1.5] and saved["notes"] == []
    first = gathered(finished)[1]
    assert run_gather(finished, capsys)[0] == 0 and gathered(finished)[1] == first


def spoil(grid, how):
    """Break the second point; returns what must be said of it."""
    workdir = grid.workdir(NAMES[1])
    results = workdir / "results.json"
    if how == "absent":
        shutil.rmtree(workdir)
        return "waiting: was done; what it left is gone"
    if how == "broken":
        results.write_text("[{")
        return "results.json: not readable as JSON"
    if how == "without its record":
        results.write_text(json.dumps(json.loads(results.read_text())[:-1]))
        return "has no record of this point"
    if how == "not a number":
        results.write_text(results.read_text().replace('"parse": 0.5', '"parse": "high"'))
        return "field 'parse' must be a finite number or null"
    results.write_text(results.read_text().replace('"steps": 0', '"steps": 99'))
    return "resumes from other models"


@pytest.mark.parametrize("how", ["absent", "broken", "without its record", "not a number", "other models"])
def test_a_missing_or_broken_point_is_named_and_the_others_are_gathered(finished, capsys, how):
    says = spoil(finished, how)
    code, printed = run_gather(finished, capsys)
    assert code == 1 and printed.out.startswith("3 of 4 points; report: ")
    (line,) = [line for line in printed.err.splitlines() if line.startswith("missing: ")]
    assert NAMES[1] in line and says in line
    assert f"{NAMES[1]} is missing" in (finished.root / "report.html").read_text()
    assert len(json.loads((finished.root / "results.json").read_text())) == 9 + 3


def test_the_last_words_of_a_failed_point_are_in_the_report(tmp_path, pretender, capsys):
    grid = grid_at(tmp_path / "grid")
    point.run(grid, COMMON, pretender)
    (grid.root / "points").mkdir()
    (grid.root / "points" / "mistake").touch()
    point.run(grid, NAMES[0], pretender)
    code, printed = run_gather(grid, capsys)
    assert code == 1 and f"missing: {NAMES[0]}: failed: error: data.path: no such file" in printed.err
    assert f"missing: {NAMES[3]}: waiting" in printed.err


def test_points_that_left_the_grid_are_named(finished, capsys):
    grid = grid_at(finished.root, lambdas=(1.0,))
    code, printed = run_gather(grid, capsys)
    assert code == 0 and printed.out.startswith("2 of 2 points")
    assert [line.split("/")[-1].split(":")[0] for line in printed.err.splitlines()] == [NAMES[1], NAMES[3]]


def test_a_grid_that_has_grown_is_gathered_as_far_as_it_goes(finished, capsys):
    grid = grid_at(finished.root, lambdas=(1.0, 1.5, 3.0))
    code, printed = run_gather(grid, capsys)
    assert code == 1 and printed.out.startswith("4 of 6 points")
    missing = [line.split(": ")[1] for line in printed.err.splitlines()]
    assert missing == [COMMON, "lambda3.0_seed7", "lambda3.0_seed8"]


def test_other_code_is_noted(finished, capsys):
    path = finished.workdir(NAMES[2]) / "config.json"
    path.write_text(path.read_text()[:-1] + ', "resumed": [{"revision": "r2"}]}')
    run_gather(finished, capsys)
    assert json.loads((finished.root / "config.json").read_text())["notes"] == [
        "Some points ran with other code than the common stages: r2"
    ]


def test_a_broken_record_of_the_common_stages_is_named(finished):
    (finished.workdir(COMMON) / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: not the record of a run"):
        gather.main([f"--root={finished.root}"])


def test_nothing_to_gather(tmp_path):
    with pytest.raises(UserError, match="holds no grid"):
        gather.main([f"--root={tmp_path}"])
    grid_at(tmp_path)
    with pytest.raises(UserError, match="the common stages are waiting"):
        gather.main([f"--root={tmp_path}"])


# --- mistakes on the command line ---


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (local, ["--root=x"], "the following arguments are required: --config"),
        (
            local,
            ["--config=x", "--root=y", "--processes=0"],
            "argument --processes: '0' is not a whole number of at least 1",
        ),
        (local, ["--config=x", "--root=y", "--proceses=2"], "'--proceses=2' is not known"),
        (local, ["--config=x", "--root=y", "--config.opd.lr", "3"], "'--config.opd.lr' is not known"),
        (point, ["--config=x", "--root=y"], "the following arguments are required: --name"),
        (gather, ["--root=x", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_a_wrong_argument_is_one_line(module, arguments, says):
    with pytest.raises(UserError, match=re.escape(says)):
        module.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["launch.local", "--config=configs/fashion.py:tiny", "--config.opd.lamdas=1.0"],
            "did you mean lambdas?",
        ),
        (
            ["launch.point", "--name=lambda9.0_seed0", "--config=configs/fashion.py:tiny"],
            "is not a point of this grid",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, says):
    command = [sys.executable, "-m", *arguments, f"--root={tmp_path}/grid"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("preset ")]
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


def test_a_root_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        grid_at(tmp_path / "file" / "grid")


def test_states_are_listed(finished, capsys):
    cli.list_states(finished, skip=NAMES[:2])
    assert capsys.readouterr().err == f"common: done\n{NAMES[2]}: done\n{NAMES[3]}: done\n"


# --- the real job ---


@pytest.mark.slow
def test_a_grid_of_processes_finds_what_one_run_finds(finished_job, tmp_path):
    """At one of its λ, the same records, to the last digit, and the same rows but for the clock."""
    root = tmp_path / "grid"
    flags = [*NO_LAMBDA, "--config.opd.lambdas=2.0,", "--config.forecast.lambdas=1.0,"]
    for arguments in (
        ["launch.local", "--config=configs/fashion.py:tiny", f"--root={root}", "--processes=2", *flags],
        ["launch.gather", f"--root={root}"],
    ):
        result = run_command([sys.executable, "-m", *arguments])
        assert result.returncode == 0, result.stderr[-2000:]
    noise = [json.loads((folder / "data.json").read_text())["noise"] for folder in (root, finished_job)]
    assert noise[0] == noise[1] == {"teacher": {"truncate": 0.22}, "student": {"duplicate_id": 0.53}}
    for name in ("calibration.json", "recommendation.json"):
        assert (root / name).read_bytes() == (finished_job / name).read_bytes(), name

    def of_both(rows):
        """Those of the stages that the grid has too, without the clock."""
        kept = [row for row in rows if (row["stage"], row["lambda"]) != ("opd", 1.0)]
        return json.dumps([{k: v for k, v in row.items() if k != "tokens_per_second"} for row in kept])

    for name in ("results.json", "examples.json"):
        ours, whole = (json.loads((folder / name).read_text()) for folder in (root, finished_job))
        assert json.dumps(ours) == of_both(whole) and len(ours) < len(whole), name
    ours, whole = (map(json.loads, (f / "metrics.jsonl").open()) for f in (root, finished_job))
    assert of_both(ours) == of_both(whole)
