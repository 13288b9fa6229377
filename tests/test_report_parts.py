"""What the report adds to the records: a recommendation, one answer token by token, first passages, other runs."""

import json
import math
import shutil

import pytest
from browser import FAINT, OVERLAPS, WIDER, chromium, opened
from hypothesis import given
from hypothesis import strategies as st
from test_report import CLIFF, HOSTILE, Page, calibration, full, metric_rows, read, record, sweep

from listopd_jax.errors import UserError
from listopd_jax.records import Result
from listopd_jax.report.__main__ import main
from listopd_jax.report.beside import differences
from listopd_jax.report.findings import CONTRACT_HOLDS
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.passage import first_passage
from listopd_jax.report.recommendation import choose, recommendation
from listopd_jax.report.strip import BANDS, band
from listopd_jax.report.write import write_report

LONG = {1.0: (0.5, 0.85, 0.94), 1.2: (0.6, 0.9, 0.88), 1.4: (0.81, 0.5, 0.2)}
"""λ -> parse at steps 14, 28 and 42."""
STRIP = [
    {"text": "[{", "class": "bracket", "p": 0.999, "b": 0.9, "flip": None},
    {"text": HOSTILE, "class": "id", "p": 0.9, "b": 0.5, "flip": 1.05},
    {"text": " 7", "class": "digit", "p": 0.4, "b": 0.3, "flip": 1.7},
]


def on_the_way(**last):
    """Records of an SFT pair and of OPD, evaluated on its way; `last` are more fields of those of the end."""
    steps = (14, 28, 42)
    rows = [
        record("opd", lam, p, steps=n)
        for lam, parses in LONG.items()
        for n, p in zip(steps, parses, strict=True)
    ]
    return sweep({}) + [
        row | {"run": f"opd{row['lambda']}"} | (last if row["steps"] == 42 else {}) for row in rows
    ]


def said(records, **config):
    inputs = Inputs(results=read(records), config={"config": {"opd": config}})
    return " ".join(f"{advice.text} {advice.flags}" for advice in recommendation(inputs))


# ---- the recommendation


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.2)), min_size=1, max_size=6))
def test_what_is_recommended_keeps_the_contract_and_no_smaller_lambda_does_as_well(cases):
    records = [record("opd", 1 + 0.1 * i, parse, width=width) for i, (parse, width) in enumerate(cases)]
    found = Inputs(results=read(records)).found
    chosen = choose(found)
    held = [p for p in found.opd if p.mean("parse") >= CONTRACT_HOLDS]
    assert (chosen is None) == (not held)
    if held:
        best = max(held, key=lambda p: p.mean("useful"))
        assert chosen.mean("useful") >= best.interval("useful")[0]
        assert all(p.mean("useful") < best.interval("useful")[0] for p in held if p.lam < chosen.lam)


def test_it_says_which_policy_to_use_and_how_to_go_past_a_cliff():
    text = said(sweep(CLIFF))
    assert "Use λ\u00a0=\u00a01, policy opd1.00: it parses 94\u00a0% of answers, useful 0.874." in text
    assert "No larger λ is clearly more useful (1.2 tried)" not in text or "1.2" in text
    assert "To go past λ\u00a0=\u00a01.2" in text and "--config.opd.guard.margin=1.25" in text
    assert "--config.opd.seeds=0,1,2" in text and "guard.scope" not in text
    inputs = Inputs(results=read(sweep(CLIFF)), config={"config": {"task": {"name": "reviews"}}})
    flags = [advice.flags for advice in recommendation(inputs)]
    assert "--config.opd.guard.mask=True" in flags


def test_a_guarded_run_is_not_told_to_guard_and_one_without_a_cliff_may_go_further():
    assert "guard.margin" not in said(sweep(CLIFF), guard={"margin": 1.25})
    text = said([*sweep({1.0: 0.95, 1.2: 0.94}), record("opd", 1.0, 0.95, seed=1)])
    assert "No cliff up to λ\u00a0=\u00a01.2" in text and "seeds" not in text and "guard.margin" not in text


def test_nothing_is_recommended_where_nothing_holds_or_nothing_was_distilled():
    assert said(sweep({1.0: 0.5, 1.2: 0.3})).startswith("Use none of these policies")
    assert recommendation(Inputs(results=read(sweep({})))) == []


