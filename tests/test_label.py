"""Labels by a judge: a server that misbehaves in every way, replies paid once, and a file that a run trains on."""

import asyncio
import json
import sys
import tempfile
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import reply, serving
from processes import start_main
from test_evaluate import settings

pytest.importorskip("httpx2", reason="needs the extra label")
pytest.importorskip("tenacity", reason="needs the extra label")

from listopd_jax.data.labels import read_labels
from listopd_jax.data.reviews import Review
from listopd_jax.errors import UserError
from listopd_jax.label.asking import IN_A_ROW, Limits, Pacer, ask_all
from listopd_jax.label.bill import Bill, estimate
from listopd_jax.label.cache import digest, open_cache
from listopd_jax.label.client import LARGEST_BODY, http_client
from listopd_jax.label.judges import PROVIDERS, Reply, Settings, check, retry_after
from listopd_jax.label.questions import questions, score_of
from listopd_jax.stages.prepare import open_job

KEY = "sk-very-secret"
REVIEWS = [Review(f"u{i}", "p", "A dress", f"review number {i}", 0) for i in range(12)]
QUICK = Limits(concurrency=4, per_minute=0, timeout=2.0, attempts=4, backoff=0.01)


@pytest.fixture(params=["openai", "google"])
def provider(request, monkeypatch):
    """Each provider, with a key."""
    if request.param == "google":
        pytest.importorskip("google.genai", reason="needs google-genai, of the extra label")
    for variable in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(variable, KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return request.param


def asked(server, provider, reviews=REVIEWS, limits=QUICK, keep=None, **settings):
    """What ask_all makes of reviews: (the replies by text, what is unanswered)."""
    url = server if isinstance(server, str) else server.url
    judge = PROVIDERS[provider](Settings(f"{provider}:wise", url, **settings), http_client())
    put = {q.text: q for q in questions(reviews, "Score it.", 200)}
    replies = {}
    unanswered = asyncio.run(ask_all(judge, put, limits, keep or replies.__setitem__))
    return replies, unanswered


# --- a server that misbehaves


MISBEHAVIOURS = (
    "status 500 oops", "status 429 slow down", "slowly 0.01", "slow 9", "truncate", "cut", "drop", "drip",
    "body []", "body {}", "body null", 'body {"choices": 5, "candidates": 5}', 'body {"choices": [[]]}',
    "body " + "[" * 9000, "body \\", "status 503 down", "bomb", "flood",
)  # fmt: skip


def test_whatever_a_server_does_is_tried_again_and_then_scored(provider):
    def script(text, attempt):
        number = int(text.rsplit(" ", 1)[1])
        return MISBEHAVIOURS[number] if attempt == 1 else number % 11

    reviews = [Review("u", "p", "A dress", f"number {i}", 0) for i in range(len(MISBEHAVIOURS))]
    limits = Limits(concurrency=16, per_minute=0, timeout=1.0, attempts=4, backoff=0.01)
    with serving(script) as server:
        replies, unanswered = asked(server, provider, reviews, limits)
    assert unanswered.count == 0, unanswered
    scores = {int(text.rsplit(" ", 1)[1]): score_of(reply.text) for text, reply in replies.items()}
    assert scores == {i: i % 11 for i in range(len(MISBEHAVIOURS))}
    assert set(server.asked.values()) == {2} and set(server.paid.values()) == {1}
    assert all((reply.tokens_in, reply.tokens_out) == (100, 7) for reply in replies.values())


def test_what_never_answers_is_counted_and_the_rest_is_scored(provider):
    with serving(lambda text, attempt: "status 500 oops" if text.endswith(" 3") else 5) as server:
        replies, unanswered = asked(server, provider)
    assert len(replies) == 11 and unanswered.count == 1 and "HTTP 500" in unanswered.reason
    assert server.asked["Product: A dress\nReview: review number 3"] == QUICK.attempts


@pytest.mark.parametrize("what", ["bomb", "flood"])
def test_no_body_fills_the_memory(provider, what):
    limits = Limits(concurrency=1, per_minute=0, timeout=9.0, attempts=1, backoff=0.01)
    with serving(lambda text, attempt: 5 if text.endswith(" 1") else what) as server:
        asked(server, provider, REVIEWS[1:2], limits)  # what is imported or made once
        tracemalloc.start()
        _, unanswered = asked(server, provider, REVIEWS[:1], limits)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert unanswered.count == 1 and "a body " in unanswered.reason
    assert peak < 4 * LARGEST_BODY, "of 64 MiB"


@pytest.mark.parametrize("count", [10**308, -1, 10**10, True, 1.5, "7", None])
def test_tokens_that_no_reply_has_are_counted_here(provider, count):
    names = ("prompt_tokens", "completion_tokens", "promptTokenCount", "candidatesTokenCount")
    path = "/chat/completions" if provider == "openai" else ""
    body = reply(path, '{"score": 5}')
    (usage,) = {"usage", "usageMetadata"} & body.keys()
    body[usage] = {name: count for name in names if name in body[usage]}
    with serving(lambda text, attempt: f"body {json.dumps(body)}") as server:
        replies, _ = asked(server, provider)
    bill = Bill(1.0, 1.0, None)
    for one in replies.values():
        bill.add(one)
    assert bill.cost < 0.01 and (len(replies) == 12 or provider == "google")


def test_a_refusal_is_a_reply_that_is_paid_for(provider):
    with serving(lambda text, attempt: "refuse") as server:
        replies, unanswered = asked(server, provider)
    assert {reply.text for reply in replies.values()} == {None} and unanswered.count == 0
    assert set(server.asked.values()) == {1}


def test_a_content_filter_is_a_refusal(provider):
    if provider == "google":
        pytest.skip("this is how servers of OpenAI's models say it")
    with serving(lambda text, attempt: "status 400 content_filter") as server:
        replies, _ = asked(server, provider)
    assert {reply.text for reply in replies.values()} == {None}


def test_a_question_that_is_rejected_is_not_asked_again(provider):
    with serving(lambda text, attempt: "status 413 too long" if text.endswith(" 3") else 5) as server:
        replies, unanswered = asked(server, provider)
    assert len(replies) == 11 and unanswered.count == 1 and "HTTP 413" in unanswered.reason
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "the API key is not accepted"),
        (403, "not allowed for this API key"),
        (404, "correct --judge or --base_url"),
    ],
)
def test_a_mistake_that_all_questions_share_stops_at_once(provider, status, says):
    with (
        serving(lambda text, attempt: f"status {status} bad {KEY}") as server,
        pytest.raises(UserError) as error,
    ):
        asked(server, provider)
    assert says in str(error.value) and "\n" not in str(error.value) and KEY not in str(error.value)
    assert sum(server.asked.values()) <= QUICK.concurrency


