"""Ask many questions at once: paced, tried again where that may help, every reply kept as it comes."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping

import httpx2
import tenacity

from listopd_jax.errors import UserError, one_line
from listopd_jax.label.judges import Judge, Rejected, Reply, Unavailable
from listopd_jax.label.questions import Question

IN_A_ROW = 20
"""Questions in a row without a reply: the server is down, or speaks another protocol."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on the load of a server."""

    concurrency: int = 8  # requests in flight
    per_minute: float = 60.0  # requests that begin; 0: no limit
    timeout: float = 60.0  # seconds from a request to the end of its reply
    attempts: int = 6  # of one question
    backoff: float = 1.0  # seconds: the n-th wait is random in [0, backoff · 2^(n-1)], at most 60


@dataclasses.dataclass
class Unanswered:
    """Questions without a reply so far, and why the last of them has none."""

    count: int = 0
    in_a_row: int = 0
    reason: str = ""

    def add(self, reason: str) -> None:
        """One more; UserError if it is the IN_A_ROW-th in a row."""
        self.count, self.in_a_row, self.reason = self.count + 1, self.in_a_row + 1, reason
        if self.in_a_row >= IN_A_ROW:
            raise UserError(
                f"the judge left {self.in_a_row} questions in a row without a reply, the last with: {reason}; fix "
                "that and run the command again: it asks no question twice"
            )


class Pacer:
    """Lets requests begin at least `interval` seconds apart, in the order in which they ask."""

    def __init__(self, interval: float):
        self._interval, self._next, self._line = interval, 0.0, asyncio.Lock()

    async def turn(self) -> None:
        """Wait until the next request may begin."""
        now = asyncio.get_running_loop().time
        async with self._line:
            # A loop, because `hold` may move the turn while this one sleeps.
            while (wait := self._next - now()) > 0:
                await asyncio.sleep(wait)
            self._next = now() + self._interval

    def hold(self, seconds: float) -> None:
        """Let none begin for `seconds`: a pause that the server asks of one request holds for all."""
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)


async def ask_all(
    judge: Judge, questions: Mapping[str, Question], limits: Limits, keep: Callable[[str, Reply], None]
) -> Unanswered:
    """Ask every question and `keep` each reply, by the question's name, at once; returns what got none.

    Raises UserError at the first sign that no question will get a reply, and what `keep` raises. Closes the judge.
    """
    pacer = Pacer(60 / limits.per_minute if limits.per_minute else 0.0)
    left, unanswered = iter(questions.items()), Unanswered()

    async def work() -> None:
        for name, question in left:  # shared: each worker takes the next one
            try:
                reply = await _reply(judge, question, limits, pacer)
            except (Unavailable, Rejected) as e:
                unanswered.add(str(e))
            else:
                keep(name, reply)
                unanswered.in_a_row = 0

    try:
        async with judge.client, asyncio.TaskGroup() as workers:
            for _ in range(limits.concurrency):
                workers.create_task(work())
    except BaseExceptionGroup as group:
        # The first one ended the group; the others were cancelled by it.
        raise group.exceptions[0] from None
    return unanswered


async def _reply(judge: Judge, question: Question, limits: Limits, pacer: Pacer) -> Reply:
    """The reply to one question, after as many attempts as it takes and the limits allow."""
    again = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        stop=tenacity.stop_after_attempt(limits.attempts),
        wait=tenacity.wait_random_exponential(limits.backoff, max=60),
        reraise=True,
    )
    return await again(_attempt, judge, question, limits.timeout, pacer)


async def _attempt(judge: Judge, question: Question, timeout: float, pacer: Pacer) -> Reply:
    await pacer.turn()
    try:
        async with asyncio.timeout(timeout):  # the client's own restarts with every byte
            return await judge.ask(question)
    except Unavailable as e:
        pacer.hold(e.after)
        raise
    except TimeoutError as e:
        raise Unavailable(f"no reply within {timeout:g} s") from e
    except httpx2.HTTPError as e:
        raise Unavailable(judge.hidden(f"{type(e).__name__}: {one_line(e)[:200]}")) from e
