"""Call a function with arguments: the files of the Berkeley Function Calling Leaderboard as they are published.

`data.path` has the questions (one function each: simple_python), `data.labels` the possible answers. An answer is
{"name": …, "arguments": {…}}; the schema of each record is that of its function. A call is right iff every argument has
one of the accepted values, where "" among them says that it may be left out; texts are compared without case, blanks
and punctuation.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from listopd_jax.data.json_lines import read_objects
from listopd_jax.errors import UserError
from listopd_jax.task.contract import OK, Parsed, token_classes
from listopd_jax.task.corruptions import json_corruptions
from listopd_jax.task.protocol import Message
from listopd_jax.task.schema import Contract
from listopd_jax.task.strict_json import dumps, loads, same
from listopd_jax.tasks.file_task import FileTask

TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""Types of the files that JSON Schema does not have, and what it calls them; None allows all."""

JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

FAILURES = {
    "const": "wrong_name",
    "required": "missing_argument",
    "additionalProperties": "unknown_argument",
    "type": "wrong_type",
    "enum": "wrong_choice",
}
"""The keyword of the schema that fails, and the class of the failure."""

Accepted = Mapping[str, Sequence[Any]]  # argument -> accepted values


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one function; `right` is a call that is accepted, None if the schema allows none."""

    key: str
    messages: tuple[Message, ...]
    accepted: Accepted
    contract: Contract
    right: dict[str, Any] | None


class Bfcl(FileTask):
    """The value of an answer is the object of its arguments."""

    name = "bfcl"
    failures = (OK, "no_json", *FAILURES.values())
    metrics = ("parse", "useful", "arguments")
    useful = "the share of right calls"
    inputs = (*FileTask.inputs, "data.labels")

    def __init__(self, data: Any, options: Any):
        super().__init__(data, options)
        self.corruptions = json_corruptions(self.answer)

    def read(self, path: pathlib.Path) -> Iterator[Question]:
        """The questions with their possible answers."""
        if not self.data.labels:
            raise UserError("data.labels is empty: give the file of possible answers")
        answers = {_field(row, "id", str, w): (row, w) for w, row in _rows(self.data.labels)}
        for where, row in _rows(path):
            if (key := _field(row, "id", str, where)) not in answers:
                raise UserError(f"{where}: id {key!r} has no possible answer in {self.data.labels}")
            yield _question(row, where, *answers[key])

    def prompt(self, record: Question) -> tuple[Message, ...]:
        """The function as the system's message, and the question."""
        return record.messages

    def answer(self, record: Question) -> str | None:
        """The call with the first accepted values."""
        return None if record.right is None else dumps(record.right)

    def parse(self, text: str, record: Question) -> Parsed:
        """Strict JSON, then the schema of the function."""
        try:
            call = loads(text)
        except ValueError:
            return Parsed("no_json")
        failure = record.contract.failure(call)
        return Parsed(OK, call["arguments"]) if failure == OK else Parsed(FAILURES.get(failure, failure))

    def schema(self, record: Question) -> dict[str, Any]:
        """The schema of a call of the function."""
        return record.contract.schema

    def score(self, parsed: Parsed, record: Question) -> dict[str, float]:
        """Whether the call is right, and what share of the arguments is."""
        if not parsed.ok:
            return {"useful": 0.0}
        right = [
            _is_right(name, parsed.value, record.accepted) for name in {**record.accepted, **parsed.value}
        ]
        return {"useful": float(all(right)), "arguments": sum(right) / len(right) if right else 1.0}

    def token_classes(self, pieces: Sequence[str]) -> list[int]:
        """Marks and keys are structure, values are not."""
        return token_classes(pieces, opening="{", values={})