def test_a_server_that_is_away_is_left_after_some_questions(provider):
    reviews = [Review("u", "p", "", f"number {i}", 0) for i in range(100)]
    limits = Limits(concurrency=4, per_minute=0, timeout=2.0, attempts=2, backoff=0.01)
    with pytest.raises(UserError, match=f"left {IN_A_ROW} questions in a row without a reply, the last with"):
        asked("http://127.0.0.1:9", provider, reviews, limits)


def test_a_redirect_does_not_get_the_key(provider):
    with serving(lambda text, attempt: "away") as server:
        _, unanswered = asked(server, provider)
    assert unanswered.count == 12 and "HTTP 302" in unanswered.reason
    assert sum(server.asked.values()) == 12, "none went to where the redirect points"


def test_all_wait_as_long_as_one_is_told_to(provider):
    """With two attempts each, only requests that wait for the end of the pause are answered."""
    began = []

    def script(text, attempt):
        began.append(time.monotonic())
        return 5 if began[-1] - began[0] >= 0.9 else "slowly 1"

    limits = Limits(concurrency=2, per_minute=0, timeout=5.0, attempts=2, backoff=0.01)
    with serving(script) as server:
        replies, unanswered = asked(server, provider, limits=limits)
    assert len(replies) == 12 and unanswered.count == 0
    assert sum(server.asked.values()) <= 12 + limits.concurrency


