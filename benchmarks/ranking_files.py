"""Small files of the published form of MS MARCO and ESCI, whose relevance is written in the words of each text.

    python -m benchmarks.ranking_files --out=FOLDER [--queries=400] [--seed=0]

For runs of the tasks `passages` and `esci` from end to end where the real files are not at hand: a model of the preset
`tiny` can learn them, as it cannot learn to compare a query with a text.
"""

import argparse
import pathlib
import random
import sys
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from listopd_jax.errors import Parser, exit_code, positive
from listopd_jax.files import not_written

THINGS = "lamp chair kettle tent bicycle drum camera jacket ladder mirror".split()
PASSAGES = (
    "is something else",
    "is only named here",
    "is explained in part",
    "is explained in full",
)
"""The wording of passages of grades 0 to 3."""
TITLES = {
    "E": "just as asked for",
    "S": "of another make",
    "C": "spare part to fit",
    "I": "poster of something",
}
"""The wording of titles of each label."""
JUDGED = 24  # texts per query


def write_passages(folder: pathlib.Path, queries: int, rng: random.Random) -> None:
    """collection.tsv, queries.tsv and qrels.txt, as those of TREC's Deep Learning tracks."""
    collection, asked, qrels = [], [], []
    for query in range(queries):
        thing = rng.choice(THINGS)
        asked.append(f"{query}\twhat is a {thing} {query}\n")
        for n in range(JUDGED):
            grade = rng.choice((0, 0, 0, 1, 2, 3))
            name = query * JUDGED + n
            collection.append(f"{name}\tthe {thing} {PASSAGES[grade]}\n")
            qrels.append(f"{query} Q0 {name} {grade}\n")
    for name, lines in (("collection.tsv", collection), ("queries.tsv", asked), ("qrels.txt", qrels)):
        (folder / name).write_text("".join(lines))


def write_products(folder: pathlib.Path, queries: int, rng: random.Random) -> None:
    """examples.parquet and products.parquet, with the columns of ESCI's."""
    examples, products = [], []
    for query in range(queries):
        thing, split = rng.choice(THINGS), "test" if query % 10 == 0 else "train"
        for n in range(JUDGED):
            label, product = rng.choice("EESSCI"), f"B{query * JUDGED + n:09}"
            known = {"product_id": product, "product_locale": "us"}
            asked = {"query": f"{thing} {query}", "query_id": query, "esci_label": label, "split": split}
            examples.append(
                {"example_id": len(examples), "small_version": 1, "large_version": 1} | asked | known
            )
            products.append({"product_title": f"{thing} {TITLES[label]}", "product_brand": None} | known)
    pq.write_table(pa.Table.from_pylist(examples), folder / "examples.parquet")
    pq.write_table(pa.Table.from_pylist(products), folder / "products.parquet")


def main(argv: Sequence[str]) -> None:
    """Write all five files."""
    parser = Parser(
        prog="python -m benchmarks.ranking_files", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--queries", default=400, type=positive)
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for write in (write_passages, write_products):
            write(args.out, args.queries, random.Random(args.seed))
    except OSError as e:
        raise not_written(args.out, e, "another --out") from e
    print(args.out)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
