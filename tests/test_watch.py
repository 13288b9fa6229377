"""The page that watches runs: what it says, that it only reads, and that neither paths nor model output get through."""

import contextlib
import dataclasses
import http.client
import json
import os
import threading
import time

import pytest
from browser import FAINT, OVERLAPS, WIDER, chromium, opened

from listopd_jax.errors import UserError
from listopd_jax.lifecycle import locked
from listopd_jax.metrics_log import MetricsLog
from listopd_jax.records import CALIBRATION, RESULTS, RUNS, Planned, Result, write_records
from listopd_jax.watch.__main__ import main
from listopd_jax.watch.server import Server
from listopd_jax.watch.state import page_state

HOSTILE = (
    "</pre></script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\u202e\x1b[2J"
)
SFT = [
    Planned(run=f"sft_{role}", stage=f"sft_{role}", seed=0, steps=4, extra={})
    for role in ("teacher", "student")
]


def opd(lam, steps=6):
    return Planned(run=f"opd_lambda{lam}_seed0", stage="opd", lam=lam, seed=0, steps=steps)


PLAN = [*SFT, opd(1.0), opd(1.2)]


def judged(plan, parse=0.75):
    head = {"run": plan.run, "stage": plan.stage, "lam": plan.lam, "seed": plan.seed, "steps": plan.steps}
    return Result(**head, n=8, parse=parse, useful=parse / 2, ndcg_1=0.5)