def test_a_better_step_on_the_way_is_named():
    text = said([*on_the_way(), record("opd", 1.0, 0.99, steps=30) | {"run": "opd1.0"}])
    assert "more useful at step 30 (0.921)" in text and "--steps=best" in text
    assert "--steps=best" not in said(on_the_way())


def test_it_stands_first_on_the_page(tmp_path):
    text = Page(write_report(full(tmp_path / "run")).read_text("utf-8")).text
    assert text.index("Recommendation") < text.index("After SFT") < text.index("Where the contract breaks")


# ---- along one answer


@pytest.mark.parametrize("flip", [None, 0.0, 1.1, 1.1000001, 1.5, 2.0, 7.0])
def test_bands_are_closed_above_and_hold_everything(flip):
    end = BANDS[band(flip)][0]
    assert (math.inf if flip is None else flip) <= end
    assert band(flip) == 0 or flip is None or flip > BANDS[band(flip) - 1][0]


def test_every_token_is_drawn_and_in_the_table_and_hostile_ones_are_text(tmp_path):
    path = full(tmp_path / "run")
    (path / "calibration.json").write_text(json.dumps(calibration(strip=STRIP)))
    text = write_report(path).read_text("utf-8")
    parsed = Page(text)
    assert parsed.tags.count("ol") == 1 and "img" not in parsed.tags
    titles = [value for name, value in parsed.attributes if name == "title"]
    assert titles[0] == "1: [{ (bracket), p 0.9990, b 0.9000, λ_flip never"
    assert titles[2] == "3: ␣7 (digit), p 0.4000, b 0.3000, λ_flip 1.700"
    assert "⟨U+202E⟩" in titles[1] and "0.5000 1.050" in parsed.text
    assert [v for n, v in parsed.attributes if n == "class" and v.startswith("band")][-3:] == [
        "band3",
        "band0",
        "band2",
    ]


def test_a_calibration_of_an_older_version_has_no_strip(tmp_path):
    path = full(tmp_path / "run")
    (path / "calibration.json").write_text(json.dumps(calibration()))
    assert "Along one answer" not in Page(write_report(path).read_text("utf-8")).text


# ---- over the steps


@given(st.lists(st.sampled_from([0.1, 0.79, 0.8, 0.95, None])))
def test_a_first_passage_is_the_first_fall_below_after_it_held(parses):
    records = [Result(stage="opd", steps=n, parse=p) for n, p in enumerate(parses)]
    held = [n for n, p in enumerate(parses) if p is not None and p >= CONTRACT_HOLDS]
    falls = [n for n, p in enumerate(parses) if p is not None and p < CONTRACT_HOLDS and held and n > held[0]]
    assert first_passage(records) == (falls[0] if falls else None)


def test_runs_evaluated_on_their_way_have_their_curves_best_steps_and_passages(tmp_path):
    path = full(tmp_path / "run", results=on_the_way(collapsed_at=[30]))
    text = write_report(path).read_text("utf-8")
    assert (
        "First passages, share of runs" in text and "Useful of held-out answers over training steps" in text
    )
    rows = Page(text).text.split("Best steps and first passages")[1]
    assert "λ = 1.2 28 0.837 0.818 –" in rows and "λ = 1.4 14 0.753 0.186 28" in rows
    final = Page(text).text.split("Every run")[0]
    assert "OPD, λ = 1.4 0.200" in final and "OPD, λ = 1.4 0.500" not in final


def test_runs_evaluated_at_their_end_alone_have_none(tmp_path):
    assert "First passages" not in write_report(full(tmp_path / "run")).read_text("utf-8")


# ---- next to other runs


def guarded(tmp_path):
    """A plain run, and one that differs in the guard and its grid."""
    plain, guard = full(tmp_path / "plain"), full(tmp_path / "guard", results=sweep({1.0: 0.94, 1.4: 0.91}))
    config = json.loads((plain / "config.json").read_text())
    config["config"]["opd"] |= {"guard": {"margin": 1.25}, "seeds": [5]}
    (guard / "config.json").write_text(json.dumps(config))
    return plain, guard


