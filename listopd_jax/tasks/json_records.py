"""JSON answers under a JSON Schema: any extraction, call or form, as JSON lines and without a line of Python.

A line is {"prompt": text or "messages": […], "answer": value, "schema": {…}}; answer and schema are optional, and
`task.schema` is the schema of the lines that have none. "teacher_prompt", a text or messages, is read only by teachers
(`teachers.max_prompt`), and any field that is not ours may name the line's teacher (`teachers.field`).

An answer holds the contract iff the whole text is strict JSON (task/strict_json.py) that the schema accepts. It is
'no_json', or fails by the part of the schema that it breaks: by its path in `task.schema`, by the keyword alone where
every line has a schema of its own.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from listopd_jax.data.json_lines import read_objects
from listopd_jax.data.splits import SIDES
from listopd_jax.errors import UserError, did_you_mean
from listopd_jax.task.contract import OK, Parsed, token_classes
from listopd_jax.task.corruptions import json_corruptions
from listopd_jax.task.protocol import Prompt, Splits
from listopd_jax.task.schema import Contract
from listopd_jax.task.strict_json import dumps, loads, same
from listopd_jax.tasks.file_task import FileTask

FIELDS = ("prompt", "messages", "answer", "schema", "teacher_prompt")
MOST_FIELDS = 20  # top-level fields with an accuracy of their own
LONGEST_NAME = 80  # characters of such a field


@dataclasses.dataclass(frozen=True)
class JsonRecord:
    """One line; `answer` is None where it has none, `side` None where no field says."""

    key: str
    prompt: Prompt
    answer: Any
    contract: Contract
    side: str | None = None
    teacher_prompt: Prompt | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # all further fields


class JsonTask(FileTask):
    """Strict JSON that a schema accepts; the value of an answer is what the JSON spells."""

    name = "json"
    failures = (OK, "no_json")
    useful = "the share of the right answer’s fields that are right, 0 for a failed answer"
    inputs = (*FileTask.inputs, "task.schema")

    def __init__(self, data: Any, options: Any):
        super().__init__(data, options)
        self.corruptions = json_corruptions(self.answer)
        schema = _schema_file(options.schema) if options.schema else {}
        self._contract = Contract(schema, options.schema) if options.schema else None
        self._declared = tuple(schema["properties"]) if isinstance(schema.get("properties"), dict) else ()
        self._score_fields([])

    def splits(self, folder: pathlib.Path) -> Splits:
        """Read and split; the fields of the right answers, too, have accuracies of their own from now on."""
        found = super().splits(folder)
        self._score_fields([r.answer for r in (*found.train, *found.validation)])
        return found

    def read(self, path: pathlib.Path) -> Iterator[JsonRecord]:
        """The lines of the file; UserError names the line and field that is wrong."""
        contracts: dict[str, Contract] = {}
        for number, row in read_objects(path):
            yield self._record(row, f"{path.name}:{number}", f"{path}:{number}", contracts)

    def side(self, record: JsonRecord) -> str | None:
        """The line's value of `data.split_field`."""
        return record.side

    def prompt(self, record: JsonRecord) -> Prompt:
        """The prompt or messages as the line has them."""
        return record.prompt

    def teacher_prompt(self, record: JsonRecord) -> Prompt | None:
        """The line's own."""
        return record.teacher_prompt

    def fields(self, record: JsonRecord) -> Mapping[str, Any]:
        """The line's further fields."""
        return record.others

    def answer(self, record: JsonRecord) -> str | None:
        """Compact JSON."""
        return None if record.answer is None else dumps(record.answer)

    def parse(self, text: str, record: JsonRecord) -> Parsed:
        """Strict JSON first, then the schema."""
        try:
            value = loads(text)
        except ValueError:
            return Parsed("no_json")
        failure = record.contract.failure(value)
        return Parsed(OK, value) if failure == OK else Parsed(failure)

    def schema(self, record: JsonRecord) -> dict[str, Any]:
        """The line's own, or `task.schema`."""
        return record.contract.schema

    def score(self, parsed: Parsed, record: JsonRecord) -> dict[str, float]:
        """Exact match and accuracies where there is a right answer; useful counts a failed answer as 0."""
        if record.answer is None:
            return {}
        if not parsed.ok:
            return {"useful": 0.0, "exact_match": 0.0}
        right = share_right(parsed.value, record.answer)
        own = {_accuracy(f): float(_same_field(parsed.value, record.answer, f)) for f in self._fields}
        return {
            "useful": right,
            "exact_match": float(same(parsed.value, record.answer)),
            "fields": right,
            **own,
        }

    def token_classes(self, pieces: Sequence[str]) -> list[int]:
        """Marks and keys are structure, values are not."""
        return token_classes(pieces, opening="[{", values={})

    def _score_fields(self, answers: Sequence[Any]) -> None:
        """Score the declared fields and those of the right answers: of more than MOST_FIELDS the most frequent.

        Only those whose names can name metrics: one printable line of at most LONGEST_NAME characters.
        """
        counts = Counter(name for answer in answers if isinstance(answer, dict) for name in answer)
        often = sorted(counts, key=lambda name: (-counts[name], name))
        named = (x for x in (*self._declared, *often) if x.isprintable() and len(x) <= LONGEST_NAME)
        known = dict.fromkeys(named)
        kept = set(sorted(known, key=lambda name: -counts[name])[:MOST_FIELDS])
        self._fields = tuple(name for name in known if name in kept)
        self.metrics = ("parse", "useful", "exact_match", "fields", *map(_accuracy, self._fields))

    def _record(
        self, row: dict[str, Any], key: str, where: str, contracts: dict[str, Contract]
    ) -> JsonRecord:
        _check_fields(row, where)
        contract = self._contract_of(row, where, contracts)
        answer = row.get("answer")
        if answer is not None and (problem := contract.explain(answer)):
            raise UserError(f"{where}: 'answer' breaks its schema {problem}; {_answer_fix(answer)}")
        prompt = row["prompt"] if "prompt" in row else row["messages"]
        side = _side(row, self.data.split_field, where)
        others = {field: value for field, value in row.items() if field not in FIELDS}
        return JsonRecord(key, prompt, answer, contract, side, row.get("teacher_prompt"), others)

    def _contract_of(self, row: dict[str, Any], where: str, contracts: dict[str, Contract]) -> Contract:
        """The contract of a line; equal schemas share one."""
        if "schema" not in row:
            if self._contract is None:
                raise UserError(f"{where}: has no 'schema', and task.schema is not set; give one of them")
            return self._contract
        text = dumps(row["schema"])
        if text not in contracts:
            contracts[text] = Contract(row["schema"], f"{where}: 'schema'", by_path=False)
        return contracts[text]