def workdir(path, *, plan=PLAN, trained=(), done=0, output="[]"):
    """A workdir in which the first `done` of `plan` are evaluated; `trained` are (planned run, steps logged)."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    write_records(path / RUNS, plan)
    write_records(path / RESULTS, [judged(one) for one in plan[:done]])
    for one, steps in [*((one, one.steps) for one in plan[:done]), *trained]:
        with MetricsLog(path, one.run, one.stage, {"lambda": one.lam, "seed": one.seed}) as log:
            for step in range(1, steps + 1):
                log.log(step, {"loss": 1 / step, "parse": 0.5, "reverse_kl": 0.1 * step})
            log.completions(steps, [{"failure": "no_json", "output": output, "prompt": output}])
    return path


def entry(root, name="."):
    return next(one for one in page_state(root)["workdirs"] if one["name"] == name)


# ---- what it says


@pytest.mark.parametrize(
    ("done", "trained", "calibrated", "said"),
    [
        (0, [], False, "training SFT teacher"),
        (1, [(SFT[1], 4)], False, "evaluating SFT student"),
        (2, [], False, "calibrating"),
        (2, [], True, "forecasting"),
        (2, [(opd(1.0), 3)], True, "training OPD, λ\u00a0=\u00a01, seed 0"),
        (4, [], True, "writing the report"),
    ],
)
def test_the_stage_is_read_off_the_files(tmp_path, done, trained, calibrated, said):
    path = workdir(tmp_path / "run", done=done, trained=trained)
    if calibrated:
        (path / CALIBRATION).write_text("{}")
    with locked(path):
        found = entry(path)
    assert (found["state"], found["stage"]) == ("running", said)
    assert entry(path)["state"] == "stopped"


@pytest.mark.parametrize(
    ("done", "steps", "said"),
    [(2, 0, "forecasting"), (2, 3, "training anchor run, λ\u00a0=\u00a01.2, seed 1")],
)
def test_anchor_runs_come_after_the_forecast(tmp_path, done, steps, said):
    anchor = Planned(run="anchor_lambda1.2_seed1", stage="anchor", lam=1.2, seed=1, steps=6)
    path = workdir(tmp_path / "run", plan=[*SFT, anchor, opd(1.0)], done=done, trained=[(anchor, steps)])
    (path / CALIBRATION).write_text("{}")
    with locked(path):
        assert entry(path)["stage"] == said


def test_a_run_is_done_when_all_is_evaluated_and_the_report_is_there(tmp_path):
    path = workdir(tmp_path / "run", done=4)
    (path / "report.html").write_text("<p>report</p>")
    found = entry(path)
    assert (found["state"], found["done"], found["total"]) == ("done", 20, 20)
    assert [run["parse"] for run in found["runs"]] == [0.75] * 4


def test_time_left_is_that_of_the_steps_of_the_stage_at_the_pace_of_the_run(tmp_path):
    path = workdir(tmp_path / "run", done=2, trained=[(opd(1.0), 4)])
    (folder := path / "tensorboard" / opd(1.0).run).mkdir(exist_ok=True)
    began = int((path / "metrics.jsonl").stat().st_mtime) + 1000
    (folder / f"events.out.tfevents.{began}.host.from2").touch()  # resumed after step 2
    os.utime(path / "metrics.jsonl", (began + 20, began + 20))  # and 2 steps took 20 s
    with locked(path):
        assert entry(path)["eta"] == pytest.approx(10 * (2 + 6))
    assert entry(path)["eta"] is None


def test_looking_keeps_no_run_out_and_changes_nothing(tmp_path):
    path = workdir(tmp_path / "run", done=1)
    (path / ".lock").touch()

    def tree():
        return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in path.rglob("*")}

    before, stop = tree(), threading.Event()
    looking = threading.Thread(target=lambda: [page_state(path) for _ in iter(stop.is_set, True)])
    looking.start()
    try:
        for _ in range(50):
            with locked(path):
                time.sleep(0.001)
    finally:
        stop.set()
        looking.join()
    assert {p: b for p, (_, b) in tree().items()} == {p: b for p, (_, b) in before.items()}
    assert tree().keys() == before.keys()


def test_a_launch_shows_what_waits_and_why_points_failed(tmp_path):
    config = {"opd": {"lambdas": [1.0, 1.2, 1.4], "seeds": [0]}}
    (tmp_path / "status").mkdir()
    (tmp_path / "grid.json").write_text(json.dumps({"arguments": [], "config": config}))
    for lam in (1.2, 1.4):
        status = {"word": "failed", "why": f"error: disk full {lam}"}
        (tmp_path / "status" / f"lambda{lam}_seed0.json").write_text(json.dumps(status))
    workdir(tmp_path / "common", plan=SFT, done=2)
    workdir(tmp_path / "points" / "lambda1.2_seed0", plan=[*SFT, opd(1.2)], done=2, trained=[(opd(1.2), 3)])
    found = {one["name"]: one for one in page_state(tmp_path)["workdirs"]}
    states = {name.split("/")[-1]: one["state"] for name, one in found.items()}
    wanted = {"lambda1.0_seed0": "waiting", "lambda1.2_seed0": "failed", "lambda1.4_seed0": "failed"}
    assert states | wanted == states
    assert found["points/lambda1.2_seed0"]["why"] == "error: disk full 1.2"
    assert [run["state"] for run in found["points/lambda1.2_seed0"]["runs"]] == ["done", "done", "failed"]


def test_the_curves_of_a_launch_are_those_of_all_its_points_once(tmp_path):
    workdir(tmp_path / "common", plan=SFT, done=2)
    for lam in (1.0, 1.2):
        workdir(tmp_path / "points" / f"lambda{lam}_seed0", plan=[*SFT, opd(lam)], done=3)
    state = page_state(tmp_path, "common")
    figures = {(f["stage"], f["metric"]): [curve["label"] for curve in f["curves"]] for f in state["curves"]}
    assert figures["sft", "loss"] == ["SFT teacher", "SFT student"]
    assert [label[5:12] for label in figures["opd", "parse"]] == ["λ\u00a0=\u00a01, ", "λ\u00a0=\u00a01.2"]
    assert len(state["results"]) == 4


def test_a_workdir_of_an_older_version_and_an_empty_folder_are_shown(tmp_path):
    path = workdir(tmp_path / "run", done=4)
    (path / RUNS).unlink()
    (path / "report.html").write_text("")
    assert entry(tmp_path, "run")["state"] == "done"
    (tmp_path / "empty").mkdir()
    assert page_state(tmp_path / "empty")["workdirs"] == []


@pytest.mark.parametrize("name", [RUNS, RESULTS, "metrics.jsonl"])
def test_a_broken_file_is_one_line_beside_the_others(tmp_path, name):
    workdir(tmp_path / "a", done=2)
    (workdir(tmp_path / "b", done=2) / name).write_text("{\n{}\n")
    assert entry(tmp_path, "a")["state"] == "stopped"
    assert entry(tmp_path, "b")["state"] == "broken" and name in entry(tmp_path, "b")["why"]


# ---- the server


@contextlib.contextmanager
def serving(root):
    with Server(root, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path, method="GET", host="127.0.0.1", body=None, port=True):
    """(status, headers, text) of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection(*server.server_address)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"{host}:{server.server_address[1]}" if port else host)
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


