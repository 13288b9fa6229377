"""Readers of the review files people have: each turns one published schema into `Review` records.

| source | file | product | votes |
|---|---|---|---|
| clothing | Women's E-Commerce Clothing Reviews, CSV | `Clothing ID` | `Positive Feedback Count` |
| amazon2018 | Ni et al. 2019, JSON lines | `asin` | `vote`, a string like "1,234", mostly absent; in the 2014 release \
the first of `helpful`, [votes, of how many] |
| amazon2023 | Hou et al. 2024, JSON lines | `parent_asin` (variants share it; `asin` would split them) |
`helpful_vote(s)` |

Any of them may be plain, gzip or zip. Nothing is kept between rows, so memory does not grow with the file.
"""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from listopd_jax.data.reviews import Review, clean_text, first_words
from listopd_jax.data.streams import read_lines
from listopd_jax.errors import UserError

TITLE_WORDS = 24
"""Product titles are cut here: some sellers put hundreds of search words in them."""

_PAGE = re.compile(
    r"getTime\(|\bfunction\s*\([\w\s,]*\)\s*\{|\bvar \w+\s*=|</?(?:script|style|span|div|img)\b|<a\s+href"
    r"|\b(?:document|window)\.\w+[.(]",
    re.IGNORECASE,
)
"""Code that only titles scraped from a page contain, as some of 2018 do."""

_COUNT = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?")

# AttributeError: the row is None. ArithmeticError: an integer too large for a float.
_BROKEN = (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError)


_SURROGATE = re.compile("[\ud800-\udfff]")


def read_reviews(source: str, path: str | os.PathLike, max_broken: float, tally: Counter) -> Iterator[Review]:
    """Yield the usable reviews of a file in file order, and count into `tally` what is not.

    `tally` gets rows, broken (not parseable, or a value of a wrong type), missing_field (no product or no
    user) and empty_text. Votes that are absent count 0.

    Raises:
      UserError: the file cannot be read; or, at its end, it has no row, no usable row, or the share of
        broken and missing_field rows is above `max_broken`.
    """
    rows, parse = _SOURCES[source]
    for row in rows(path):
        tally["rows"] += 1
        try:
            review = parse(row)
        except KeyError:
            tally["missing_field"] += 1
        except _BROKEN:
            tally["broken"] += 1
        else:
            if review.text:
                yield review
            else:
                tally["empty_text"] += 1
    _check(source, path, max_broken, tally)


def _check(source: str, path: str | os.PathLike, max_broken: float, tally: Counter) -> None:
    bad, rows = tally["broken"] + tally["missing_field"], tally["rows"]
    kinds = {"broken": "broken", "missing_field": "without a needed field", "empty_text": "without text"}
    counts = ", ".join(f"{tally[kind]} {words}" for kind, words in kinds.items())
    if rows == 0:
        raise UserError(f"{path}: has no rows; is it the right file for data.source={source}?")
    if bad / rows > max_broken:
        raise UserError(
            f"{path}: {bad} of {rows} rows are unusable ({counts}), above data.max_broken={max_broken}; "
            f"is it a data.source={source} file? Fix it or raise data.max_broken"
        )
    if bad + tally["empty_text"] == rows:
        raise UserError(
            f"{path}: none of {rows} rows is usable ({counts}); is it a data.source={source} file?"
        )


def read_titles(
    path: str | os.PathLike, wanted: Collection[str], max_broken: float, tally: Counter
) -> dict[str, str]:
    """Titles of the `wanted` products from an Amazon metadata file (by `parent_asin`, 2018 `asin`), streamed.

    A title that is code of a web page is left out. Counts meta_rows and meta_broken into `tally`. Raises UserError as
    `read_reviews` does, and if no product matches.
    """
    titles = {}
    for row in _json_rows(path):
        tally["meta_rows"] += 1
        try:
            product = _identifier(row, "parent_asin" if "parent_asin" in row else "asin")
            title = first_words(clean_text(row.get("title") or ""), TITLE_WORDS)
        except (KeyError, *_BROKEN):
            tally["meta_broken"] += 1
            continue
        if product in wanted and title and not _PAGE.search(title):
            titles[product] = title
    if tally["meta_broken"] > max_broken * tally["meta_rows"]:
        raise UserError(
            f"{path}: {tally['meta_broken']} of {tally['meta_rows']} rows are broken or have no parent_asin, "
            f"above data.max_broken={max_broken}; is data.meta_path a metadata file?"
        )
    if not titles:
        raise UserError(
            f"{path}: has a title for none of {len(wanted)} products; is data.meta_path of another category?"
        )
    return titles


