"""Judges: Google's models by google-genai, all others by the chat completions of OpenAI, which most servers speak.

What a server sends is hostile. Whatever is not an answer in the form of its protocol is `Unavailable`; the text of an
answer is only handed on. A key comes from the environment, goes into one header, and into nothing else.
"""

import abc
import dataclasses
import datetime
import email.utils
import importlib.util
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from listopd_jax.errors import UserError, one_line, unknown_name
from listopd_jax.label.questions import SCHEMA, Question, about_tokens
from listopd_jax.task.strict_json import loads

OPENAI_URL = "https://api.openai.com/v1"
FORMATS = ("json_schema", "json_object", "text")
LONGEST_ANSWER = 4000  # characters that are kept: no answer of the form asked for is longer
MOST_TOKENS = 10**9  # a larger count of tokens in one reply is not believed
LONGEST_WAIT = 300.0  # seconds that a server may ask for

_BLOCKED = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"}
_AGAIN = {408, 409, 425, 429}  # and all from 500 on
_NO_USE = {401: "the API key is not accepted", 403: "not allowed for this API key", 404: "not found"}


@dataclasses.dataclass(frozen=True)
class Reply:
    """A paid reply: the text of the answer, None for a refusal, and its tokens."""

    text: str | None
    tokens_in: int
    tokens_out: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a judge is asked: all of it decides the answer."""

    judge: str  # PROVIDER:MODEL
    base_url: str = ""  # empty: the provider's own
    max_tokens: int = 1024  # of an answer, thoughts included
    temperature: float | None = None  # None: the model's own
    response_format: str = "json_schema"


class Unavailable(Exception):
    """No answer this time; worth another try after `after` seconds."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class Rejected(Exception):
    """The server will not take this question."""


class Judge(abc.ABC):
    """One model, asked over `client`, an httpx2.AsyncClient (label/client.py)."""

    variables: tuple[str, ...] = ()
    """Environment variables: the first that is set is the key."""

    def __init__(self, settings: Settings, client: Any):
        self.model, self.settings, self.client = settings.judge.partition(":")[2], settings, client
        self.key = _key(self.variables, optional=bool(settings.base_url))

    @abc.abstractmethod
    async def ask(self, question: Question) -> Reply:
        """Ask once. Raises Unavailable, Rejected, the client's errors, or UserError where all questions would fail."""

    def failure(self, status: int, message: str, headers: Mapping[str, str]) -> Exception:
        """The error that an HTTP status means."""
        reason = self.hidden(f"HTTP {status}: {one_line(ValueError(message))[:200]}")
        if status in _NO_USE:
            fix = "correct --judge or --base_url" if status == 404 else f"set {self.variables[0]}"
            return UserError(f"--judge={self.settings.judge}: {_NO_USE[status]} ({reason}); {fix}")
        if status in _AGAIN or status >= 500:
            return Unavailable(reason, retry_after(headers.get("retry-after", "")))
        return Rejected(reason)

    def hidden(self, text: str) -> str:
        """The text without the key, should a server have sent it back."""
        return text.replace(self.key, "[key]") if self.key else text

    def reply(self, question: Question, text: str | None, tokens_in: Any, tokens_out: Any) -> Reply:
        """A reply, with the tokens that the server counts, or about as many where it counts none."""
        kept = None if text is None else self.hidden(text)[:LONGEST_ANSWER]
        return Reply(
            kept, _count(tokens_in) or question.tokens, _count(tokens_out) or about_tokens(kept or "")
        )


