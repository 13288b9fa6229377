"""python -m listopd_jax.label --judge=PROVIDER:MODEL --rubric=FILE --out=labels.jsonl --config=configs/fashion.py

Scores 0-10 for every review in the lists of a config, by a language model that reads your rubric. PROVIDER is openai
(with --base_url: any server that speaks its protocol) or google; the key is OPENAI_API_KEY or GEMINI_API_KEY of the
environment. --estimate prints what it would take and asks nothing. Train on the file with the same --config flags and
--config.data.labels=labels.jsonl. Stopped at any moment, the same command resumes; no reply is paid for twice. Exit
code 0: all have a reply; 2: a mistake to fix; 3: some have none, and the same command asks them again.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from listopd_jax import config as config_module
from listopd_jax import files
from listopd_jax.data.prepare import listed_reviews
from listopd_jax.errors import UserError, exit_code
from listopd_jax.label.bill import Bill, estimate
from listopd_jax.label.cache import Cache, digest, open_cache
from listopd_jax.label.judges import FORMATS, PROVIDERS, Judge, Reply, Settings, check
from listopd_jax.label.questions import Question, questions, read_rubric, score_of
from listopd_jax.lifecycle import quiet_libraries, say
from listopd_jax.metrics_log import progress

Asked = Sequence[tuple[str, Question]]
"""Every question with its digest: equal ones, of a text that two users posted, have one reply."""

FLAGS = flags.FlagValues()
_own: dict[str, Any] = {"flag_values": FLAGS}
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py[:PRESET]: whose reviews; override with --config.field=value", **_own
)
_JUDGE = flags.DEFINE_string("judge", None, "openai:MODEL or google:MODEL", **_own)
_BASE_URL = flags.DEFINE_string("base_url", "", "address of another server, up to and with /v1", **_own)
_RUBRIC = flags.DEFINE_string("rubric", None, "text file that says how to score", **_own)
_OUT = flags.DEFINE_string("out", None, "labels file to write", **_own)
_CACHE = flags.DEFINE_string(
    "cache", None, "file of the replies; default: that of --out with .replies", **_own
)
_ESTIMATE = flags.DEFINE_bool("estimate", False, "say what it would take, and stop", **_own)
_RETRY = flags.DEFINE_bool("retry_failed", False, "ask again where the judge refused or erred", **_own)
_PRICE_IN = flags.DEFINE_float("price_in", None, "of a million tokens read", 0, **_own)
_PRICE_OUT = flags.DEFINE_float("price_out", None, "of a million tokens written", 0, **_own)
_MAX_COST = flags.DEFINE_float(
    "max_cost", None, "stop when a call has cost this much; needs the prices", 0, **_own
)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "requests at once", 1, 256, **_own)
_PER_MINUTE = flags.DEFINE_float("per_minute", 60.0, "requests that may begin; 0: no limit", 0, **_own)
_TIMEOUT = flags.DEFINE_float("timeout", 60.0, "seconds that a reply may take", 0.001, **_own)
_ATTEMPTS = flags.DEFINE_integer("attempts", 6, "tries of one question", 1, **_own)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 1024, "of one answer, thoughts included", 1, **_own)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "default: the model's own", 0, 2, **_own)
_FORMAT = flags.DEFINE_enum(
    "response_format", FORMATS[0], FORMATS, "what the server can hold answers to", **_own
)


def main(argv: Sequence[str]) -> int:
    """Label and return the exit code; a user's mistake is one line on stderr."""
    return exit_code(run, argv)


def run(argv: Sequence[str]) -> int:
    """0: every review has a reply, or --estimate; 3: some have none. UserError for a mistake."""
    if {"--help", "-h"} & set(argv):
        say(f"{__doc__}\n{FLAGS.get_help()}")
        return 0
    quiet_libraries()
    config, settings, rubric = parse(argv)
    judge = None if _ESTIMATE.value else _judge(settings)
    reviews = listed_reviews(config.data, config.task)
    put = questions(reviews, rubric, config.task.max_review_words)
    asked = [(digest(settings, question), question) for question in put]
    out, path = _written_files(config.data)
    if out.exists() and not path.exists():
        raise UserError(
            f"--out={out}: already exists and is not from this command ({path} is missing); choose another --out"
        )
    with open_cache(path) as cache:
        pending = {of: q for of, q in asked if _is_pending(cache.replies.get(of))}
        prices = _PRICE_IN.value, _PRICE_OUT.value
        say(estimate(len(asked), list(pending.values()), settings.max_tokens, *prices))
        return 0 if judge is None else _label(judge, asked, pending, cache, out)