@pytest.fixture
def secret(tmp_path):
    """A root with one finished run, and next to it files that nobody may read."""
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "report.html").write_text("SECRET")
    (tmp_path / "outside" / "config.json").write_text('{"SECRET": 1}')
    path = workdir(tmp_path / "root" / "run", done=4)
    (path / "report.html").write_text("<p>our report</p>")
    return tmp_path / "root"


def test_it_serves_its_page_its_state_and_reports_with_a_policy(secret):
    with serving(secret) as server:
        for path in ("/", "/watch.js", "/watch.css", "/state.json", "/report?workdir=run", "/none"):
            status, headers, text = ask(server, path)
            assert status == (404 if path == "/none" else 200)
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert ask(server, path, "HEAD")[2] == ""
        assert "our report" in ask(server, "/report?workdir=run")[2]
        assert "sandbox" in ask(server, "/report?workdir=run")[1]["Content-Security-Policy"]
        assert server.server_address[0] == "127.0.0.1"


TRAVERSALS = """
/../secret.txt /%2e%2e/secret.txt /..%2fsecret.txt //etc/passwd /watch.js/../../secret.txt /run/report.html
/report?workdir=.. /report?workdir=../outside /report?workdir=%2e%2e/outside /report?workdir=run/../../outside
/report?workdir=/etc /report?workdir= /report?workdir=linked /report?workdir=run%00 /report?workdir=run&workdir=..
""".split()


@pytest.mark.parametrize("path", TRAVERSALS[:-1])
def test_no_path_leads_out(secret, path):
    (secret / "linked").symlink_to(secret.parent / "outside", target_is_directory=True)
    with serving(secret) as server:
        status, _, text = ask(server, path)
        assert status == 404 and "SECRET" not in text and "root:" not in text
        assert "SECRET" not in ask(server, f"/state.json{path[path.find('?') :] if '?' in path else ''}")[2]


def test_links_out_of_the_root_are_not_followed(secret):
    for name in ("report.html", RESULTS, "metrics.jsonl"):
        path = workdir(secret / name.replace(".", "_"), done=4)
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(secret.parent / "secret.txt")
    os.mkfifo(workdir(secret / "fifo") / "report.html")
    with serving(secret) as server:
        assert ask(server, "/report?workdir=report_html")[0] == 404
        assert ask(server, "/report?workdir=fifo")[0] == 404
        text = ask(server, "/state.json")[2]
    assert "SECRET" not in text
    states = {one["name"]: one["state"] for one in json.loads(text)["workdirs"]}
    assert states == dict.fromkeys(("report_html", "results_json", "metrics_jsonl", "fifo"), "broken") | {
        "run": "done"
    }


def test_it_takes_no_other_method_and_no_other_name(secret):
    with serving(secret) as server:
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, "/state.json", method)[0] == 501
        for port in (True, False):
            for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1", "::1", "[::2]", "[::1]:x"):
                assert ask(server, "/state.json", host=host, port=port)[0] == 403, host
            for host in ("localhost", "127.0.0.1", "[::1]"):
                assert ask(server, "/state.json", host=host, port=port)[0] == 200, host