class OpenAI(Judge):
    """POST BASE_URL/chat/completions: OpenAI, vLLM, llama.cpp, Ollama and many more."""

    variables = ("OPENAI_API_KEY",)

    async def ask(self, question: Question) -> Reply:
        url = f"{(self.settings.base_url or OPENAI_URL).rstrip('/')}/chat/completions"
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        response = await self.client.post(url, json=self._body(question), headers=headers)
        if response.status_code != 200:
            text = response.content[:2000].decode("utf-8", "replace")
            if response.status_code == 400 and "content_filter" in text:
                return self.reply(question, None, 0, 0)
            raise self.failure(response.status_code, text, response.headers)
        try:
            answer = loads(response.content.decode())
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text = _answer(choice["message"], choice.get("finish_reason"))
            tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise Unavailable("HTTP 200 with no chat completion in it") from e
        return self.reply(question, text, *tokens)

    def _body(self, question: Question) -> dict[str, Any]:
        settings = self.settings
        # OpenAI's own models that think know only the new name, many other servers only the old one.
        limit = "max_tokens" if settings.base_url else "max_completion_tokens"
        roles = ("system", question.system), ("user", question.text)
        body = {"model": self.model, limit: settings.max_tokens}
        body |= {"messages": [{"role": role, "content": text} for role, text in roles]}
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if settings.response_format == "json_schema":
            schema = {"name": "score", "schema": SCHEMA, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif settings.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body


class Google(Judge):
    """Gemini by google-genai."""

    variables = ("GEMINI_API_KEY", "GOOGLE_API_KEY")

    def __init__(self, settings: Settings, client: Any):
        super().__init__(settings, client)
        _require("google.genai", "google-genai")
        from google import genai
        from google.genai import errors, types

        # Without our client the library has no time limit and retries on its own.
        options = types.HttpOptions(
            base_url=settings.base_url or None,
            httpx_async_client=client,
            retry_options=types.HttpRetryOptions(attempts=1),
        )
        # The library does not start without a key, and the user's own server may need none.
        own = genai.Client(api_key=self.key or "none", vertexai=False, http_options=options)
        self._models, self._error, self._config = own.aio.models, errors.APIError, types.GenerateContentConfig

    async def ask(self, question: Question) -> Reply:
        try:
            response = await self._models.generate_content(
                model=self.model, contents=question.text, config=self._settings(question)
            )
            text, usage = None if _is_blocked(response) else response.text or "", response.usage_metadata
        except self._error as e:
            raise self.failure(e.code or 500, str(e.message), _headers(e)) from e
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise Unavailable("HTTP 200 with no generated content in it") from e
        counted = [
            getattr(usage, f"{part}_token_count", None) for part in ("prompt", "candidates", "thoughts")
        ]
        return self.reply(question, text, counted[0], sum(map(_count, counted[1:])))

    def _settings(self, question: Question) -> Any:
        form = self.settings.response_format
        return self._config(
            system_instruction=question.system,
            max_output_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            response_mime_type="text/plain" if form == "text" else "application/json",
            response_json_schema=SCHEMA if form == "json_schema" else None,
        )


PROVIDERS: dict[str, type[Judge]] = {"openai": OpenAI, "google": Google}


def check(settings: Settings) -> None:
    """UserError for a judge or an address that cannot be one, or whose library is not installed."""
    provider, _, model = settings.judge.partition(":")
    if provider not in PROVIDERS:
        raise unknown_name("--judge", provider, [f"{name}:MODEL" for name in PROVIDERS])
    if not model:
        raise UserError(f"--judge={settings.judge}: names no model; write {provider}:MODEL")
    if settings.base_url and not _is_address(settings.base_url):
        raise UserError("--base_url: is not an address; it must begin with https:// or http://")
    if settings.response_format not in FORMATS:
        raise unknown_name("--response_format", settings.response_format, FORMATS)
    for library in ("httpx2", "tenacity"):
        _require(library, library)


def _is_address(url: str) -> bool:
    try:
        return re.match(r"https?://[^/]", url) is not None and urllib.parse.urlsplit(url).port != 0
    except ValueError:  # no such port or IPv6 address
        return False


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; at most LONGEST_WAIT, else 0."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value := value.strip()):
        return min(float(value), LONGEST_WAIT)
    try:
        then = email.utils.parsedate_to_datetime(value)
        seconds = (then - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _require(module: str, package: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a parent
        found = None
    if found is None:
        raise UserError(f"--judge: {package} is not installed; pip install 'listopd_jax[label]'")


def _key(variables: tuple[str, ...], optional: bool) -> str:
    """The API key; UserError, which does not show it, if there is none or it cannot be put in a header."""
    key = next((found for v in variables if (found := os.environ.get(v, "").strip())), "")
    if not key and not optional:
        raise UserError(f"{' or '.join(variables)} is not set in the environment: it is the judge's API key")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"{variables[0]}: holds a character that no API key has; copy the key again")
    return key


def _answer(message: Mapping[str, Any], finish: Any) -> str | None:
    """The text of a chat message, '' where it has none; None for a refusal."""
    if message.get("refusal") or finish == "content_filter":
        return None
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _headers(error: Any) -> dict[str, str]:
    """The headers of Google's error, and where they say nothing the pause that its body asks for."""
    asked = re.search(r"'retryDelay': '([0-9.]+)s'", str(error.details))
    return ({"retry-after": asked[1]} if asked else {}) | dict(error.response.headers)


def _is_blocked(response: Any) -> bool:
    """Whether Google refused the question, or withheld the answer."""
    if response.prompt_feedback and response.prompt_feedback.block_reason:
        return True
    finish = response.candidates[0].finish_reason
    return finish is not None and finish.name in _BLOCKED


def _count(value: Any) -> int:
    """The tokens that a server counts; 0 for anything but a count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_TOKENS else 0