def test_requests_begin_no_faster_than_asked_for():
    async def begin(pacer, times):
        await pacer.turn()
        times.append(asyncio.get_running_loop().time())

    async def all_begin():
        pacer, times = Pacer(0.02), []
        await asyncio.gather(*(begin(pacer, times) for _ in range(10)))
        return times

    times = asyncio.run(all_begin())
    assert all(b - a > 0.015 for a, b in zip(times, times[1:], strict=False))


def test_no_more_requests_than_asked_for_are_in_flight(provider):
    now, most = [], []

    def script(text, attempt):
        now.append(1)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return 5

    with serving(script) as server:
        asked(server, provider)
    assert 1 < max(most) <= QUICK.concurrency


def test_the_question_is_put_as_the_protocol_has_it(provider):
    with serving(lambda text, attempt: 5) as server:
        asked(server, provider, REVIEWS[:1], max_tokens=99, temperature=0.5)
    (body,) = server.bodies
    if provider == "openai":
        assert body["model"] == "wise" and body["max_tokens"] == 99 and body["temperature"] == 0.5
        system, user = body["messages"]
        assert system["content"].startswith("Score it.\n\n") and user["content"].endswith("review number 0")
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["score"]
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    else:
        settings = body["generationConfig"]
        assert settings["maxOutputTokens"] == 99 and settings["temperature"] == 0.5
        assert settings["responseJsonSchema"]["required"] == ["score"]
        assert body["systemInstruction"]["parts"][0]["text"].startswith("Score it.")
        assert server.headers[0]["x-goog-api-key"] == KEY


def test_a_key_that_comes_back_is_not_kept(provider):
    with serving(lambda text, attempt: f"my key is {KEY}, is it not?") as server:
        replies, _ = asked(server, provider)
    assert {reply.text for reply in replies.values()} == {"my key is [key], is it not?"}


def test_a_server_of_ones_own_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(lambda text, attempt: 5) as server:
        replies, _ = asked(server, "openai")
    assert len(replies) == 12 and "authorization" not in server.headers[0]
    for key, says in (("", "OPENAI_API_KEY is not set"), ("sk-\u00e9\n\x01", "copy the key again")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=says) as error:
            PROVIDERS["openai"](Settings("openai:wise"), None)
        assert "sk-" not in str(error.value)


# --- answers


@pytest.mark.parametrize("text", ['{"score": 7}', ' {"score":7.0}\n', '{"score": 0}', '{"score": 10}'])
def test_an_answer_of_the_form_has_a_score(text):
    assert score_of(text) in (0, 7, 10)


@pytest.mark.parametrize(
    "text",
    ["", "7", "[7]", "null", '{"score": 11}', '{"score": -1}', '{"score": 7.5}', '{"score": "7"}', '{"score": true}',
     '{"score": null}', '{"score": NaN}', '{"score": 1e999}', '{"score": 7, "score": 8}', '{"score": 7, "why": ""}',
     '{"Score": 7}', '```json\n{"score": 7}\n```', 'Sure! {"score": 7}', '{"score": 7', "[" * 100_000, '{"score": ' +
     "9" * 5000 + "}", "__import__('os').system('true')", '{"score": {"$ref": "file:///etc/passwd"}}', "I cannot."],
)  # fmt: skip
def test_anything_else_has_none(text):
    assert score_of(text) is None


JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(st.text() | JSON.map(json.dumps))
def test_no_text_raises(text):
    assert score_of(text) in (None, *range(11))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3), (" 0.5 ", 0.5), ("1e9", 0), ("nan", 0), ("-5", 0), ("999999999", 300), ("", 0), ("9" * 5000, 0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 21 Oct 2215 07:28:00 GMT", 300), ("21 Oct 2215 07:28", 0)],
)  # fmt: skip
def test_a_pause_is_a_number_of_seconds_or_a_date(value, seconds):
    assert retry_after(value) == seconds


