"""The report: what it says, what it survives, and that it is one deterministic page that loads nothing."""

import base64
import hashlib
import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from listopd_jax.errors import UserError
from listopd_jax.records import Calibration, results
from listopd_jax.report import findings, plots, script, wording
from listopd_jax.report.findings import FAILURES, headline, sentences
from listopd_jax.report.threshold_section import predicted
from listopd_jax.report.write import write_report
from listopd_jax.stages.positions import Positions
from listopd_jax.stages.thresholds import calibrate
from listopd_jax.task.contract import FAILURES as CONTRACT_FAILURES

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)></svg></style>{{7*7}}$\\frac"
HOSTILE += "\x1b\x00\u202e"
METRICS = ("useful", "ndcg@1", "ndcg@3", "ndcg@5", "ndcg@10", "tau", "mae")


def record(stage, lam, parse, *, seed=0, n=200, ndcg=0.93, steps=42, width=0.04):
    """A record of results.json; `width` is that of half an interval, None for no intervals."""
    ok = round(parse * n)
    values = {name: ndcg * (parse if name == "useful" else 1) if ok else None for name in METRICS}
    values |= {"parse": ok / n, "useful": ndcg * ok / n}
    truncated = (n - ok) * 3 // 4
    failures = {name: 0 for name in CONTRACT_FAILURES}
    failures |= {"ok": ok, "truncated_k_minus_1": truncated, "duplicate_id": n - ok - truncated}
    intervals = {k: None if v is None or width is None else [v - width, v + width] for k, v in values.items()}
    head = {"run": f"{stage}{lam}{seed}", "stage": stage, "lambda": lam, "seed": seed, "steps": steps, "n": n}
    return head | values | {"gain": "linear", "failures": failures, "intervals": intervals}


def read(records):
    return results(records, "these records")


def sweep(parse_at, student=0.3, **kwargs):
    """Records of an SFT pair and of OPD at each λ of {λ: parse}."""
    pair = [record("sft_teacher", None, 0.6), record("sft_student", None, student)]
    return pair + [record("opd", lam, parse, **kwargs) for lam, parse in parse_at.items()]


CLIFF = {1.0: 0.94, 1.2: 0.88, 1.4: 0.2}


def metric_rows(lams, seeds, steps=5):
    sft = [
        {"run": stage, "stage": stage, "lambda": None, "seed": 0, "step": s, "loss": 1 / s}
        | {"tokens_per_second": 900.0}
        for stage in ("sft_teacher", "sft_student")
        for s in range(1, steps + 1)
    ]
    names = ("loss", "reverse_kl", "advantage_structural", "advantage_content", "completion_length", "parse")
    opd = [
        {"run": f"opd{lam}{seed}", "stage": "opd", "lambda": lam, "seed": seed, "step": s}
        | {name: 0.1 * lam + 0.01 * s for name in names}
        for lam in lams
        for seed in seeds
        for s in range(1, steps + 1)
    ]
    return sft + opd


def example(stage, lam, failure, text="[]", scores=None):
    head = {"stage": stage, "lambda": lam, "seed": 0, "key": "k1", "prompt": f"Rank: {text}", "output": text}
    return head | {"failure": failure, "true_scores": [3, 10], "scores": scores}


CONFIG = {
    "config": {"opd": {"lr": 1e-6, "lambdas": [1.0, 1.2]}, "task": {"k": 8}},
    "revision": "0123abcd+changes",
    "command": "python -m listopd_jax.main --config=configs/fashion.py:tiny --workdir=runs/x",
    "versions": {"jax": "0.10.2"},
    "preset": "tiny",
    "device": "cpu",
    "notes": ["K is 8, because the paper's is."],
}
DATA = {
    "source": "synthetic",
    "read": {"usable": 14080, "duplicates": 31},
    "scores": {"train": [5, 0, 7], "validation": [1, 2, 3]},
    "baseline": {"longest first": {"ndcg@1": 0.7012}},
    "fingerprint": "f00d",
    "notes": ["Few lists."],
}


def workdir(path, *, results=None, metrics=None, examples=None, config=None, data=None):
    """A workdir with the given parts."""
    (path / "data").mkdir(parents=True)
    parts = {
        "results.json": results,
        "examples.json": examples,
        "config.json": config,
        "data/report.json": data,
    }
    for name, value in parts.items():
        if value is not None:
            (path / name).write_text(json.dumps(value))
    if metrics is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return path