def _json_rows(path: str | os.PathLike) -> Iterator[dict | None]:
    """Parsed lines; None for a line that is not a JSON object. Blank lines are skipped."""
    for line in read_lines(path):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else None


def _csv_rows(path: str | os.PathLike) -> Iterator[dict | None]:
    """Rows of a CSV file with a header; None for a row that the csv module refuses or that is not UTF-8.

    None too for one with more or fewer fields than the header, whose values may be in the wrong columns.
    """
    # strict: wrong quotes raise. By default the csv module guesses what they mean.
    reader = csv.DictReader(_decoded(path), strict=True)
    try:
        missing = {"Clothing ID", "Review Text", "Positive Feedback Count"} - set(reader.fieldnames or ())
    except csv.Error as e:
        raise UserError(f"{path}: not a CSV file ({e})") from e
    if missing:
        raise UserError(
            f"{path}: has no column {', '.join(sorted(missing))}; is it a data.source=clothing file?"
        )
    while True:
        try:
            # Not a for loop: that would end at the first csv.Error.
            row = next(reader)
            yield row if _is_whole(row) else None
        except StopIteration:
            return
        except csv.Error:
            yield None


def _decoded(path: str | os.PathLike) -> Iterator[str]:
    """Lines as text; a byte that is not UTF-8 becomes a lone surrogate, which `_csv_rows` takes for a broken row."""
    for number, line in enumerate(read_lines(path), 1):
        # -sig: Excel writes a byte order mark, which would become part of the first column's name.
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")


def _is_whole(row: dict) -> bool:
    """Whether each column has one value, a text: csv puts surplus ones under None, and None where one is missing."""
    return None not in row and all(
        value is not None and not _SURROGATE.search(value) for value in row.values()
    )


def _clothing(row: dict) -> Review:
    # The file names neither users nor products: "Dresses, General Petite, item 1078" is all there is to say.
    product = _identifier(row, "Clothing ID")
    title = ", ".join([row[c] for c in ("Class Name", "Division Name") if row.get(c)] + [f"item {product}"])
    votes, text = _votes(row["Positive Feedback Count"]), clean_text(row["Review Text"])
    return Review("", product, clean_text(title), text, votes, row.get("Department Name", ""))


def _amazon2018(row: dict) -> Review:
    user, product = _identifier(row, "reviewerID"), _identifier(row, "asin")
    return Review(user, product, "", clean_text(row.get("reviewText") or ""), _votes_2018(row))


def _votes_2018(row: dict) -> int:
    if "vote" in row or "helpful" not in row:
        return _votes(row.get("vote"))
    if not isinstance(row["helpful"], list):  # a text or an object could be taken apart too
        raise TypeError("helpful")
    votes, of = map(_votes, row["helpful"])
    if votes > of:
        raise ValueError(row["helpful"])
    return votes


def _amazon2023(row: dict) -> Review:
    user, product = _identifier(row, "user_id"), _identifier(row, "parent_asin")
    votes = row.get("helpful_vote", row.get("helpful_votes"))
    return Review(user, product, "", clean_text(row.get("text") or ""), _votes(votes))


def _identifier(row: dict, field: str) -> str:
    """A string of some text; KeyError if it is absent or blank, TypeError if it is not a string."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise TypeError(field)
    if text := clean_text(value or ""):
        return text
    raise KeyError(field)


def _votes(value: str | int | float | None) -> int:
    """Votes as a count ≥ 0 from 3, 3.0, "3" or "1,234"; None is 0; ValueError for anything else."""
    if value is None:
        return 0
    if isinstance(value, str):
        if not _COUNT.fullmatch(value.strip()):
            raise ValueError(value)
        value = value.replace(",", "")
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number) or number < 0 or number != int(number):
        raise ValueError(value)
    return int(number)


_SOURCES: dict[str, tuple[Callable, Callable]] = {
    "clothing": (_csv_rows, _clothing),
    "amazon2018": (_json_rows, _amazon2018),
    "amazon2023": (_json_rows, _amazon2023),
}