# --- the cache


def test_a_reply_is_found_by_all_that_decides_it():
    settings, (question,) = Settings("openai:wise"), questions(REVIEWS[:1], "Score it.", 200)
    others = [
        Settings("openai:wiser"),
        Settings("openai:wise", "http://x/v1"),
        Settings("openai:wise", temperature=0.0),
    ]
    digests = [digest(s, question) for s in (settings, *others)]
    digests += [digest(settings, *questions(REVIEWS[:1], "Score it well.", 200))]
    digests += [digest(settings, *questions(REVIEWS[1:2], "Score it.", 200))]
    assert len(set(digests)) == len(digests)
    assert digest(settings, *questions(REVIEWS[:1], "Score it.", 200)) == digests[0]


def test_the_cache_survives_a_line_that_is_cut_off(tmp_path):
    path = tmp_path / "replies"
    kept = {"a": Reply('{"score": 7}', 1, 2), "b": Reply(None, 3, 4), "c": Reply("\ud800 é \u2028 \n", 5, 6)}
    with open_cache(path) as cache:
        for of, reply in kept.items():
            cache.put("key", of, reply)
    kept["c"] = Reply("? é \u2028 \n", 5, 6)  # half of a surrogate pair could not be read again
    assert cache.replies == kept
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with open_cache(path) as cache:
            assert cache.replies.items() <= kept.items()
            # The whole line is a reply that was paid for, even if its end of line is missing.
            assert len(cache.replies) == whole[: cut + 1].count(b"\n")
            assert whole.startswith(path.read_bytes())
            if cut == len(whole) - 2:
                cache.put("key", "d", Reply("x", 1, 1))
                with_d = path.read_bytes()
    path.write_bytes(with_d)
    with open_cache(path) as cache:
        assert list(cache.replies) == ["a", "b", "d"]


def test_a_cache_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "replies"
    for line in (
        '{"request": 3}',
        "[]",
        '{"request": "a", "text": 3, "tokens_in": 1, "tokens_out": 1}',
        "no",
    ):
        path.write_text(f"{line}\n")
        with pytest.raises(UserError, match=f"^{path}:1: "), open_cache(path):
            pass
        assert path.read_text() == f"{line}\n"
    for text in ("no", "10: you would buy by it", "a\nb", '{"score": 3}', '{"request": 3}\n{"request": "x'):
        path.write_text(text)
        with pytest.raises(UserError, match=f"^{path}:[12]: "), open_cache(path):
            pass
        assert path.read_text() == text, "somebody's file, and it stays as it is"
    path.write_text("")
    with open_cache(path):
        pass
    assert path.exists(), "it was there before"
    path.unlink()
    with pytest.raises(RuntimeError), open_cache(path):
        raise RuntimeError
    assert not path.exists()
    with open_cache(path), pytest.raises(UserError, match="another process"), open_cache(path):
        pass
    assert not path.exists(), "an empty one is not left"


# --- the command


RUBRIC = "10: you would buy by it. 0: it says nothing."
TINY = ("--config.data.synthetic.products=3", "--config.data.synthetic.reviews_per_product=8")


def command(folder, url, *more, judge="openai:wise"):
    """The arguments of the command, with `folder` for its files."""
    (folder / "rubric.txt").write_text(RUBRIC)
    flags = (
        f"--judge={judge}",
        f"--base_url={url}",
        f"--rubric={folder}/rubric.txt",
        f"--out={folder}/labels.jsonl",
    )
    flags += ("--config=configs/fashion.py:tiny", "--per_minute=0", *TINY, *more)
    return [sys.executable, "-m", "listopd_jax.label.__main__", *flags]


def label(folder, url, *more):
    """The command to its end."""
    with tempfile.TemporaryDirectory() as said:
        return start(said, folder, url, *more).end()