def json_schema(parameters: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The JSON Schema of a description of parameters; its words on each are left to the prompt."""
    if not isinstance(parameters, dict):
        raise UserError(
            f"{where}: a parameter is described by {type(parameters).__name__}, not an object; correct it"
        )
    kind = parameters.get("type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{where}: the type of a parameter is {kind!r}, not a name; correct it")
    # Others are of simple_java and simple_javascript, whose answers are code.
    if kind not in {None, *TYPES, *JSON_TYPES}:
        raise UserError(
            f"{where}: the type of a parameter is {kind[:40]!r}, which simple_python does not have; give its files"
        )
    schema: dict[str, Any] = {"type": name} if (name := TYPES.get(kind, kind)) else {}
    schema |= {word: parameters[word] for word in ("enum", "required") if word in parameters}
    if isinstance(inner := parameters.get("properties"), dict):
        schema["properties"] = {name: json_schema(part, where) for name, part in inner.items()}
        schema["additionalProperties"] = False
    if isinstance(item := parameters.get("items"), dict):
        schema["items"] = json_schema(item, where)
    if name == "array" and "enum" in schema:
        schema.setdefault("items", {})["enum"] = schema.pop("enum")  # the files mean the items
    return schema


def accepts(values: Sequence[Any], value: Any) -> bool:
    """Whether `value` is one of the accepted ones; those of an object accept values for each of its fields."""
    return any(_matches(accepted, value) for accepted in values)


def _matches(accepted: Any, value: Any) -> bool:
    if isinstance(accepted, dict) and isinstance(value, dict):
        return all(_is_right(name, value, accepted) for name in {**accepted, **value})
    if isinstance(accepted, list) and isinstance(value, list):
        return len(accepted) == len(value) and all(map(_matches, accepted, value))
    if isinstance(accepted, str) and isinstance(value, str):
        return _plain(accepted) == _plain(value)
    return same(accepted, value)


def _is_right(name: str, arguments: Mapping[str, Any], accepted: Accepted) -> bool:
    values = accepted.get(name, [])
    return accepts(values, arguments[name]) if name in arguments else "" in values


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _question(row: dict[str, Any], where: str, possible: dict[str, Any], there: str) -> Question:
    key, turns = row["id"], _field(row, "question", list, where)
    functions, truths = _field(row, "function", list, where), _field(possible, "ground_truth", list, there)
    if not len(turns) == len(functions) == len(truths) == 1:
        raise UserError(f"{where}: has several turns, functions or calls; give the simple_python file")
    name, parameters = (
        _field(functions[0], "name", str, where),
        _field(functions[0], "parameters", dict, where),
    )
    accepted = _field(truths[0], name, dict, there)
    _check_accepted(accepted, there)
    properties = {"name": {"const": name}, "arguments": json_schema(parameters, where)}
    outer = {"type": "object", "required": ["name", "arguments"], "additionalProperties": False}
    contract = Contract(outer | {"properties": properties}, where, by_path=False)
    call = {"name": name, "arguments": _first(accepted, parameters.get("required", ()))}
    ask = f'Call this function. Answer {{"name": …, "arguments": {{…}}}} as JSON.\n{dumps(functions[0])}'
    if not isinstance(turns[0], list):
        raise UserError(f"{where}: field 'question' must hold a list of messages; correct it")
    messages = ({"role": "system", "content": ask}, *turns[0])
    return Question(key, messages, accepted, contract, call if contract.failure(call) == OK else None)


def _check_accepted(accepted: Any, where: str) -> None:
    """UserError unless each argument, and each field of an object that is accepted, has a list of values."""
    for name, values in accepted.items() if isinstance(accepted, dict) else ():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: {name[:40]!r} must have a list of accepted values; correct it")
        for value in values:
            for inner in value if isinstance(value, list) else [value]:
                _check_accepted(inner, where)


def _first(accepted: Accepted, required: Sequence[str]) -> dict[str, Any]:
    """The first accepted value of each argument; an optional one whose first value is "" is left out."""
    kept = {n: [v for v in values if v != "" or n in required] for n, values in accepted.items()}
    return {n: _value(kept[n][0]) for n, values in accepted.items() if kept[n] and values[0] == kept[n][0]}


def _value(accepted: Any) -> Any:
    """A value that an accepted one stands for; an object has a list of values for each field, where "" is not one."""
    if isinstance(accepted, dict):
        kept = {name: [value for value in values if value != ""] for name, values in accepted.items()}
        return {name: _value(values[0]) for name, values in kept.items() if values}
    return [_value(item) for item in accepted] if isinstance(accepted, list) else accepted


def _rows(path: str | pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{path}:{number}", row) for number, row in read_objects(path))


def _field(row: Any, name: str, kind: type, where: str) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise UserError(f"{where}: field {name!r} must be a {kind.__name__}; correct it")
    return value