def test_mistakes_are_one_line(secret, capsys):
    with (
        serving(secret) as server,
        pytest.raises(UserError, match=f"--port={server.server_address[1]}: .* in use"),
    ):
        main([str(secret), f"--port={server.server_address[1]}"])
    with pytest.raises(UserError, match="no such folder"):
        main([str(secret / "none")])
    with pytest.raises(UserError, match="0 to 65535"):
        main([str(secret), "--port=70000"])


# ---- in a browser


@pytest.mark.slow
def test_in_a_browser_hostile_completions_are_text_and_the_page_fits(tmp_path):
    path = workdir(tmp_path / HOSTILE.split("/")[0] / "run", done=3, trained=[(opd(1.2), 3)], output=HOSTILE)
    other = workdir(tmp_path / "<img src=x onerror=owned=1>", done=4)
    (other / "report.html").write_text(f"<p>report {HOSTILE}</p>")
    with locked(path), serving(tmp_path) as server, chromium() as browser:
        for width in (360, 1200):
            for scheme in ("light", "dark"):
                with opened(browser, server.url, width, scheme) as page:
                    page.wait_for_selector("#completions article")
                    assert page.evaluate("window.owned") is None
                    assert page.locator("img, article script, iframe").count() == 0
                    shown = page.locator("#completions pre").first.text_content()
                    assert "<script>window.owned = 1</script>" in shown and "⟨U+202E⟩⟨U+001B⟩" in shown
                    assert page.evaluate(WIDER) == [] and page.evaluate(OVERLAPS) == []
                    assert page.evaluate(FAINT) == []
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                    assert "training OPD" in page.locator("h1").text_content()


@pytest.mark.slow
def test_in_a_browser_the_page_follows_the_run_and_keeps_what_is_open(tmp_path):
    path = workdir(tmp_path / "run", done=2, trained=[(opd(1.0), 3)])
    with serving(path) as server, chromium() as browser, opened(browser, server.url) as page:
        page.wait_for_selector("#completions article")
        page.locator("#completions summary").first.click()
        write_records(path / RESULTS, [judged(one) for one in PLAN[:3]])
        page.wait_for_selector("#grid td.done")
        assert page.locator("#completions details[open]").count() == 1
        assert "75 %" in page.locator("#grid td.done").text_content()


@pytest.mark.slow
def test_in_a_browser_plain_and_guarded_of_one_lambda_have_cells_of_their_own(tmp_path):
    plain = dataclasses.replace(opd(2.0), run="opd_lambda2.0_plain_seed0")
    guarded = dataclasses.replace(opd(2.0), guard="margin=1.25")
    workdir(tmp_path / "run", plan=[*SFT, plain, guarded], done=3, trained=[(guarded, 2)])
    with serving(tmp_path) as server, chromium() as browser:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#grid td")
        assert page.locator("#grid th[scope=col]").all_text_contents() == ["λ = 2, plain", "λ = 2"]
        found = page.locator("#grid td").all_text_contents()
        assert found[0].startswith("75 %") and found[1].startswith("2 of 6")


@pytest.mark.slow
def test_in_a_browser_a_report_that_somebody_changed_runs_nothing(secret):
    (secret / "run" / "report.html").write_text(
        f"<p>report</p>{HOSTILE}<script>document.title = 'owned'</script>"
    )
    with serving(secret) as server, chromium() as browser:
        page = browser.new_page()
        page.goto(f"{server.url}report?workdir=run")
        assert "report" in page.locator("p").text_content()
        assert page.evaluate("window.owned") is None and page.title() != "owned"


@pytest.mark.slow
def test_a_whole_job_is_done_with_its_completions(finished_job):
    state = page_state(finished_job)
    (found,) = state["workdirs"]
    assert (found["state"], found["stage"], found["report"]) == ("done", "", True)
    assert [run["run"] for run in found["runs"]] == [
        "sft_teacher",
        "sft_student",
        *(f"opd_lambda{x}_seed0" for x in (1.0, 2.0)),
    ]
    assert found["done"] == found["total"] == 4 + 3 + 3 + 3
    assert {one["step"] for one in state["completions"]} == {2}
