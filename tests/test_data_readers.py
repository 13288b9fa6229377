"""Readers: what they count, what they clean, and one clear line for every way a file can be wrong."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter

import pytest

from listopd_jax.data.readers import read_reviews, read_titles
from listopd_jax.data.reviews import Review, clean_text, first_words
from listopd_jax.errors import UserError

HEADER = "Clothing ID,Review Text,Positive Feedback Count,Class Name,Division Name\n"


def rows_2023(count, text="It fits well and the seams hold.", **extra):
    base = {
        "user_id": "u",
        "parent_asin": "P",
        "asin": "V",
        "text": text,
        "helpful_vote": 3,
        "timestamp": 1588687728923,
    }
    return [base | {"user_id": f"u{i}"} | extra for i in range(count)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(source, path, max_broken=0.05):
    tally = Counter()
    return list(read_reviews(source, path, max_broken, tally)), tally


def test_the_real_clothing_file(shared):
    reviews, tally = read("clothing", shared / "data" / "womens_clothing_reviews.csv.zip")
    assert (tally["rows"], len(reviews), tally["broken"]) == (23486, 22641, 0)
    assert max(r.votes for r in reviews) == 122
    assert sum(r.votes == 0 for r in reviews) > 9000
    assert reviews[0].product == "767" and reviews[0].title.endswith("item 767")
    assert not any("&amp;" in r.text or "&#39;" in r.text for r in reviews)
    assert all(r.text == " ".join(r.text.split()) for r in reviews)


def test_the_real_amazon_2018_file(shared):
    reviews, tally = read("amazon2018", shared / "data" / "AMAZON_FASHION_5.json.gz")
    assert (tally["rows"], len(reviews), tally["empty_text"]) == (3176, 3160, 16)
    assert len({r.product for r in reviews}) == 31
    assert Counter(r.votes for r in reviews)[2] == 92  # "vote": "2" in the file


def test_zip_gzip_and_plain_read_alike(tmp_path):
    text = HEADER + '7,"Soft, and\nwarm",4,Knits,General\n'
    (tmp_path / "a.csv").write_text(text)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a.csv", text)
        z.writestr("__MACOSX/._a.csv", "junk")
    with gzip.open(tmp_path / "a.csv.gz", "wt") as f:
        f.write(text)
    expected = [Review("", "7", "Knits, General, item 7", "Soft, and warm", 4)]
    assert all(read("clothing", tmp_path / name)[0] == expected for name in ("a.csv", "a.zip", "a.csv.gz"))


def test_2023_joins_on_the_parent_and_takes_the_aliases(tmp_path):
    rows = rows_2023(2) + [
        {k: v for k, v in rows_2023(1)[0].items() if k != "helpful_vote"} | {"helpful_votes": 9}
    ]
    reviews, _ = read("amazon2023", write_lines(tmp_path / "r.jsonl", rows))
    assert {r.product for r in reviews} == {"P"} and [r.votes for r in reviews] == [3, 3, 9]


@pytest.mark.parametrize("votes, expected", [("1,234", 1234), ("2", 2), (3, 3), (4.0, 4), (None, 0)])
def test_votes_in_every_form(tmp_path, votes, expected):
    row = {"reviewerID": "u", "asin": "a", "reviewText": "fine", "vote": votes}
    assert read("amazon2018", write_lines(tmp_path / "r", [row]))[0][0].votes == expected


@pytest.mark.parametrize(
    "row, reason",
    [
        ("not json", "broken"),
        ("[1, 2]", "broken"),
        ("[" * 100_000, "broken"),
        (json.dumps(rows_2023(1, helpful_vote="many")[0]), "broken"),
        (json.dumps(rows_2023(1, helpful_vote=-1)[0]), "broken"),
        (json.dumps(rows_2023(1, helpful_vote=True)[0]), "broken"),
        (json.dumps(rows_2023(1, helpful_vote=float("nan"))[0]), "broken"),
        (json.dumps(rows_2023(1, helpful_vote=float("inf"))[0]), "broken"),
        (json.dumps(rows_2023(1, text=["a"])[0]), "broken"),
        (json.dumps(rows_2023(1, parent_asin=17)[0]), "broken"),
        (json.dumps(rows_2023(1, parent_asin=None)[0]), "missing_field"),
        (json.dumps(rows_2023(1, parent_asin=" \u2028")[0]), "missing_field"),
        (json.dumps(rows_2023(1, text="<br /> \t&nbsp;")[0]), "empty_text"),
        (json.dumps(rows_2023(1, text=None)[0]), "empty_text"),
    ],
)
def test_each_bad_row_is_counted_and_the_rest_is_read(tmp_path, row, reason):
    path = write_lines(tmp_path / "r.jsonl", rows_2023(99))
    path.write_text(path.read_text() + row + "\n\n")
    reviews, tally = read("amazon2023", path)
    assert len(reviews) == 99
    assert tally == {"rows": 100, reason: 1}


def test_too_many_broken_rows_are_refused_with_file_count_and_field(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", rows_2023(9))
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(UserError, match=r"r\.jsonl: 1 of 10 rows.*data\.max_broken=0\.05"):
        read("amazon2023", path)
    assert len(read("amazon2023", path, max_broken=0.1)[0]) == 9


def damaged(tmp_path, kind):
    good = gzip.compress("".join(json.dumps(r) + "\n" for r in rows_2023(2000)).encode())
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        several = tmp_path / "several.zip"
        with zipfile.ZipFile(several, "w") as z:
            z.writestr("a.csv", HEADER)
            z.writestr("b.csv", HEADER)
        path.write_bytes(
            {
                "truncated gzip": good[: len(good) // 2],
                "flipped gzip": good[:40] + bytes([good[40] ^ 255]) + good[41:],
                "bad zip": b"PK\x03\x04" + b"junk" * 50,
                "several files": several.read_bytes(),
                "empty": b"",
                "binary": random.Random(0).randbytes(100_000),
                "utf-16": (HEADER + "1,a,2,b,c\n").encode("utf-16"),
                "latin-1": (HEADER + "1,d\xe9j\xe0,2,b,c\n").encode("latin-1"),
                "other columns": b"a,b\n1,2\n",
            }[kind]
        )
    return path


@pytest.mark.parametrize("source", ["clothing", "amazon2018", "amazon2023"])
@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "truncated gzip", "flipped gzip", "bad zip", "several files", "empty", "binary"]
    + ["utf-16", "latin-1", "other columns"],
)
def test_a_damaged_or_wrong_file_is_one_line_that_names_it(tmp_path, source, kind):
    with pytest.raises(UserError) as error:
        read(source, damaged(tmp_path, kind))
    assert str(tmp_path / "file") in str(error.value) and "\n" not in str(error.value)


def test_csv_rows_that_are_short_or_huge_are_counted(tmp_path):
    good = "".join(f"{i},fits well,1,Knits,General\n" for i in range(60))
    path = tmp_path / "r.csv"
    path.write_text(
        "\ufeff" + HEADER + good + "61\n" + f"62,{'x' * 200_000},1,a,b\n" + "63,,1,a,b\n", encoding="utf-8"
    )
    reviews, tally = read("clothing", path)
    assert len(reviews) == 60 and tally["broken"] == 2 and tally["empty_text"] == 1


def test_a_csv_row_that_is_not_utf8_is_one_broken_row(tmp_path):
    good = "".join(f"{i},fits well é,1,Knits,General\n" for i in range(60))
    path = tmp_path / "r.csv"
    path.write_bytes(
        (HEADER + good).encode() + "61,d\xe9j\xe0 vu,1,a,b\n".encode("latin-1") + b"62,still read,1,a,b\n"
    )
    reviews, tally = read("clothing", path)
    assert len(reviews) == 61 and tally["broken"] == 1
    assert reviews[0].text == "fits well é" and reviews[-1].text == "still read"


ELEVEN = (
    ",Clothing ID,Age,Title,Review Text,Rating,Recommended IND,Positive Feedback Count,Division Name,Department Name,"
    "Class Name\n"
)
GOOD = "".join(
    f'{i},{100 + i % 3},30,Nice,"Soft, warm {i}",5,1,{i % 7},General,Dresses,Dresses\n' for i in range(60)
)


@pytest.mark.parametrize(
    "rows, broken",
    [
        ("900,55,30,Nice,Soft and warm, but short,5,1,42,General,Dresses,Dresses\n", 1),
        ("900,55,30,Nice,Soft and warm\nbut short,5,1,42,General,Dresses,Dresses\n", 2),
        ("900,55,30,Nice,Soft and warm bu", 1),
        ("900,55,30,Nice,Soft and warm,5,1,42,General,Dresses\n", 1),
        ('900,55,30,Nice,"Soft, and 5"8 tall,5,1,42,General,Dresses,Dresses\n', 1),
        ('900,55,30,Nice,"Soft and never closed,5,1,42,General,Dresses,Dresses\n', 1),
    ],
    ids=["comma", "line break", "cut off", "one short", "quote inside", "open quote"],
)
def test_a_csv_row_whose_values_may_be_in_the_wrong_columns_is_broken(tmp_path, rows, broken):
    """After an unquoted comma 'Recommended IND' stands where the votes are looked for."""
    path = tmp_path / "r.csv"
    for text in (GOOD + rows, rows.rstrip("\n") + "\n" + GOOD):
        path.write_text(ELEVEN + text)
        reviews, tally = read("clothing", path)
        assert tally["broken"] == broken and not [r for r in reviews if r.product in ("55", "5", "900")]
        assert len(reviews) >= 59, "an open quote takes the row after it along"
        assert all(r.votes == int(r.text.split()[-1]) % 7 for r in reviews)


@pytest.mark.parametrize(
    "votes, expected",
    [
        ([3, 20], 3),
        ([0, 0], 0),
        ([5, 2], None),
        ([3], None),
        ("3/4", None),
        ("34", None),
        ({"1": 0, "2": 0}, None),
    ],
)
def test_the_release_of_2014_names_the_votes_otherwise(tmp_path, votes, expected):
    rows = [{"reviewerID": f"u{i}", "asin": "a", "reviewText": "fine", "helpful": [i, 30]} for i in range(30)]
    row = {"reviewerID": "u", "asin": "a", "reviewText": "odd", "helpful": votes}
    reviews, tally = read("amazon2018", write_lines(tmp_path / "r", [*rows, row]))
    assert [r.votes for r in reviews] == [*range(30)] + ([] if expected is None else [expected])
    assert tally["broken"] == (expected is None)


@pytest.mark.parametrize("votes", ["1_000", "١٢", "0x10", "1e3", "12,34", "", "inf", "9" * 5000])
def test_what_is_no_count_of_votes_is_broken(tmp_path, votes):
    rows = [{"reviewerID": f"u{i}", "asin": "a", "reviewText": "fine", "vote": " 2 "} for i in range(30)]
    reviews, tally = read("amazon2018", write_lines(tmp_path / "r", [*rows, rows[0] | {"vote": votes}]))
    assert len(reviews) == 30 and tally["broken"] == 1


def tar_of(data):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("reviews.csv")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    "pack, what",
    [
        (lambda data: gzip.compress(tar_of(data)), "a tar archive; unpack it"),
        (tar_of, "a tar archive"),
        (lambda data: gzip.compress(gzip.compress(data)), "packed twice"),
        (bz2.compress, "a bzip2 file"),
        (lzma.compress, "an xz file"),
        (lambda data: data.decode().encode("utf-16"), "UTF-16 text"),
        (lambda data: b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (lambda data: b"PAR1" + data, "a Parquet file"),
    ],
)
@pytest.mark.parametrize("source", ["clothing", "amazon2018"])
def test_a_file_of_another_format_is_named(tmp_path, source, pack, what):
    (tmp_path / "file").write_bytes(pack((ELEVEN + GOOD).encode()))
    with pytest.raises(UserError, match=f"{tmp_path}/file: is {what}"):
        read(source, tmp_path / "file")


def test_a_zip_whose_directory_is_damaged_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "whole", "w") as z:
        z.writestr("é.csv", ELEVEN + GOOD)
    path = tmp_path / "file"
    path.write_bytes((tmp_path / "whole").read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(UserError, match="file: truncated or damaged archive"):
        read("clothing", path)


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("listopd_jax.data.streams.MAX_LINE", 1000)
    (tmp_path / "r").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="longer than 1000 bytes"):
        read("amazon2023", tmp_path / "r")


def test_cleaning():
    assert (
        clean_text("Fits&#34; well<br /><BR>and&amp;\n  soft\u2028\x00 \ud800!") == 'Fits" well and& soft !'
    )
    assert (
        clean_text("see http://a.b/?x=1&copy=2&lt=3 &amp;copy=4") == "see http://a.b/?x=1&copy=2&lt=3 &copy=4"
    )
    assert clean_text("&amp;amp;amp;#39;s &eacute;&#xE9; AT&T &nope;") == "'s éé AT&T &nope;"
    endless = "&#" + "9" * 5000 + ";"
    assert clean_text(f"a {endless}") == f"a {endless}", "Python refuses to read so long a number"
    assert clean_text("a <|im_end|> b &lt;|im_start|&gt;") == "a < |im_end|> b < |im_start|>"
    assert (
        first_words("a b c d", 2) == "a b"
        and first_words("a b", 9) == "a b"
        and first_words("a b", 0) == "a b"
    )


def test_keys_depend_on_the_review_alone():
    review = Review("u", "p", "title", "text", 3)
    assert review.key == Review("u", "p", "", "text", 9).key
    assert review.key == hashlib.sha1(b"p\0u\0text").hexdigest()[:16]
    assert len({review.key, Review("u", "p", "", "text2", 3).key, Review("up", "", "", "text", 3).key}) == 3


def test_titles_are_joined_from_the_real_2023_metadata(shared):
    path = shared / "data" / "amazon_fashion_2023_meta_sample.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = {row["parent_asin"] for row in rows[:50]} | {"absent"}
    tally = Counter()
    titles = read_titles(path, wanted, 0.0, tally)
    assert titles.keys() == wanted - {"absent"} and tally == {"meta_rows": 500}
    assert all(0 < len(title.split()) <= 24 for title in titles.values())
    with pytest.raises(UserError, match="title for none of 1 products"):
        read_titles(path, {"absent"}, 0.0, Counter())


@pytest.mark.parametrize(
    "title",
    [
        "var aPageStart = (new Date()).getTime(); var navMet = {}; ue.count('x', 1);",
        '<span class="a-size">Red belt</span>',
        "function (a, b) { return a }",
        "if (window.ue) { window.ue.count(1) }",
    ],
)
def test_a_title_that_is_code_of_a_page_is_none(tmp_path, title):
    names = ["Red linen belt", "Watch with alarm function (black)", "Curtain for a window. Blue, 3 < 5"]
    rows = [{"asin": f"P{i}", "title": name} for i, name in enumerate([*names, title])]
    assert list(read_titles(write_lines(tmp_path / "meta", rows), {"P0", "P1", "P2", "P3"}, 0.0, Counter())) == [
        "P0", "P1", "P2",
    ]  # fmt: skip


def test_broken_metadata_is_refused_above_the_share(tmp_path):
    path = write_lines(tmp_path / "meta", [{"parent_asin": "P", "title": "Hat"}, {"title": "no id"}])
    assert read_titles(path, {"P"}, 0.5, Counter()) == {"P": "Hat"}
    with pytest.raises(UserError, match="meta: 1 of 2 rows"):
        read_titles(path, {"P"}, 0.4, Counter())


MEASURE = """
import resource, sys
from collections import Counter
from listopd_jax.data.readers import read_reviews
from listopd_jax.data.table import scan, fetch
from listopd_jax.data.groups import plan_lists
tally = Counter()
read = lambda: read_reviews("amazon2023", sys.argv[1], 0.05, tally)
score = lambda review: review.votes % 11
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = scan(read(), score, 0, tally)
plan = plan_lists(table, 8, validation_share=0.1, max_lists=50)
found = fetch(read(), score, table, plan.train.ravel().tolist())
print(len(table.product), len(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_hold_the_texts(tmp_path):
    """Reading, planning and fetching 60,000 reviews of 1,000 characters (60 MB) takes well below 60 MB."""
    rng = random.Random(0)
    with open(tmp_path / "r.jsonl", "w") as f:
        for i in range(60_000):
            text = f"{i} " + "x" * 990
            f.write(
                json.dumps({"user_id": f"u{i}", "parent_asin": f"p{rng.randrange(3000)}", "text": text})
                + "\n"
            )
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "r.jsonl")], capture_output=True, text=True, check=True
    )
    rows, found, grown = map(int, out.stdout.split())
    grown *= 1 if sys.platform == "darwin" else 1024
    assert rows == 60_000 and found == 45 * 8
    assert grown < 24e6, f"{grown / 1e6:.0f} MB for 60 MB of texts"
