"""What a task is: how a record is put to the model, what counts as a valid answer, and what that is worth.

A record is any object with a unique string `key`; only its task looks inside. A prompt is a text, or the messages of a
chat: {"role": "system" | "user" | "assistant" | "tool", "content": text}, the last of them not the assistant's.
"""

import abc
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from listopd_jax.task.contract import OK, Parsed, plain_classes

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
Corruption = Callable[[Any, random.Random], str]


@dataclass(frozen=True)
class Splits:
    """The records of a task and what data/report.json says about them: `fingerprint` and `notes` among the rest."""

    train: Sequence[Any]
    validation: Sequence[Any]
    report: dict[str, Any]


class Task(abc.ABC):
    """One task. Made once per run from the sections `data` and `task` of its config.

    `splits` is called first, and may still set the attributes, e.g. by what the records have; no other method changes
    anything.

    Attributes:
      name: its name in records and messages.
      failures: the classes of `parse` that every record of a policy counts, 'ok' first; others may occur too.
      metrics: what `score` may give, in the order of the record; 'parse' is added to it.
      useful: in words, what the metric 'useful' is, by which the best policy is chosen.
      corruptions: name → f(record, rng), its right answer with an error, for noise in SFT.
      settings: further fields of each record of a policy that say how it was scored.
    """

    name: ClassVar[str] = "task"
    failures: Sequence[str] = (OK,)
    metrics: Sequence[str] = ("parse", "useful")
    useful: str = "useful"
    corruptions: Mapping[str, Corruption] = {}
    settings: Mapping[str, Any] = {}

    def __init__(self, data: Any, options: Any):
        self.data, self.options = data, options

    @abc.abstractmethod
    def splits(self, folder: Any) -> Splits:
        """The records of both splits; `folder`, of the workdir, may keep what is made of them."""

    @abc.abstractmethod
    def prompt(self, record: Any) -> Prompt:
        """The prompt for the model."""

    @abc.abstractmethod
    def answer(self, record: Any) -> str | None:
        """The right answer, which SFT trains on; None where there is none."""

    @abc.abstractmethod
    def parse(self, text: str, record: Any) -> Parsed:
        """Judge an answer. Total: every text gets a verdict, none raises."""

    @abc.abstractmethod
    def score(self, parsed: Parsed, record: Any) -> Mapping[str, float]:
        """The metrics of one judged answer, failed ones too; what is left out or NaN is undefined."""

    def schema(self, record: Any) -> Mapping[str, Any] | None:
        """The JSON Schema that constrained decoding keeps an answer to; None: there is none."""
        return None

    def repair(self, text: str, record: Any) -> Parsed | None:
        """`parse` after the task's own repair of an answer, reported next to the strict verdict; None: it has none."""
        return None

    def teacher_prompt(self, record: Any) -> Prompt | None:
        """The prompt for teachers in place of `prompt` (a hint, examples, the answer); None: the same.

        Read only where `teachers.max_prompt` says how long it may be.
        """
        return None

    def fields(self, record: Any) -> Mapping[str, Any]:
        """The fields that `teachers.field` may name; by default the record's attributes."""
        return getattr(record, "__dict__", {})

    def token_classes(self, pieces: Sequence[str]) -> list[int]:
        """The role of each token of one completion, as indices into contract.TOKEN_CLASSES; "" is the end.

        By default the end alone is structure.
        """
        return plain_classes(pieces)

    def shortened(self, record: Any) -> Iterable[tuple[Callable[[int], Any], int]]:
        """Ways to cut a record whose prompt is too long, best first: (size → record, the size of the whole)."""
        return ()

    def hint(self, records: Sequence[Any]) -> str:
        """An answer of the task's form, from which drafts are copied."""
        return next((text for r in records if (text := self.answer(r)) is not None), "")

    def shown(self, parsed: Parsed, record: Any) -> dict[str, Any]:
        """What an example shows of the record's truth and of the answer, in JSON values."""
        return {} if (right := self.answer(record)) is None else {"extra": {"right": right}}
