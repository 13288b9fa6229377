"""The cost of judging: the estimate before it, and the sum so far."""

import dataclasses
from collections.abc import Sequence

from listopd_jax.errors import UserError
from listopd_jax.label.judges import Reply
from listopd_jax.label.questions import ANSWER_TOKENS, Question

MILLION = 1_000_000


def cost(tokens_in: int, tokens_out: int, price_in: float | None, price_out: float | None) -> float | None:
    """The cost of tokens at prices per million; None where a price is not known."""
    if price_in is None or price_out is None:
        return None
    return (tokens_in * price_in + tokens_out * price_out) / MILLION


def estimate(
    total: int, pending: Sequence[Question], max_tokens: int, price_in: float | None, price_out: float | None
) -> str:
    """In words: requests, tokens and cost of the pending ones of `total` questions."""
    tokens_in, few, most = (
        sum(q.tokens for q in pending), ANSWER_TOKENS * len(pending), max_tokens * len(pending),
    )  # fmt: skip
    prices = [cost(tokens_in, tokens_out, price_in, price_out) for tokens_out in (few, most)]
    spent = "give --price_in and --price_out for the cost"
    if None not in prices:
        spent = f"cost about {prices[0]:.4g}, at most about {prices[1]:.4g}"
    return (
        f"{total} reviews, {total - len(pending)} judged before: {len(pending)} requests, about {tokens_in} tokens in, "
        f"{few} out (at most {most} with thoughts); {spent}"
    )


@dataclasses.dataclass
class Bill:
    """The tokens of one call so far; `most` is the cost at which it stops."""

    price_in: float | None
    price_out: float | None
    most: float | None
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, reply: Reply) -> None:
        """Add a reply; UserError if that reaches `most`."""
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        if self.most is not None and self.cost >= self.most:
            raise UserError(f"--max_cost={self.most:g} is reached; every reply is kept, a higher one resumes")

    @property
    def cost(self) -> float | None:
        """So far."""
        return cost(self.tokens_in, self.tokens_out, self.price_in, self.price_out)

    def __str__(self) -> str:
        spent = "" if self.cost is None else f", cost {self.cost:.4g}"
        return f"This call: {self.tokens_in} tokens in, {self.tokens_out} out{spent}"
