"""JSON Schema as a contract: a schema that can be trusted, and the class of each failure.

Schemas and the values that they judge are hostile: a reference is never fetched, and a pattern gets MATCH_SECONDS.
"""

import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import referencing
import referencing.jsonschema
import regex
from jsonschema.exceptions import ValidationError, best_match

from listopd_jax.errors import UserError, is_panic, one_line, shortened
from listopd_jax.task.contract import OK

MATCH_SECONDS = 1.0
_PROBE_SECONDS = 0.1
_PROBE_LENGTH = 40

_FIX = "correct the schema"
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


class Contract:
    """One JSON Schema, checked once: `failure(value)` is 'ok' or the class of the failure.

    `where` begins the UserError for a schema that is invalid, has a reference that leads out of it or nowhere, or a
    pattern that takes exponential time. With `by_path` a class is the path in the schema that failed, as in
    `price/minimum`; without, for schemas that differ from record to record, only the keyword. `schema` is the schema.
    """

    def __init__(self, schema: Any, where: str, by_path: bool = True):
        if not isinstance(schema, dict):
            raise UserError(f"{where}: a JSON Schema is an object, this is {type(schema).__name__}; {_FIX}")
        kind, self.schema, self._by_path = _version(schema, where), schema, by_path
        _check_parts(kind, schema, where)
        # A registry that is given is asked instead of the network.
        self._validator = _bounded(kind)(schema, registry=referencing.Registry())
        self._check_recursion(where)

    def failure(self, value: Any) -> str:
        """'ok', or the class of the error that explains best why `value` breaks the schema."""
        try:
            error = self._error(value)
        except RecursionError:
            return "nesting"
        return OK if error is None else self._name(error)

    def explain(self, value: Any) -> str | None:
        """The failure of `value`, where in it and why, in one short line; None if there is none."""
        try:
            error = self._error(value)
        except RecursionError:
            return "at $: nested too deeply for its schema"
        return None if error is None else f"at {error.json_path}: {_short(error)}"

    def _error(self, value: Any) -> ValidationError | None:
        """The error that explains best why `value` breaks the schema; RecursionError if they nest too deeply."""
        try:
            return best_match(self._validator.iter_errors(value))
        except BaseException as e:
            if is_panic(e):  # of rpds, which keeps jsonschema's types: the limit may be reached inside it
                raise RecursionError from e
            raise

    def _name(self, error: ValidationError) -> str:
        keyword = str(error.validator)
        return "/".join([*_steps(error), keyword])[:80] if self._by_path else keyword

    def _check_recursion(self, where: str) -> None:
        # A keyword looks at values of its own type, so an endless reference may show on one of these alone.
        for value in (None, {}, [], "", 0):
            try:
                self._error(value)
            except RecursionError as e:
                raise UserError(f"{where}: the schema refers to itself without end; {_FIX}") from e


def _short(error: Any) -> str:
    # What is wrong comes after the value that is, which may be long.
    return shortened(" ".join(error.message.split()), 160)


def _steps(error: ValidationError) -> list[str]:
    """The names of the properties on the way to what failed, a missing one too; [] stands for any item."""
    path = [str(part) for part in error.absolute_schema_path][:-1]
    steps, at = [], 0
    while at < len(path):
        named = path[at] in ("properties", "patternProperties") and at + 1 < len(path)
        at += named
        steps.append("[]" if path[at] in ("items", "prefixItems") and not named else path[at])
        at += 1
    if error.validator == "required" and isinstance(error.validator_value, list):
        steps += [name for name in error.validator_value if name not in error.instance][:1]
    return [step for step in steps if step not in _REFERENCES]


def _version(schema: dict[str, Any], where: str) -> type:
    named = schema.get("$schema")
    if named is None:
        return jsonschema.Draft202012Validator
    kind = jsonschema.validators.validator_for(schema, default=None) if isinstance(named, str) else None
    if kind is jsonschema.Draft3Validator:
        raise UserError(
            f"{where}: $schema={named!r} is too old; write the schema in draft-04 or a later version"
        )
    if kind is None:
        raise UserError(
            f"{where}: $schema={named!r} is not a known version of JSON Schema; use "
            "https://json-schema.org/draft/2020-12/schema"
        )
    return kind


def _check_schema(kind: type, schema: Any, where: str) -> None:
    try:
        # No formats: "regex" would ask Python's re, but patterns are run by `regex` (see _check_pattern).
        kind.check_schema(schema, format_checker=jsonschema.FormatChecker(formats=()))
    except jsonschema.SchemaError as e:
        raise UserError(f"{where}: at {e.json_path}: {_short(e)}; {_FIX}") from e
    except RecursionError as e:
        raise UserError(f"{where}: the schema is nested too deeply; {_FIX}") from e