def parse(argv: Sequence[str]) -> tuple[Any, Settings, str]:
    """The checked config, the judge's settings, and the rubric; UserError for whatever is wrong with them."""
    argv = list(argv)
    with config_module.flag_mistakes(argv):
        rest = FLAGS(config_module.find_config_file(argv))
        config = _CONFIG.value
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; overrides are written --config.field=value")
    for name, value in (("judge", _JUDGE), ("rubric", _RUBRIC), ("out", _OUT), ("config", _CONFIG)):
        if not value.value:
            raise UserError(f"--{name} is missing; see python -m listopd_jax.label --help")
    if _MAX_COST.value is not None and None in (_PRICE_IN.value, _PRICE_OUT.value):
        raise UserError("--max_cost: give --price_in and --price_out too, of a million tokens each")
    settings = Settings(_JUDGE.value, _BASE_URL.value, _MAX_TOKENS.value, _TEMPERATURE.value, _FORMAT.value)
    check(settings)
    return _reviews_config(config), settings, read_rubric(_RUBRIC.value)


def _reviews_config(config: Any) -> Any:
    """The checked config; UserError for one without reviews, or whose labels are there."""
    config = config_module.validate(config)
    if not config_module.ranks_reviews(config):
        raise UserError(
            f"task {config_module.task_name(config)!r} has no reviews to label; drop --config.task"
        )
    if config.data.labels:
        raise UserError("data.labels is what this command writes: leave it out here")
    return config


def _written_files(data: Any) -> tuple[pathlib.Path, pathlib.Path]:
    """Where labels and replies go; UserError if that is one file, or one that the command reads."""
    out = _OUT.value
    written = {"--out": out, "--cache": _CACHE.value or f"{out}.replies"}
    named = {"--rubric": _RUBRIC.value, "data.path": data.path, "data.meta_path": data.meta_path, **written}
    for name, path in written.items():
        for other, taken in named.items():
            if other != name and taken and os.path.realpath(taken) == os.path.realpath(path):
                raise UserError(f"{name}={path}: is the file of {other} too; give it one of its own")
    return pathlib.Path(written["--out"]), pathlib.Path(written["--cache"])


def _judge(settings: Settings) -> Judge:
    from listopd_jax.label.client import http_client  # needs the extra label

    return PROVIDERS[settings.judge.partition(":")[0]](settings, http_client())


def _is_pending(reply: Reply | None) -> bool:
    return reply is None or (_RETRY.value and _score(reply) is None)


def _score(reply: Reply) -> int | None:
    return None if reply.text is None else score_of(reply.text)


def _label(
    judge: Judge,
    asked: Asked,
    pending: Mapping[str, Question],
    cache: Cache,
    out: pathlib.Path,
) -> int:
    """Ask what is pending and write the labels of all that is asked, even when it is cut short."""
    import asyncio

    from listopd_jax.label.asking import Limits, ask_all

    bill = Bill(_PRICE_IN.value, _PRICE_OUT.value, _MAX_COST.value)
    bar = progress(len(pending), "judging")

    def keep(of: str, reply: Reply) -> None:
        cache.put(pending[of].key, of, reply)
        bar.update()
        bill.add(reply)

    limits = Limits(_CONCURRENCY.value, _PER_MINUTE.value, _TIMEOUT.value, _ATTEMPTS.value)
    try:
        unanswered = asyncio.run(ask_all(judge, pending, limits, keep))
    finally:
        bar.close()
        say(_write(asked, cache, out) + f" {bill}")
    if unanswered.count:
        say(
            f"{unanswered.count} got no reply, the last with: {unanswered.reason}. The same command asks them again"
        )
    return 3 if unanswered.count else 0


def _write(asked: Asked, cache: Cache, out: pathlib.Path) -> str:
    """Write the labels that there are, and say how many, and what the other replies were."""
    replies = [(q.key, cache.replies[of]) for of, q in asked if of in cache.replies]
    scores = {key: score for key, reply in replies if (score := _score(reply)) is not None}
    if scores:
        files.write_text(out, "".join(json.dumps({"key": k, "score": s}) + "\n" for k, s in scores.items()))
    refused = sum(reply.text is None for _, reply in replies)
    malformed = len(replies) - refused - len(scores)
    return f"{out}: {len(scores)} labels of {len(asked)} reviews, {refused} refused, {malformed} malformed."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
