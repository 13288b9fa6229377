"""A task whose records are read from a file: the base for a task of your own."""

import abc
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from listopd_jax import files
from listopd_jax.data import manifest
from listopd_jax.data.builder import REPORT
from listopd_jax.data.splits import SIDES, check_key, check_prompt, notes, split_records
from listopd_jax.errors import UserError, require
from listopd_jax.task.protocol import Splits, Task

FORMAT = 1
"""Part of the fingerprint: raise it when the same config and files give other splits."""
_FIELDS = "validation_share max_lists split_field seed".split()


class FileTask(Task):
    """A task that reads `data.path`; which records are held out is decided by `data.seed`, unless `side` says."""

    inputs = ("data.path", "task.file")
    """The fields of the config that name its files."""

    @abc.abstractmethod
    def read(self, path: pathlib.Path) -> Iterable[Any]:
        """The records of the file; each has a `key` of its own, its name in messages."""

    def side(self, record: Any) -> str | None:
        """'train' or 'validation', or None for all records."""
        return None

    def group(self, record: Any) -> str:
        """Records of one group stay on one side; by default those of one prompt.

        A text and its one user turn are one prompt, whatever else a message has, and whatever blanks surround its text.
        """
        prompt = self.prompt(record)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return json.dumps([[turn["role"], turn["content"].strip()] for turn in turns])

    def splits(self, folder: pathlib.Path) -> Splits:
        """Read, split, and write folder/report.json."""
        paths = self._paths()
        require(
            "data.path" in paths,
            f"data.path is empty: task {self.name!r} needs a file, e.g. --config.data.path=FILE",
        )
        if self.data.verify:
            for path in paths.values():
                manifest.verify(path)
        records = self.read(paths["data.path"])
        require(
            isinstance(records, Iterable), f"task {self.name}: read gives no records; return or yield them"
        )
        records = list(records)
        self._check(records)
        split = self.divided(records)
        report = self._report(paths, split)
        if not (folder / REPORT).exists() or files.read_json(folder / REPORT) != report:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(folder / REPORT, report)
        return Splits(split["train"], split["validation"], report)

    def divided(self, records: Sequence[Any]) -> dict[str, list[Any]]:
        """The records by side."""
        data, sides = self.data, [self.side(record) for record in records]
        groups = list(map(self.group, records))
        self._check_division(records, sides, groups)
        return split_records(records, sides, groups, data.validation_share, data.max_lists, data.seed)

    def _check_division(self, records: Sequence[Any], sides: Sequence[Any], groups: Sequence[Any]) -> None:
        """UserError unless all sides are of SIDES, or all None, and groups can be told apart."""
        known = SIDES if any(side is not None for side in sides) else (None,)
        for record, side, group in zip(records, sides, groups, strict=True):
            who = f"task {self.name}: {record.key}"
            require(
                side in known,
                f"{who}: side is {side!r}; return 'train' or 'validation', or None for all records",
            )
            require(_is_hashable(group), f"{who}: group is {group!r}; return a text")

    def _check(self, records: Sequence[Any]) -> None:
        """UserError if a record has no key or that of another, or an invalid prompt."""
        keys = set()
        for record in records:
            check_key(record, self.name)
            if record.key in keys:
                raise UserError(f"{self.name}: two records have the key {record.key!r}; give each its own")
            keys.add(record.key)
            check_prompt(self.prompt(record), record.key)
            if (own := self.teacher_prompt(record)) is not None:
                check_prompt(own, f"{record.key}: the teacher's prompt")

    def _paths(self) -> dict[str, pathlib.Path]:
        """The files of `inputs` that the config names; UserError for one that is not there."""
        sections = {"data": self.data, "task": self.options}
        named = {name: getattr(sections[name.split(".")[0]], name.split(".")[1]) for name in self.inputs}
        for name, path in named.items():
            if path and not pathlib.Path(path).is_file():
                kind = "is a folder; name the file in it" if pathlib.Path(path).is_dir() else "no such file"
                raise UserError(f"{name}={path}: {kind}")
        return {name: pathlib.Path(path) for name, path in named.items() if path}

    def _report(self, paths: dict[str, pathlib.Path], split: dict[str, list[Any]]) -> dict[str, Any]:
        answered = {side: sum(self.answer(r) is not None for r in split[side]) for side in SIDES}
        digests = {name: [path.name, files.sha256(path)] for name, path in paths.items()}
        fields = [getattr(self.data, name) for name in _FIELDS] + [self.options.k]
        if self.data.synthetic_queries:  # without them the fingerprint is that of older workdirs
            fields.append(self.data.synthetic_queries)
        return {
            "task": self.name,
            "useful": self.useful,
            "inputs": {n: {"file": path.name, "bytes": path.stat().st_size} for n, path in paths.items()},
            "records": {side: len(split[side]) for side in SIDES},
            "answered": answered,
            "notes": notes(split, len(split["train"]) - answered["train"]),
            "fingerprint": files.json_sha256([FORMAT, self.name, fields, digests]),
        }


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)  # isinstance(…, Hashable) would not look into a tuple
    except TypeError:
        return False
    return True