def start(said, folder, url, *more):
    """The command in a process of its own."""
    return start_main(said, command(folder, url, *more), OPENAI_API_KEY=KEY, NO_PROXY="127.0.0.1")


def by_length(text, attempt):
    """A judge to whom long reviews are good."""
    return min(10, len(text) // 12)


def test_labels_are_written_counted_and_paid_once(tmp_path):
    def script(text, attempt):
        return ("refuse", '{"score": 11}', by_length(text, 1))[len(text) % 3]

    with serving(script) as server:
        dry = label(tmp_path, server.url, "--estimate", "--price_in=1", "--price_out=2")
        assert not server.asked and dry.returncode == 0, dry.stderr
        assert (
            "24 reviews, 0 judged before: 24 requests, about " in dry.stdout and "; cost about " in dry.stdout
        )
        assert [p.name for p in tmp_path.iterdir()] == ["rubric.txt"]
        first = label(tmp_path, server.url, "--price_in=1", "--price_out=2")
        assert first.returncode == 0, first.stderr
        again = label(tmp_path, server.url)
        assert set(server.asked.values()) == {1} and again.returncode == 0
    kinds = Counter(len(text) % 3 for text in server.asked)
    counts = f"{kinds[2]} labels of 24 reviews, {kinds[0]} refused, {kinds[1]} malformed. This call: "
    assert counts in first.stdout and min(kinds.values()) > 0 and kinds.total() == 24
    assert len(read_labels(tmp_path / "labels.jsonl")) == kinds[2]
    assert "24 judged before: 0 requests" in again.stdout
    said = "".join(map(str, (dry, first, again))).encode()
    assert all(KEY.encode() not in text for text in (said, *(p.read_bytes() for p in tmp_path.iterdir())))


def test_failed_replies_are_asked_again_only_on_demand(tmp_path):
    with serving(lambda text, attempt: ("refuse", "Sure! 7", 5)[min(attempt, 3) - 1]) as server:
        ended = label(tmp_path, server.url)
        assert "0 labels of 24 reviews, 24 refused, 0 malformed." in ended.stdout, ended
        assert not (tmp_path / "labels.jsonl").exists()
        assert "0 malformed" in label(tmp_path, server.url).stdout and set(server.asked.values()) == {1}
        assert "0 refused, 24 malformed." in label(tmp_path, server.url, "--retry_failed").stdout
        assert "24 labels of 24 reviews" in label(tmp_path, server.url, "--retry_failed").stdout
    assert set(read_labels(tmp_path / "labels.jsonl").values()) == {5}


def test_what_got_no_reply_is_asked_by_the_next_call(tmp_path):
    with serving(lambda text, attempt: "status 500 oops" if attempt == 1 and len(text) % 2 else 5) as server:
        first = label(tmp_path, server.url, "--attempts=1")
        assert first.returncode == 3 and "got no reply, the last with: HTTP 500" in first.stdout, first
        second = label(tmp_path, server.url)
    assert second.returncode == 0 and "24 labels of 24 reviews" in second.stdout
    assert set(server.paid.values()) == {1}


def test_it_stops_at_the_most_it_may_cost(tmp_path):
    prices = ("--price_in=1000000", "--price_out=0", "--concurrency=1")
    with serving(by_length) as server:
        ended = label(tmp_path, server.url, *prices, "--max_cost=250")
    assert ended.returncode == 2 and "--max_cost=250 is reached" in ended.stderr
    assert sum(server.paid.values()) == 3 == len(read_labels(tmp_path / "labels.jsonl"))


def test_a_kill_loses_at_most_the_requests_in_flight(tmp_path):
    with serving(lambda text, attempt: time.sleep(0.05) or by_length(text, attempt)) as server:
        with tempfile.TemporaryDirectory() as said:
            child = start(said, tmp_path, server.url, "--concurrency=3")
            while sum(server.paid.values()) < 10 and child.process.is_alive():
                time.sleep(0.01)
            child.process.kill()
            child.process.join()
        ended = label(tmp_path, server.url, "--concurrency=3")
    assert ended.returncode == 0 and "24 labels of 24 reviews" in ended.stdout, ended
    twice = [text for text, times in server.asked.items() if times > 1]
    assert len(twice) <= 3 and max(server.asked.values()) <= 2


def test_a_run_trains_on_the_labels(tmp_path):
    """What it prepares, trains on and judges by, is what the judge said."""
    with serving(by_length) as server:
        ended = label(tmp_path, server.url, "--config.data.synthetic.products=6")
    assert ended.returncode == 0, ended.stderr
    job = open_job(settings(**{"data.labels": f"{tmp_path}/labels.jsonl"}), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert report["labels"] == "file labels.jsonl" and report["read"]["usable"] == 6 * 8
    for record in (*job.records["train"], *job.records["validation"]):
        asked_for = (f"Product: {record.title}\nReview: {text}" for text in record.reviews)
        assert record.scores == tuple(by_length(text, 1) for text in asked_for)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--judge=anthropic:x"], "--judge='anthropic' is unknown"),
        (["--judge=openai"], "names no model; write openai:MODEL"),
        (["--base_url=ftp://x"], "--base_url: is not an address"),
        (["--base_url=http://host:99999/v1"], "--base_url: is not an address"),
        (["--base_url=http://host:port/v1"], "--base_url: is not an address"),
        (["--rubric=none.txt"], "--rubric=none.txt: cannot be read"),
        (["--rubrik=x"], "rubrik"),
        (["--per_minute=-1"], "per_minute"),
        (["--response_format=xml"], "response_format"),
        (["--max_cost=1"], "give --price_in and --price_out too"),
        (["--config.data.labels=x.jsonl"], "data.labels is what this command writes"),
        (["--config.task.name=json", "--config.data.path=x"], "has no reviews to label"),
        (["--config.data.sauce=x"], "there is no such field"),
        (["stray"], "'stray' is not a flag"),
        (["--out="], "--out is missing"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(tmp_path, flags, says):
    ended = label(tmp_path, "http://127.0.0.1:9", *flags)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and len(lines) == 1 and says in lines[0], ended
    assert "Traceback" not in ended.stderr


def test_a_labels_file_of_another_origin_is_not_overwritten(tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"key": "a", "score": 3}\n')
    ended = label(tmp_path, "http://127.0.0.1:9")
    assert ended.returncode == 2 and "choose another --out" in ended.stderr
    assert (tmp_path / "labels.jsonl").read_text() == '{"key": "a", "score": 3}\n'


@pytest.mark.parametrize("flag", ["--cache", "--out", "--cache=link"])
def test_a_file_that_is_named_twice_stays_as_it_is(tmp_path, flag):
    """Replies in the labels file would be lost, and the rubric in either."""
    (tmp_path / "link").symlink_to("rubric.txt")
    named = {"--cache": "labels.jsonl", "--out": "rubric.txt", "--cache=link": "link"}[flag]
    for more in ((), ("--estimate",)):
        ended = label(tmp_path, "http://127.0.0.1:9", f"{flag.partition('=')[0]}={tmp_path}/{named}", *more)
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert ended.returncode == 2 and "too; give it one of its own" in line, ended
    assert (tmp_path / "rubric.txt").read_text() == RUBRIC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "rubric.txt"]


def test_the_estimate_is_what_it_says():
    put = questions(REVIEWS, "Score it.", 200)
    tokens = sum(q.tokens for q in put)
    assert estimate(20, put, 100, 2.0, 10.0) == (
        f"20 reviews, 8 judged before: 12 requests, about {tokens} tokens in, 96 out (at most 1200 with thoughts); "
        f"cost about {(tokens * 2 + 960) / 1e6:.4g}, at most about {(tokens * 2 + 12000) / 1e6:.4g}"
    )
    assert "give --price_in and --price_out" in estimate(20, put, 100, None, 1.0)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"httpx2 is not installed; pip install 'listopd_jax\[label\]'"):
        check(Settings("openai:wise"))
