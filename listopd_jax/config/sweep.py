"""`opd.sweep`: options of section opd that a run trains at several values, in addition to λ and seeds.

    clip=1.5|5, ratio=none|aspo            a product: four points
    clip/lr=1.5/1e-5|5/1e-6                a zip: two points
    lambdas/clip=1.0/inf|1.2/1.5           each λ with a clip of its own

A point is written as its label, "clip=1.5 ratio=aspo", in records, logs and names.
"""

import itertools
import math
from typing import Any

import ml_collections

from listopd_jax.config.fields import defaults, flatten
from listopd_jax.errors import UserError, require, unknown_name

_LISTS = {"lambdas": float, "seeds": int}  # a point has one of each that it names
MOST, LONGEST = 1000, 120  # points of a sweep, characters of a label
_NOT_SWEPT = ("sweep", "recommend", "plain_lambdas", "eval_steps")


def sweep_labels(opd: Any) -> list[str]:
    """The points of section `opd` in order; [""] where it sweeps nothing. UserError for one that cannot be read."""
    axes = [_axis(entry.strip()) for entry in opd.sweep.split(",")] if opd.sweep.strip() else []
    points = math.prod(map(len, axes))
    require(points <= MOST, f"opd.sweep={opd.sweep!r}: has {points} points; at most {MOST} are one run")
    labels = [" ".join(point) for point in itertools.product(*axes)]
    names = [pair.split("=")[0] for pair in labels[0].split()]
    for name in names:
        require(names.count(name) == 1, f"opd.sweep={opd.sweep!r}: {name} is named twice")
    require(
        max(map(len, labels)) <= LONGEST,
        f"opd.sweep={opd.sweep!r}: a point is longer than {LONGEST} characters, which name files; sweep fewer options",
    )
    require(len(set(labels)) == len(labels), f"opd.sweep={opd.sweep!r}: a point appears twice")
    return labels


def _axis(entry: str) -> list[str]:
    """The labels of one axis, "clip/lr=1.5/1e-5|5/1e-6"."""
    names, equals, values = (part.strip() for part in entry.partition("="))
    fields, points = names.split("/"), [value.split("/") for value in values.split("|")]
    require(
        bool(equals) and all(len(point) == len(fields) for point in points),
        f"opd.sweep={entry!r}: write FIELD=VALUE|VALUE, or FIELD/FIELD=VALUE/VALUE|VALUE/VALUE for values that go "
        "together; a comma multiplies",
    )
    named = [zip(fields, point, strict=True) for point in points]
    return [
        " ".join(f"{field.strip()}={_value(field.strip(), text.strip())}" for field, text in one)
        for one in named
    ]


def at_point(
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict, label: str
) -> ml_collections.FrozenConfigDict:
    """The config of the runs at a point of its sweep, with that point's options and no sweep; "": as it is."""
    if not label:
        return config
    pairs = (pair.partition("=") for pair in label.split())
    point = {name: _value(name, text) for name, _, text in pairs}
    point = {name: (value,) if name in _LISTS else value for name, value in point.items()}
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.opd.update_from_flattened_dict(point | {"sweep": ""})
    return ml_collections.FrozenConfigDict(changed)


def _value(field: str, text: str) -> Any:
    """`text` as a value of an option of section opd; UserError if there is no such option, or it cannot have that."""
    known = {name: value for name, value in flatten(defaults().opd.to_dict()) if name not in _NOT_SWEPT}
    if field not in known:
        raise unknown_name("opd.sweep", field, known)
    kind = _LISTS.get(field, type(known[field]))
    read = {"True": True, "False": False}.__getitem__ if kind is bool else kind
    try:
        return read(text)
    except (KeyError, ValueError) as e:
        raise UserError(f"opd.sweep: {field}={text!r} is not a value of {kind.__name__}") from e
