"""A teacher that is served elsewhere (`teacher.server`): log π_T of sampled tokens over HTTP.

Any server that answers /v1/completions as vLLM does: prompts as token ids, and `prompt_logprobs`, the log-probability
of every token of a prompt. Prompt and completion are sent as one prompt; the one extra token that is generated is
thrown away. What a server sends is checked value by value, and failures that may pass are retried.
"""

import concurrent.futures
import dataclasses
import functools
import http.client
import itertools
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from listopd_jax.data.batches import as_teachers_read
from listopd_jax.errors import UserError, one_line, unknown_name

KEY = "LISTOPD_TEACHER_KEY"
"""The environment variable with the server's key, which is sent as a bearer token and never shown."""

ROWS, REQUESTS = 8, 8  # sequences per request, requests at one time
LONGEST_WAIT = 60.0  # seconds between two attempts
MOST_BYTES = 1 << 20, 256  # of an answer: at all, and for each byte of the request; a token takes about 150
SAME = 0.05  # nats: two identical requests may differ by less; batching moves 16-bit kernels by about .01
PROBE = 'Größe 12,5 µm\n\t{"naïve": [1, -2.5e3, "日本語"]} 🙂 – the END'
AGAIN = (408, 425, 429)  # statuses below 500 after which the same request may succeed


class Retry(Exception):
    """A failure that another attempt may cure; `after` is the server's own advice in seconds."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class Refused(UserError):
    """The server refuses a request for good."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class TeacherServer:
    """Where the teacher is served, under which name, and how patient requests are: seconds, attempts, first wait."""

    url: str
    model: str
    timeout: float = 300.0
    attempts: int = 7
    wait: float = 1.0

    def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[Float[np.ndarray, " _"]]:
        """log π of every token of each completion after its prompt, float32; UserError if the server cannot."""
        pairs = list(zip(prompts, completions, strict=True))
        parts = [pairs[i : i + ROWS] for i in range(0, len(pairs), ROWS)]
        with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
            return list(itertools.chain.from_iterable(pool.map(self._scored, parts)))

    def _scored(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Float[np.ndarray, " _"]]:
        sequences = [[*prompt, *completion] for prompt, completion in pairs]
        # prompt_logprobs=1: the likeliest token, and always the prompt's own.
        body = {"prompt": sequences, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        rows = self.ask("/v1/completions", functools.partial(_token_logprobs, sequences), body)
        # The server scores prompt and completion as one prompt; only the completion is asked for.
        return [row[len(prompt) :] for row, (prompt, _) in zip(rows, pairs, strict=True)]

    def ask(self, path: str, read: Callable[[Any], Any], body: Mapping[str, Any] | None = None) -> Any:
        """`read` of the JSON that `path` answers; `read` and every failure on the way may ask for a Retry.

        Waits twice as long after each attempt. UserError after the last, or at once for what is refused for good.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return read(self._exchange(path, body))
            except Retry as e:
                failure, pause = str(e), max(e.after, self.wait * 2 ** (attempt - 1))
            if attempt < self.attempts:
                time.sleep(min(pause, LONGEST_WAIT))
        raise UserError(
            f"teacher.server={self.url}{path}: {self.attempts} attempts failed, the last with {failure}; check "
            "the server and run again: the run resumes"
        )

    def _exchange(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """One request and the JSON of its answer. Redirections are not followed: the key is for this server alone."""
        url = urllib.parse.urlsplit(self.url)
        secure = url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(url.hostname, url.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps({"model": self.model, **body})
        try:
            connection.request("GET" if body is None else "POST", url.path + path, sent, headers)
            answer = connection.getresponse()
            most = MOST_BYTES[0] + MOST_BYTES[1] * len(sent or "")
            text = answer.read(most + 1)
        except (OSError, http.client.HTTPException) as e:
            raise Retry(one_line(e)) from e
        finally:
            connection.close()
        if len(text) > most:
            raise Retry(f"an answer of more than {most} bytes")
        return self._json(path, answer, text)

    def _json(self, path: str, answer: http.client.HTTPResponse, text: bytes) -> Any:
        if answer.status in AGAIN or answer.status >= 500:
            raise Retry(f"HTTP {answer.status}", _seconds(answer.headers.get("Retry-After")))
        if answer.status != 200:
            said = _shown(text)
            raise Refused(f"teacher.server={self.url}{path}: HTTP {answer.status}: {said}", answer.status)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as e:
            raise Retry("an answer that is no JSON") from e


def _key() -> str:
    """The server's key, "" if there is none; UserError, which does not show it, if it cannot be put in a header."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"{KEY}: holds a character that no key has; copy the key again")
    return key


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds; 0 for none, or a date."""
    return float(text) if text and text.isascii() and text.isdigit() else 0.0


def _shown(text: bytes) -> str:
    """The start of what a server says, as one line without the key."""
    said = text[:2000].decode("utf-8", "replace").replace(_key() or "\0", "***")
    return " ".join("".join(c if c.isprintable() else " " for c in said).split())[:200]


def _token_logprobs(sequences: Sequence[Sequence[int]], answer: Any) -> list[Float[np.ndarray, " _"]]:
    """log π of each token of each sequence, 0 for the first; Retry if one is missing or invalid."""
    try:
        of = {choice["index"]: choice["prompt_logprobs"] for choice in answer["choices"]}
        rows = [
            [entry[str(token)]["logprob"] for entry, token in zip(of[i][1:], sequence[1:], strict=True)]
            for i, sequence in enumerate(sequences)
        ]
        found = [np.array([0.0, *row], np.float32) for row in rows]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise Retry("an answer without prompt_logprobs of every token") from e
    # Not <= 0: rounding may leave a sure token a little above it.
    if not all(np.isfinite(row).all() and row.max() <= SAME for row in found):
        raise Retry("invalid log-probabilities")
    return found


# --- before a run ---


def check_server(server: TeacherServer, tokenizer: Any, texts: Sequence[str]) -> None:
    """UserError if the server has no model of the name, or one that gives other ids for PROBE or `texts`."""
    names = server.ask("/v1/models", _names)
    if server.model not in names:
        raise unknown_name("teacher.served_name", server.model, names)
    for text in (PROBE, *texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not _agrees(server, tokenizer, text, ids):
            raise UserError(
                f"teacher.server={server.url}: has another tokenizer than tokenizer.path: its ids of {text[:40]!r} "
                "differ; serve a teacher with the student's tokenizer"
            )


def _names(answer: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (LookupError, TypeError) as e:
        raise Retry("an answer that names no models") from e


def _agrees(server: TeacherServer, tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether the server has the same ids for a text; where it has no /tokenize, the same text for the ids."""
    try:
        asked = {"prompt": text, "add_special_tokens": False}
        return server.ask("/tokenize", lambda answer: _field(answer, "tokens"), asked) == list(ids)
    except Refused as e:
        if e.status not in (404, 405):
            raise
    echo = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "echo": True}
    said = server.ask("/v1/completions", lambda answer: _field(_field(answer, "choices"), 0, "text"), echo)
    return str(said).startswith(tokenizer.decode(ids, skip_special_tokens=False))