def full(path, **changes):
    lams = list(CLIFF)
    parts = {
        "results": sweep(CLIFF),
        "metrics": metric_rows(lams, (0,)),
        "examples": [example("opd", 1.0, "ok", scores=[4.0, 9.0]), example("opd", 1.4, "no_json", "?")],
        "config": CONFIG,
        "data": DATA,
    }
    return workdir(path, **parts | changes)


class Page(html.parser.HTMLParser):
    """Elements, text and problems of a page, as an HTML parser sees it."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.open, self.texts, self.balanced = [], [], [], [], [], True
        self.scripts = []
        self.feed(text)
        self.close()
        self.balanced = self.balanced and not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        self.balanced = self.balanced and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)


def page(path):
    return Page(write_report(path).read_text("utf-8"))


@pytest.fixture(scope="module")
def typical(tmp_path_factory):
    path = full(tmp_path_factory.mktemp("typical") / "run")
    return path, write_report(path).read_text("utf-8")


def test_it_says_what_happened_with_every_part(typical):
    text = Page(typical[1]).text
    assert (
        "Distillation lifts parse from 30 % to 94 % at λ = 1; the contract breaks between λ = 1.2 and 1.4"
        in text
    )
    for part in ("K−1 truncation", "Strict parse of the samples", "Reverse KL to the teacher", "SFT loss"):
        assert part in text
    assert "Ends: the share of answers" in text
    for part in ("14,080", "0.7012", "Few lists.", "K is 8, because", "0123abcd+changes", "jax", "0.10.2"):
        assert part in text
    for part in (CONFIG["command"], "opd.lr = 1e-06", "task.k = 8", "Rank: []"):
        assert part in text


def test_every_number_of_every_record_is_there(typical):
    text = Page(typical[1]).text
    for run in sweep(CLIFF):
        for metric in ("parse", *METRICS):
            assert f"{run[metric]:.3f}" in text
            assert (
                f"{run['intervals'][metric][0]:.3f}–{run['intervals'][metric][1]:.3f}".replace("-", "−")
                in text
            )
        for count in run["failures"].values():
            assert f" {count} " in text


def test_the_same_workdir_gives_the_same_bytes(typical):
    path, text = typical
    assert write_report(path).read_text("utf-8") == text


def test_the_page_is_well_formed_loads_nothing_and_runs_its_own_script_alone(typical):
    parsed = Page(typical[1])
    assert parsed.balanced
    assert parsed.scripts == [script.TEXT] and parsed.tags.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(script.TEXT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in script.POLICY
    assert ("content", script.POLICY) in parsed.attributes
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & set(parsed.tags)
    assert len(parsed.ids) == len(set(parsed.ids))
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
            assert value[1:] in parsed.ids
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", typical[1])
    assert not re.search(r"https?:|//\w|@import|url\((?!#)|<!ENTITY|javascript:", without_namespaces)
    assert script.POLICY.startswith("default-src 'none'") and 'name="viewport"' in typical[1]


def test_figures_are_described_and_scale(typical):
    svgs = re.findall(r"<svg.*?</svg>", typical[1], re.DOTALL)
    assert len(svgs) == 2 + 1 + 6 + 1
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("viewBox") and root.get("width") is None
        assert len(root.get("aria-label")) > 40
    assert "OPD, λ\u00a0=\u00a01.4: parse 0.200" in svgs[0]


def test_colours_have_a_dark_counterpart(typical):
    used = set(re.findall(r"var\(--c([0-9a-f]{6})", typical[1]))
    assert used and used <= {light[1:] for light in plots.DARK}
    assert not re.search(
        r"(?<!, )#[0-9a-f]{6}", " ".join(re.findall(r"<svg.*?</svg>", typical[1], re.DOTALL))
    )


def test_hostile_text_is_inert_and_visible(tmp_path):
    record_ = record("opd", 1.0, 0.5) | {"failures": {"ok": 100, HOSTILE: 100}, "gain": HOSTILE}
    stage = record(HOSTILE, 1.1, 0.5)
    path = full(
        tmp_path / "run",
        results=[*sweep(CLIFF), record_ | {"seed": 1}, stage],
        examples=[
            example("opd", 1.0, HOSTILE, HOSTILE) | {"key": HOSTILE},
            example(HOSTILE, None, "ok", HOSTILE),
        ],
        config=CONFIG
        | {"notes": [HOSTILE], "preset": HOSTILE, "config": {HOSTILE: HOSTILE}, "command": HOSTILE},
        data=DATA | {HOSTILE: {HOSTILE: HOSTILE}, "notes": [HOSTILE]},
    )
    parsed = page(path)
    text = parsed.text
    assert parsed.balanced and "img" not in parsed.tags and parsed.scripts == [script.TEXT]
    assert text.count("<script>alert(1)</script>") >= 10 and "{{7*7}}" in text
    assert "⟨U+001B⟩⟨U+0000⟩⟨U+202E⟩" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", write_report(path).read_text("utf-8"))


def test_a_very_long_output_is_cut(tmp_path):
    path = full(tmp_path / "run", examples=[example("opd", 1.0, "no_json", "x" * 10**6 + "END")])
    text = write_report(path).read_text("utf-8")
    assert len(text) < 400_000
    assert "998,503 characters left out" in text and "xEND" in text


def test_examples_show_the_good_and_different_failures(tmp_path):
    kinds = ["ok", "ok", "no_json", "no_json", "duplicate_id"]
    examples = [example("opd", 1.0, kind, f"output {i}") for i, kind in enumerate(kinds)]
    text = page(full(tmp_path / "run", examples=examples)).text
    assert [i for i in range(5) if f"Rank: output {i}" in text] == [0, 2, 4]
    assert "3 of 5 saved outputs" in text


def test_an_empty_workdir_says_so(tmp_path):
    assert "No policy has been evaluated yet" in page(workdir(tmp_path / "run")).text


def test_sft_alone_says_that_opd_is_missing(tmp_path):
    text = page(workdir(tmp_path / "run", results=sweep({}), metrics=metric_rows((), ()))).text
    assert "SFT is done; no distilled policy has been evaluated yet" in text
    assert "SFT loss" in text and "Distillation, step by step" not in text


@pytest.mark.parametrize("part", ["results", "metrics", "examples", "config", "data"])
def test_any_part_may_be_absent(tmp_path, part):
    parsed = page(full(tmp_path / "run", **{part: None}))
    assert parsed.balanced and "None" not in parsed.text and "nan" not in parsed.text.split()


def test_a_policy_without_parsed_lists_shows_dashes(tmp_path):
    bare = {"stage": "opd", "lambda": 1.5, "parse": 0.0}
    text = page(workdir(tmp_path / "run", results=[*sweep({1.0: 0.0}), bare])).text
    assert "No distilled policy parses a single answer" in text
    assert "OPD, λ = 1.5 0.000 – – – – – – – – – –" in text


def test_losses_that_were_not_finite_are_counted(tmp_path):
    rows = metric_rows([1.0], (0,))
    rows[-1]["loss"] = None
    text = page(workdir(tmp_path / "run", metrics=rows)).text
    assert "Not finite at 1 of 5 steps, and left out there: loss." in text


def test_twenty_lambdas_and_five_seeds(tmp_path):
    lams, seeds = [round(0.8 + 0.05 * i, 2) for i in range(20)], (7, 13, 21, 42, 95)
    results = [record("opd", lam, 0.95 if lam < 1.3 else 0.1, seed=seed) for lam in lams for seed in seeds]
    path = workdir(tmp_path / "run", results=results, metrics=metric_rows(lams, seeds, steps=90))
    parsed = page(path)
    assert parsed.balanced and "Mean over seeds ± their standard deviation" in parsed.text
    assert "contract breaks between λ = 1.25 and 1.3" in parsed.text and "5 seeds." in parsed.text
    assert (path / "report.html").stat().st_size < 1_500_000


def test_of_one_seed_only_the_longest_training_counts(tmp_path):
    early = [record("opd", lam, 0.5, steps=14, width=0.01) for lam in CLIFF]
    assert headline(findings.find(read(sweep(CLIFF) + early))) == headline(
        findings.find(read(early + sweep(CLIFF)))
    )
    assert "0.500" in page(workdir(tmp_path / "run", results=sweep(CLIFF) + early)).text


@pytest.mark.parametrize(
    ("records", "says"),
    [
        (sweep(CLIFF), "the contract breaks between λ = 1.2 and 1.4"),
        (sweep({1.0: 0.9, 1.5: 0.92, 2.0: 0.95}), "no cliff up to λ = 2"),
        (sweep({1.0: 0.5, 1.5: 0.4}), "no λ tested keeps the contract in 80 % of answers"),
        (sweep({1.0: 0.5, 1.5: 0.9}), "no cliff up to λ = 1.5"),
        (sweep({1.0: 0.9}), "Distillation lifts parse from 30 % to 90 % at λ = 1"),
        (sweep({1.0: 0.96, 1.5: 0.97}, student=0.97), "already parses 97 %: no headroom"),
        (sweep({1.0: 0.5, 1.5: 0.2}, student=0.7), "lowers parse from 70 % to 50 %, even at its best, λ = 1"),
        (sweep({1.0: 0.34, 1.5: 0.2}), "leaves parse near SFT's 30 %, within the intervals (34 % at λ = 1)"),
        ([record("opd", 1.0, 0.9)], "Distillation parses 90 % of answers at λ = 1"),
        (
            sweep({1.0: 0.34, 1.5: 0.2}, width=None)[2:] + [record("sft_student", None, 0.3, width=None)],
            "lifts parse",
        ),
    ],
)
def test_the_headline_claims_what_the_numbers_allow(records, says):
    assert says in headline(findings.find(read(records))).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("records", "says"),
    [
        (sweep({1.0: 0.9}), "Only one λ was run, so nothing can be said about where the contract breaks."),
        (sweep({1.0: 0.9, 1.2: 0.78}), "still reaches 80 %: the place is uncertain"),
        (sweep({0.5: 0.6, 1.0: 0.9, 1.2: 0.3}), "The curve is not monotone: λ = 0.5 fell short too."),
        (sweep(CLIFF), "At λ = 1.4, 75 % of the answers that fail are of one class: K−1 truncation."),
        (sweep(CLIFF), "what breaks is the format, not the ranking"),
        (sweep(CLIFF), "greedy decoding of 200 held-out records, one seed"),
        (sweep({1.0: 0.5, 1.5: 0.9}), "λ = 1 fell short."),
    ],
)
def test_the_sentences_are_honest(records, says):
    assert says in " ".join(sentences(findings.find(read(records)))).replace("\u00a0", " ")


def test_a_clear_break_is_not_called_uncertain_nor_a_moved_ranking_flat():
    moved = sweep({1.0: 0.9}) + [record("opd", 1.2, 0.3, ndcg=0.6)]
    said = " ".join(sentences(findings.find(read(moved))))
    assert "uncertain" not in said and "not the ranking" not in said and "0.600 and 0.930" in said


def test_every_class_of_the_contract_has_a_name_and_a_colour():
    assert tuple(FAILURES) == CONTRACT_FAILURES == tuple(plots.FAILURE_COLOURS)
    assert len(set(plots.FAILURE_COLOURS.values())) == len(CONTRACT_FAILURES)


@pytest.mark.parametrize("count", [2, 3, 9, 20])
def test_lambda_colours_are_apart_in_lightness(count):
    def lightness(colour):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light = plots.lambda_colours(count)
    for colours in (light, [plots.DARK[colour] for colour in light]):
        shades = [lightness(colour) for colour in colours]
        assert shades == sorted(shades) or shades == sorted(shades, reverse=True)
        assert len(set(colours)) == count


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.json", "{", "results.json"),
        ("results.json", "{}", "must hold a list"),
        ("results.json", "[3]", "record 0: must be an object"),
        (
            "results.json",
            '[{"stage": "opd", "lambda": "1"}]',
            "record 0: field 'lambda' must be a finite number",
        ),
        ("results.json", "[{}]", "record 0: field 'stage' is missing"),
        (
            "results.json",
            '[{"stage": "opd", "parse": NaN}]',
            "not readable as JSON (Out of range float values",
        ),
        (
            "results.json",
            '[{"stage": "opd", "mae": 1' + "0" * 400 + "}]",
            "field 'mae' must be a finite number",
        ),
        (
            "results.json",
            '[{"stage": "opd", "failures": {"ok": -1}}]',
            "'failures' must map names to counts",
        ),
        ("results.json", '[{"stage": "opd", "intervals": {"parse": [1]}}]', "'intervals' must map"),
        ("examples.json", '[{"stage": "opd", "scores": 3}]', "example 0: field 'scores' must be a list"),
        ("config.json", '{"notes": "text"}', "field 'notes' must be a list"),
        ("data/report.json", "[]", "must hold a JSON object"),
        ("metrics.jsonl", "?\n{}\n", "metrics.jsonl:1"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, says):
    path = full(tmp_path / "run")
    (path / name).write_text(content)
    with pytest.raises(UserError) as error:
        write_report(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_workdir_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_wording_of_numbers():
    assert [wording.percent(x) for x in (0.0, 0.001, 0.335, 0.997, 1.0, None)] == [
        "0\u00a0%", "0.1\u00a0%", "34\u00a0%", "99.7\u00a0%", "100\u00a0%", "–"
    ]  # fmt: skip
    assert [wording.decimal(x) for x in (-0.25, 1e300, None)] == ["−0.250", "1.00e+300", "–"]
    assert wording.interval([0.1, 0.25]) == "0.100–0.250" and wording.interval(None) == ""
    assert [wording.fact(x) for x in (True, None, 14080, 0.25, [1, 2])] == [
        "yes",
        "–",
        "14,080",
        "0.25",
        "1 2",
    ]


def calibration(**changes):
    """A calibration.json from positions made by hand."""
    flips = np.array([1.15, np.inf, 1.4, np.inf, np.inf, 2.0])
    at = (np.full(6, 6.5), np.full(6, 1.5), flips, np.array([2, 7, 2, 2, 2, 0]), np.array([0, 0, 1, 1, 2, 2]))
    at = (*at, np.zeros(6, int), np.zeros(6, int))
    return calibrate(Positions(*at), 5.0, bootstrap=20).to_json() | changes


def test_thresholds_before_training_stand_in_plain_words(tmp_path):
    path = full(tmp_path / "run")
    assert "Thresholds before training" not in page(path).text
    (path / "calibration.json").write_text(json.dumps(calibration()))
    parsed = page(path)
    text = parsed.text.replace("\u00a0", " ")
    assert parsed.balanced and len(parsed.ids) == len(set(parsed.ids))
    for part in (
        "Thresholds before training",
        "λ*_typ: the clip-safe λ of a typical answer",
        "Only 3 prompts",
    ):
        assert part in text
    assert f"{calibration()['lambda_typ_measured']:.3f}" in text and "comma 4 4 0.9985" in text
    assert "Structural tokens flip in 33 % of answers below λ = 1.2, in 100 % below λ = 3" in text
    spoken = [value for name, value in parsed.attributes if name == "aria-label" and "mode flip" in value]
    assert "λ*_safe, b measured at" in spoken[0]
    assert "own answers" not in text
    row = {"lambda": 1.5, "agreement": 0.75, "flipped": 0.1, "min": 1.2, "percentile_5": 1.4, "never": 0.5}
    (path / "calibration.json").write_text(json.dumps(calibration(forecasts=[row])))
    text = page(path).text.replace("\u00a0", " ")
    assert "own answers" in text and "λ = 1.5 75 % 10 % 1.200 never 1.400 never never 50 %" in text
    assert write_report(path).read_text("utf-8") == write_report(path).read_text("utf-8")


def test_the_parse_figure_shows_budgets_and_predictions(tmp_path):
    short = [record("opd", lam, 0.9, steps=10) for lam in CLIFF]
    path = workdir(tmp_path / "w", results=sweep(CLIFF) + short)
    flips = [{"positions": "structural", "percentile_50": 1.25}, {"positions": "all", "percentile_50": 1.05}]
    found = {"lambda_typ_measured": 1.3, "lambda_typ_implied": 7.0, "flips": flips, "curve": []}
    found = Calibration.from_json(found, "this calibration")
    shown = [(one.name, one.points[0].lam) for one in predicted(found, last=1.4)]
    assert shown == [("λ*_typ, b measured", 1.3), ("λ_flip of half the answers", 1.25)]
    assert predicted(None, last=1.4) == []
    assert list(findings.shorter_budgets(read(sweep(CLIFF) + short))) == [10]
    assert findings.shorter_budgets(read(sweep(CLIFF))) == {}
    page = write_report(path).read_text()
    assert "OPD, 10 steps" in page


def test_thresholds_that_do_not_exist_say_why(tmp_path):
    path = full(tmp_path / "run")
    reasons = {"lambda_typ_measured": HOSTILE, "lambda_safe_measured": HOSTILE}
    absent = dict.fromkeys((*reasons, "lambda_typ_implied", "lambda_safe_implied", "clip"))
    (path / "calibration.json").write_text(
        json.dumps(calibration(reasons=reasons, notes=[HOSTILE], **absent))
    )
    parsed = page(path)
    assert "lambda typ measured, lambda safe measured: " in parsed.text and "no clip" in parsed.text
    assert parsed.balanced and "img" not in parsed.tags and parsed.scripts == [script.TEXT]
    (path / "calibration.json").write_text('{"prompts": 3}')
    assert "Thresholds before training" in page(path).text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "must be an object"),
        ('{"p_typ": "x"}', "field 'p_typ' must be a finite number or null"),
        ('{"classes": [3]}', "must be an object"),
        ('{"flips": [{"min": []}]}', "field 'min' must be a finite number"),
        ('{"curve": [{"lambda": 1}]}', "curve 0: field 'structural' is missing"),
        ('{"intervals": {"p_typ": 1}}', "'intervals' must map"),
    ],
)
def test_a_broken_calibration_is_named(tmp_path, content, says):
    path = workdir(tmp_path / "run")
    (path / "calibration.json").write_text(content)
    with pytest.raises(UserError) as error:
        write_report(path)
    assert "calibration.json" in str(error.value) and says in str(error.value)