class Prompts(JsonTask):
    """JSON lines that a pair of models is asked, all of them, and none is trained on.

    Where neither a line nor `task.schema` has a schema, any strict JSON holds the contract.
    """

    def __init__(self, data: Any, options: Any):
        super().__init__(data, options)
        self._contract = self._contract or Contract({}, "no contract")

    def divided(self, records: Sequence[JsonRecord]) -> dict[str, list[JsonRecord]]:
        """Every record on both sides: drafts are copied from the answers of the one, the other is asked."""
        return {side: list(records) for side in SIDES}

    def _report(self, paths: dict[str, pathlib.Path], split: dict[str, list[Any]]) -> dict[str, Any]:
        return super()._report(paths, split) | {"notes": []}  # they are about training


def share_right(value: Any, right: Any) -> float:
    """The share of the fields of either answer that are equal in both; for answers that are not objects, 0 or 1."""
    if not (isinstance(value, dict) and isinstance(right, dict)) or not (value or right):
        return float(same(value, right))
    names = value.keys() | right.keys()
    return sum(_same_field(value, right, name) for name in names) / len(names)


def _same_field(value: Any, right: Any, name: str) -> bool:
    """Whether both have the field and agree on it, or neither has it."""
    a, b = (x if isinstance(x, dict) else {} for x in (value, right))
    return (name in a) == (name in b) and same(a.get(name), b.get(name))


def _accuracy(field: str) -> str:
    return f"field {field}"


def _schema_file(path: str) -> Any:
    """The value of `task.schema`; UserError if it cannot be read or is not strict JSON."""
    try:
        schema = loads(pathlib.Path(path).read_text("utf-8-sig"))
    except OSError as e:
        raise UserError(
            f"task.schema={path}: cannot be read ({e.strerror}); name a file with a JSON Schema"
        ) from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8") from e
    except ValueError as e:
        raise UserError(f"{path}: {e}; correct the schema") from e
    return schema


def _check_fields(row: Mapping[str, Any], where: str) -> None:
    """UserError for a line without a prompt or with two, or for a field that seems to be a misspelt one of FIELDS."""
    for field in row.keys() - set(FIELDS):
        if meant := did_you_mean(field, [f for f in FIELDS if f not in row], cutoff=0.8):
            raise UserError(f"{where}: unknown field {field!r}; {meant}rename it")
    given = [field for field in ("prompt", "messages") if field in row]
    if len(given) != 1:
        what = "has both 'prompt' and 'messages'" if given else "has neither 'prompt' nor 'messages'"
        raise UserError(f"{where}: {what}; give one of them")
    kind, what = (str, "a text") if given == ["prompt"] else (list, "a list of messages")
    if not isinstance(row[given[0]], kind):
        raise UserError(f"{where}: {given[0]!r} is {type(row[given[0]]).__name__}, not {what}; correct it")


def _answer_fix(answer: Any) -> str:
    """How to fix an answer; the usual mistake is JSON inside a text."""
    if isinstance(answer, str) and answer.lstrip()[:1] in ("{", "["):
        return "it is a text that holds JSON: write it as JSON, without the quotes around it"
    return "correct the answer or the schema"


def _side(row: Mapping[str, Any], field: str, where: str) -> str | None:
    if not field:
        return None
    side = row.get(field)
    if side not in SIDES:
        raise UserError(
            f"{where}: {field!r} (data.split_field) is {side!r}; every line must say {' or '.join(map(repr, SIDES))}"
        )
    return side