def _field(value: Any, *names: Any) -> Any:
    """value[name]… for every name; Retry if it is not there."""
    try:
        return functools.reduce(lambda found, name: found[name], names, value)
    except (LookupError, TypeError) as e:
        raise Retry(f"an answer without {names[-1]}") from e


def repeated(server: TeacherServer, batch: Mapping[str, np.ndarray]) -> float:
    """The most nats by which two identical requests for the right answers of `batch` differ; UserError above SAME."""
    first, second = (of_answers(server, batch) for _ in range(2))
    apart = float(np.abs(first - second).max())
    if apart > SAME:
        raise UserError(
            f"teacher.server={server.url}: two identical requests differ by {apart:.3g} nats, more than {SAME}; serve "
            "the teacher with one precision and without sampling parameters of its own"
        )
    return apart


# --- scores ---


def of_answers(server: TeacherServer, batch: Mapping[str, np.ndarray]) -> Float[np.ndarray, " tokens"]:
    """log π_T of each token of the right answers of `batch`, row after row."""
    scores, written = of_completions(server, batch, batch["answer"][:, None], batch["answer_length"][:, None])
    return scores[written]


def of_completions(
    server: TeacherServer,
    batch: Mapping[str, np.ndarray],
    tokens: Int[np.ndarray, "B n T"],
    lengths: Int[np.ndarray, "B n"],
) -> tuple[Float[np.ndarray, "B n T"], Bool[np.ndarray, "B n T"]]:
    """log π_T of completions after the prompts that teachers read, 0 after their ends, and where a token is."""
    read = as_teachers_read(batch)
    prompts = [p[:n].tolist() for p, n in zip(read["prompt"], read["prompt_length"], strict=True)]
    rows = zip(tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1), strict=True)
    completions = [row[:n].tolist() for row, n in rows]
    found = server.logprobs([p for p in prompts for _ in range(tokens.shape[1])], completions)
    written = np.arange(tokens.shape[-1]) < lengths[..., None]
    scores = np.zeros(tokens.shape, np.float32)
    scores[written] = np.concatenate(found)
    return scores, written