def test_the_guarded_run_stands_beside_the_plain_one(tmp_path, capsys):
    plain, guard = guarded(tmp_path)
    main([str(plain), "--beside", str(guard)])
    assert capsys.readouterr().out.strip() == str(plain / "report.html")
    text = Page((plain / "report.html").read_text("utf-8")).text
    assert "Guarded vs. plain" in text and "guard differs in opd.guard.margin." in text
    assert "this run, plain 1.4 1 0.200" in text and "guard, guard 1.25 1.4 1 0.910" in text


def test_a_run_under_a_mask_is_not_called_plain(tmp_path):
    plain, guard = guarded(tmp_path)
    config = json.loads((guard / "config.json").read_text())
    config["config"]["opd"]["guard"] = {"margin": 0.0, "mask": True}
    (guard / "config.json").write_text(json.dumps(config))
    records = json.loads((guard / "results.json").read_text())
    (guard / "results.json").write_text(
        json.dumps([r | ({"guard": "mask=True"} if r["stage"] == "opd" else {}) for r in records])
    )
    main([str(plain), "--beside", str(guard), f"--out={tmp_path / 'page.html'}"])
    text = (tmp_path / "page.html").read_text()
    assert "guard, guard mask=True" in text and "guard, plain" not in text


def test_other_differences_are_named_and_the_title_says_no_guard(tmp_path):
    plain, guard = guarded(tmp_path)
    config = json.loads((guard / "config.json").read_text())
    config["config"]["opd"]["lr"] = 1e-3
    (guard / "config.json").write_text(json.dumps(config))
    main([str(plain), "--beside", str(guard), f"--out={tmp_path / 'page.html'}"])
    text = Page((tmp_path / "page.html").read_text("utf-8")).text
    assert "Next to other runs" in text and "guard differs in opd.guard.margin, opd.lr." in text


def test_equal_configs_do_not_differ_and_two_folders_of_one_name_are_refused(tmp_path):
    plain, guard = guarded(tmp_path)
    same = Inputs(config=json.loads((plain / "config.json").read_text()))
    assert differences(same, {"b": same}) == {"b": []}
    (tmp_path / "more").mkdir()
    shutil.copytree(guard, tmp_path / "more" / "guard")
    with pytest.raises(UserError, match="--beside: two folders"):
        main([str(plain), "--beside", str(guard), str(tmp_path / "more" / "guard")])


# ---- in a browser


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The address of a report with every section, hostile texts among them."""
    path = full(
        tmp_path_factory.mktemp("everything") / "run",
        results=[*on_the_way(collapsed_at=[30]), record("forecast", 1.2, 0.7, steps=0)],
        metrics=metric_rows(list(LONG), (0, 1), steps=42),
    )
    (path / "calibration.json").write_text(json.dumps(calibration(strip=STRIP * 9)))
    other = guarded(tmp_path_factory.mktemp("others"))[1]
    main([str(path), "--beside", str(other)])
    return f"file://{path}/report.html"


@pytest.mark.slow
def test_in_a_browser_the_report_fits_reads_and_asks_nobody(everything):
    with chromium() as browser:
        for width in (360, 1200):
            for scheme in ("light", "dark"):
                with opened(browser, everything, width, scheme) as page:
                    assert page.evaluate(WIDER) == [] and page.evaluate(OVERLAPS) == []
                    assert page.evaluate(FAINT) == []
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_in_a_browser_a_click_on_a_head_sorts_and_another_turns_it_round(everything):
    values = "() => [...document.querySelectorAll('#policies table tbody')][0].innerText"
    column = "rows => rows.map(row => row.cells[1].firstChild.textContent)"
    with chromium() as browser, opened(browser, everything) as page:
        assert page.evaluate(values)
        rows = page.locator("#policies table").first.locator("tbody tr")
        head = page.locator("#policies table").first.locator("thead th").nth(1)
        before = rows.evaluate_all(column)
        head.locator("button").click()
        assert rows.evaluate_all(column) == sorted(before, key=float, reverse=True)
        assert head.get_attribute("aria-sort") == "descending"
        head.locator("button").press("Enter")
        assert rows.evaluate_all(column) == sorted(before, key=float)


@pytest.mark.slow
def test_in_a_browser_paper_is_white_and_shows_whole_tables(everything):
    with chromium() as browser, opened(browser, everything, scheme="dark") as page:
        page.emulate_media(media="print")
        assert (
            page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()")
            == "#fff"
        )
        assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert len(page.pdf(format="A4")) > 20_000