def _check_parts(kind: type, schema: dict[str, Any], where: str) -> None:
    """UserError for a part of the schema, or of what its references lead to, that cannot be used."""
    try:
        parts = list(_parts(kind, schema, where))
    except UserError:
        raise
    except Exception as e:  # referencing trusts what it reads: an odd address or anchor can raise anything
        raise UserError(f"{where}: cannot be read ({type(e).__name__}: {one_line(e)[:80]}); {_FIX}") from e
    evaluates = any("unevaluatedProperties" in part for part in parts)
    for part in parts:
        for pattern in (part.get("pattern"), *_keys(part.get("patternProperties"))):
            if isinstance(pattern, str):
                _check_pattern(pattern, where)
        for pattern in _keys(part.get("patternProperties")) if evaluates else ():
            _check_plain(pattern, where)


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _parts(kind: type, schema: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Every schema in a schema, and in what its references lead to, which may lie under any key; each of them once.

    UserError for a reference that leads nowhere, or to anything but a schema of the version `kind`.
    """
    _check_schema(kind, schema, where)
    known = [keyword for keyword in _REFERENCES if keyword in kind.VALIDATORS]  # its version ignores others
    version = referencing.jsonschema.specification_with(kind.META_SCHEMA["$schema"])
    root = version.create_resource(schema)
    registry = referencing.Registry().with_resource(root.id() or "", root)
    targets, seen = deque([(schema, registry.resolver_with_root(root), where)]), set()
    while targets:
        target, resolver, here = targets.popleft()
        if target is not schema and id(target) not in seen:
            _check_schema(kind, target, here)
        for part, at in _inside(version, target, resolver, seen):
            yield part
            names = [(k, part[k]) for k in known if isinstance(part.get(k), str)]
            targets.extend(_resolve(at, name, where, keyword) for keyword, name in names)


def _inside(
    version: referencing.Specification, part: Any, resolver: Any, seen: set[int]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """A schema and every schema in it that is not `seen` yet, and what resolves the references in it."""
    if not isinstance(part, dict) or id(part) in seen:
        return
    seen.add(id(part))
    yield part, resolver
    # referencing looks at the first of the dependencies alone, and takes the rest for lists of names if that is one.
    old = part.get("dependencies")
    for inner in (*version.subresources_of(part), *(old.values() if isinstance(old, dict) else ())):
        if isinstance(inner, dict):
            yield from _inside(version, inner, resolver.in_subresource(version.create_resource(inner)), seen)


def _resolve(resolver: Any, name: str, where: str, keyword: str) -> tuple[Any, Any, str]:
    """What a reference names, what resolves the references in it, and its name in messages."""
    called = f"{where}: {keyword}={name[:80]!r}"
    try:
        found = resolver.lookup(name)
    except Exception as e:  # also of what a pointer leads through, which may be anything
        remote = not name.startswith("#")
        why = "leads out of the file, and nothing is fetched; copy what it names into $defs" if remote else ""
        raise UserError(f"{called} {why or f'names nothing in the schema; {_FIX}'}") from e
    return found.contents, found.resolver, called


def _check_pattern(pattern: str, where: str) -> None:
    """UserError for an invalid pattern, or one that takes exponential time on a text of one repeated character."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as e:
        raise UserError(f"{where}: pattern {pattern[:60]!r} is not a regular expression ({e}); {_FIX}") from e
    for character in sorted({*pattern, "a", "0", " ", "_", "-"}):
        # The second end makes most patterns fail, and it is failing that takes exponential time.
        for end in ("", "\x00"):
            try:
                compiled.search(character * _PROBE_LENGTH + end, timeout=_PROBE_SECONDS)
            except TimeoutError as e:
                raise UserError(
                    f"{where}: pattern {pattern[:60]!r} takes exponential time on {character * 3 + '…'!r}; write it "
                    "without a repeat inside a repeat"
                ) from e


def _check_plain(pattern: str, where: str) -> None:
    """UserError for a pattern that Python's re does not know: jsonschema uses re to find what is evaluated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise UserError(
            f"{where}: pattern {pattern[:60]!r} next to unevaluatedProperties is not one that Python's re knows ({e}); "
            "use additionalProperties, or another pattern"
        ) from e


def _matches(pattern: str, text: str) -> bool:
    """Whether the pattern is found in time: one that takes longer counts as not found."""
    try:
        return regex.search(pattern, text, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        return False


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError(f"{instance[:60]!r} does not match {pattern[:60]!r}")


def _pattern_properties(
    validator: Any, patterns: Any, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, inner in patterns.items():
            for name in instance:
                if _matches(pattern, name):
                    yield from validator.descend(instance[name], inner, path=name, schema_path=pattern)


def _additional_properties(
    validator: Any, additional: Any, instance: Any, schema: Any
) -> Iterator[ValidationError]:
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name in instance if isinstance(instance, dict) else ():
        if name in known or any(_matches(pattern, name) for pattern in patterns):
            continue
        if isinstance(additional, dict):
            yield from validator.descend(instance[name], additional, path=name)
        elif additional is False:
            yield ValidationError(f"{name[:60]!r} is not an allowed property")


def _bounded(kind: type) -> type:
    """The validators of a version, with a time limit for patterns."""
    own = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    bounded = jsonschema.validators.extend(kind, {k: f for k, f in own.items() if k in kind.VALIDATORS})
    bounded.evolve, bounded.descend = _evolve, _descend(bounded.descend)
    return bounded


def _descend(follow: Callable) -> Callable:
    """jsonschema's own, but what breaks the schema `false` has a keyword, `false`, and its place in the schema."""

    def descend(validator, instance, schema, path=None, schema_path=None, resolver=None):
        if schema is not False:
            yield from follow(validator, instance, schema, path, schema_path, resolver)
            return
        yield ValidationError(
            "nothing is allowed here",
            validator="false",
            path=[] if path is None else [path],
            schema_path=["false"] if schema_path is None else [schema_path, "false"],
        )

    return descend


def _evolve(validator: Any, **changes: Any) -> Any:
    """jsonschema's own follows a `$schema` inside the schema, to validators without time limit; this one stays here."""
    return type(validator)(**({"schema": validator.schema, "_resolver": validator._resolver} | changes))
