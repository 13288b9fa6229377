"""The prepare stage: what it builds without TensorFlow, when it builds again, and what it refuses."""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
from collections import Counter
from types import SimpleNamespace

import pytest
import tensorflow_datasets as tfds
import yaml

from listopd_jax.data import builder, manifest
from listopd_jax.data.builder import read_split
from listopd_jax.data.prepare import prepare
from listopd_jax.data.readers import read_reviews
from listopd_jax.errors import UserError
from listopd_jax.task.prompt import ListExample

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Synthetic:
    products: int = 30
    reviews_per_product: int = 16
    noise: float = 0.5


@dataclasses.dataclass
class Data:
    source: str = "synthetic"
    path: str = ""
    meta_path: str = ""
    labels: str = ""
    vote_cap: int = 50
    max_broken: float = 0.05
    max_reviews_per_product: int = 0
    validation_share: float = 0.1
    max_lists: int = 0
    category: str = ""
    validation_category: str = ""
    seed: int = 0
    verify: bool = True
    synthetic: Synthetic = dataclasses.field(default_factory=Synthetic)


def task(k=4, max_review_words=0):
    return SimpleNamespace(k=k, max_review_words=max_review_words)


def everything(folder):
    return {split: read_split(folder, split) for split in ("train", "validation")}


def test_round_trip_without_tensorflow_and_without_a_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    report = prepare(Data(), task(), tmp_path)
    assert report["lists"] == {"train": 108, "validation": 12}
    examples = everything(tmp_path)
    assert {split: len(part) for split, part in examples.items()} == report["lists"]
    assert all(isinstance(e, ListExample) and len(e.reviews) == len(e.scores) == 4 for e in examples["train"])
    assert all(isinstance(s, int) and 0 <= s <= 10 for e in examples["train"] for s in e.scores)
    keys = [e.key for part in examples.values() for e in part]
    assert len(set(keys)) == len(keys)
    assert report["scores"]["train"] == [sum(e.scores.count(s) for e in examples["train"]) for s in range(11)]
    assert sum(report["scores"]["validation"]) == 12 * 4


def test_tensorflow_is_not_imported(tmp_path):
    code = "import sys; from tests.test_data_prepare import *; prepare(Data(), task(), sys.argv[1]); "
    code += (
        "read_split(sys.argv[1], 'train'); assert 'tensorflow' not in sys.modules, 'tensorflow was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    if importlib.util.find_spec("tensorflow") is not None:
        pytest.skip(
            "TensorFlow is installed here, so this shows that it is not imported, not that it may be absent"
        )


def test_texts_survive_exactly(tmp_path):
    rows = [
        {
            "key": "k",
            "product_id": "é",
            "title": "Ünïcode 帽子 🧢",
            "reviews": ['a "quoted"\\ text', "b'c", "", "日本"],
            "review_keys": ["1", "2", "3", "4"],
            "scores": [0, 10, 3, 7],
        }
    ]
    builder.build({"train": rows, "validation": rows}, tmp_path)
    (example,) = read_split(tmp_path, "train")
    assert dataclasses.asdict(example) == {
        k: tuple(v) if isinstance(v, list) else v for k, v in rows[0].items() if k != "review_keys"
    }
    source = tfds.data_source(builder.NAME, split="validation", data_dir=tmp_path)
    assert [k.decode() for k in source[0]["review_keys"]] == ["1", "2", "3", "4"]


def test_nothing_is_on_both_sides(tmp_path):
    prepare(Data(), task(), tmp_path)
    train, validation = everything(tmp_path).values()
    assert not {e.product_id for e in train} & {e.product_id for e in validation}
    assert not {r for e in train for r in e.reviews} & {r for e in validation for r in e.reviews}


def count_builds(monkeypatch):
    builds = []
    original = builder.build
    monkeypatch.setattr(builder, "build", lambda rows, folder: builds.append(1) or original(rows, folder))
    return builds


def test_a_finished_set_is_reused_and_any_change_builds_anew(tmp_path, monkeypatch):
    builds = count_builds(monkeypatch)
    first = prepare(Data(), task(), tmp_path)
    assert prepare(Data(), task(), tmp_path) == first and len(builds) == 1
    prepare(Data(seed=1), task(), tmp_path)
    prepare(Data(seed=1), task(k=5), tmp_path)
    prepare(Data(seed=1), task(k=5, max_review_words=4), tmp_path)
    assert all(len(r.split()) <= 4 for e in read_split(tmp_path, "train") for r in e.reviews)
    prepare(Data(synthetic=Synthetic(products=40)), task(), tmp_path)
    assert len(builds) == 5


def test_the_same_config_gives_the_same_lists(tmp_path):
    for name in "ab":
        prepare(Data(), task(), tmp_path / name)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_an_interrupted_or_damaged_build_is_replaced(tmp_path, monkeypatch):
    prepare(Data(), task(), tmp_path)
    expected = everything(tmp_path)
    (tmp_path / "report.json").unlink()  # killed after the data, before the report
    prepare(Data(), task(), tmp_path)
    assert everything(tmp_path) == expected

    record = next((tmp_path / builder.NAME).rglob("*train.array_record*"))
    content = record.read_bytes()
    record.write_bytes(content[:500] + bytes([content[500] ^ 255]) + content[501:])
    prepare(Data(), task(), tmp_path)
    assert everything(tmp_path) == expected

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("listopd_jax.data.builder._ListwiseReviews._generate_examples", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(Data(seed=3), task(), tmp_path)
    with pytest.raises(UserError, match="run the prepare stage"):
        read_split(tmp_path, "train")
    monkeypatch.undo()
    prepare(Data(), task(), tmp_path)
    assert everything(tmp_path) == expected


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    prepare(Data(), task(), tmp_path)
    prepare(Data(seed=1), task(), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def departments(path):
    """A clothing file: products 0-5 are tops, 6-8 dresses, 9 a jacket, of eight reviews each; two share a text."""
    rows = ["Clothing ID,Review Text,Positive Feedback Count,Department Name"]
    names = ["Tops"] * 6 + ["Dresses"] * 3 + ["Jackets"]
    rows += [f"{i},review {j} of item {i},{j},{names[i]}" for i in range(10) for j in range(8)]
    rows += ["0,review 0 of item 6,0,Tops"]
    path.write_text("\n".join(rows))
    return str(path)


@pytest.mark.parametrize(
    "train, held_out, products, dropped",
    [
        ("Tops", "Dresses", (set("012345"), set("678")), 8),
        ("", "Jackets", (set("012345678"), {"9"}), 0),
        ("Dresses", "", (set("678"), None), 57),
    ],
)
def test_a_category_is_trained_on_and_another_held_out(tmp_path, train, held_out, products, dropped):
    data = Data("clothing", departments(tmp_path / "a.csv"), category=train, validation_category=held_out)
    report = prepare(data, task(), tmp_path / "data")
    lists = everything(tmp_path / "data")
    sides = {side: {row.product_id for row in part} for side, part in lists.items()}
    if held_out:
        assert (sides["train"], sides["validation"]) == products
    else:
        assert (
            sides["train"] | sides["validation"] == products[0] and not sides["train"] & sides["validation"]
        )
    assert report["read"].get("other_category", 0) == dropped
    texts = {side: {text for row in part for text in row.reviews} for side, part in lists.items()}
    assert not texts["train"] & texts["validation"]


def test_another_category_is_another_data_set(tmp_path):
    path = departments(tmp_path / "a.csv")
    fields = [{}, {"category": "Tops"}, {"validation_category": "Tops"}]
    prints = [prepare(Data("clothing", path, **f), task(), tmp_path / "data")["fingerprint"] for f in fields]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"category": "Topps"},
            "data.category='Topps' is unknown; did you mean 'Tops'? known: Tops, Dresses, Jackets",
        ),
        ({"validation_category": "Shoes"}, "data.validation_category='Shoes' is unknown"),
    ],
)
def test_a_category_that_the_file_lacks(tmp_path, fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(Data("clothing", departments(tmp_path / "a.csv"), **fields), task(), tmp_path / "data")


def test_a_file_without_categories(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Clothing ID,Review Text,Positive Feedback Count\n0,fine,1\n")
    with pytest.raises(UserError, match="a.csv: no review has a category; leave data.category empty"):
        prepare(Data("clothing", str(path), category="Tops"), task(), tmp_path / "data")


def test_of_a_product_of_two_categories_only_the_held_out_reviews_are_evaluated(tmp_path):
    path = tmp_path / "a.csv"
    departments(path)
    with path.open("a") as f:
        f.writelines(f"\n6,a top sold as item 6 number {j},{j},Tops" for j in range(8))
    prepare(Data("clothing", str(path), validation_category="Dresses"), task(), tmp_path / "data")
    texts = {
        side: {t for row in rows for t in row.reviews} for side, rows in everything(tmp_path / "data").items()
    }
    assert not any(text.startswith("a top") for text in texts["train"] | texts["validation"])


def test_a_held_out_category_without_labels_is_not_split_at_random(tmp_path):
    reviews = list(read_reviews("clothing", departments(tmp_path / "a.csv"), 0.05, Counter()))
    labels = [{"key": r.key, "score": i % 11} for i, r in enumerate(reviews) if r.category != "Jackets"]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    fields = {"labels": str(tmp_path / "labels.jsonl"), "validation_category": "Jackets"}
    with pytest.raises(UserError, match="Jackets: none of its reviews has a label in data.labels"):
        prepare(Data("clothing", str(tmp_path / "a.csv"), **fields), task(), tmp_path / "data")


def test_a_held_out_category_without_a_list(tmp_path):
    data = Data("clothing", departments(tmp_path / "a.csv"), validation_category="Jackets")
    with pytest.raises(UserError, match="none of its products has 10 distinct reviews"):
        prepare(data, task(10), tmp_path / "data")


def test_real_clothing_to_the_report(tmp_path, shared):
    path = str(shared / "data" / "womens_clothing_reviews.csv.zip")
    report = prepare(Data(source="clothing", path=path, max_lists=200), task(8, 60), tmp_path)
    assert report["lists"] == {"train": 180, "validation": 20}
    assert report["read"]["rows"] == 23486 and report["read"]["empty_text"] == 845
    assert 0.1 < report["length_correlation"] < 0.35
    assert report["inputs"]["path"] == {"file": "womens_clothing_reviews.csv.zip", "bytes": 2924120}
    assert all(len(r.split()) <= 60 for e in read_split(tmp_path, "train") for r in e.reviews)


def test_real_amazon_2018_runs_and_says_that_it_is_small(tmp_path, shared):
    path = str(shared / "data" / "AMAZON_FASHION_5.json.gz")
    report = prepare(Data(source="amazon2018", path=path), task(8), tmp_path)
    assert 40 <= sum(report["lists"].values()) <= 50 and report["grouped"]["duplicates"] > 2600
    assert any("validation lists: intervals will be wide" in note for note in report["notes"])
    assert any("no title" in note for note in report["notes"])


def amazon2023(tmp_path, shared, reviews=12):
    """Reviews written for products of the real metadata sample."""
    meta = shared / "data" / "amazon_fashion_2023_meta_sample.jsonl"
    products = [
        json.loads(line)["parent_asin"] for line in meta.read_text(encoding="utf-8").splitlines()[:20]
    ]
    rng = random.Random(0)
    with gzip.open(tmp_path / "reviews.jsonl.gz", "wt") as f:
        for i, product in enumerate(products * reviews):
            row = {
                "user_id": f"u{i}",
                "parent_asin": product,
                "asin": f"variant{i}",
                "text": f"review {i}<br />end",
            }
            f.write(json.dumps(row | {"helpful_vote": rng.randrange(20)}) + "\n")
    return Data(source="amazon2023", path=str(tmp_path / "reviews.jsonl.gz"), meta_path=str(meta))


def test_amazon_2023_joins_titles(tmp_path, shared):
    data = amazon2023(tmp_path, shared)
    report = prepare(data, task(8), tmp_path / "out")
    assert sum(report["lists"].values()) == 20 and report["read"]["products_without_title"] == 0
    titles = {e.title for part in everything(tmp_path / "out").values() for e in part}
    assert len(titles) >= 19 and all(title and not title.startswith("item ") for title in titles)


def test_a_changed_file_builds_anew(tmp_path, shared, monkeypatch):
    builds = count_builds(monkeypatch)
    data = amazon2023(tmp_path, shared)
    prepare(data, task(8), tmp_path / "out")
    amazon2023(tmp_path, shared, reviews=24)
    assert sum(prepare(data, task(8), tmp_path / "out")["lists"].values()) == 60
    assert len(builds) == 2


def test_a_labels_file_decides_scores_and_rows(tmp_path):
    prepare(Data(), task(), tmp_path / "votes")
    source = tfds.data_source(builder.NAME, split="train", data_dir=tmp_path / "votes")
    keys = [key.decode() for row in source for key in row["review_keys"]]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"key": key, "score": i % 11}) + "\n" for i, key in enumerate(keys)))
    report = prepare(Data(labels=str(labels)), task(), tmp_path / "rubric")
    assert report["read"]["usable"] == len(keys) and report["read"]["unlabelled"] == 30 * 16 - len(keys)
    expected = {key: i % 11 for i, key in enumerate(keys)}
    for row in tfds.data_source(builder.NAME, split="train", data_dir=tmp_path / "rubric"):
        assert [expected[key.decode()] for key in row["review_keys"]] == [int(s) for s in row["scores"]]
    assert not [note for note in report["notes"] if "scale" in note]
    labels.write_text("".join(json.dumps({"key": key, "score": i % 5}) + "\n" for i, key in enumerate(keys)))
    notes = prepare(Data(labels=str(labels)), task(), tmp_path / "likert")["notes"]
    assert any("scores only from 0 to 4 where the scale is 0-10" in note for note in notes)
    labels.write_text("".join(json.dumps({"key": key, "score": 0}) + "\n" for key in keys))
    notes = prepare(Data(labels=str(labels)), task(), tmp_path / "constant")["notes"]
    assert any("every label is 0: nothing to rank by" in note for note in notes)
    with pytest.raises(UserError, match="labels.jsonl: 432 of 432 keys"):
        prepare(Data(labels=str(labels), seed=9), task(), tmp_path / "rubric")


@pytest.mark.parametrize(
    "data, k, message",
    [
        (Data(source="clothing", path="no/such.csv"), 4, "data.path=no/such.csv: no such file"),
        (Data(source="clothing", path="."), 4, "data.path=.: is a folder"),
        (Data(labels="no/labels"), 4, "data.labels=no/labels: no such file"),
        (Data(), 17, "no product has 17 distinct reviews"),
    ],
)
def test_unusable_inputs_are_one_line(tmp_path, data, k, message):
    with pytest.raises(UserError) as error:
        prepare(data, task(k), tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(Data(), task(), tmp_path / "file" / "data")


def test_known_files_are_verified(tmp_path, shared):
    name = "AMAZON_FASHION_5.json.gz"
    original = shared / "data" / name
    assert manifest.verify(original) == "amazon-fashion-2018-5core"
    assert manifest.verify(tmp_path / "unknown.csv") is None
    content = original.read_bytes()
    for changed, message in (
        (content[:-100], "truncated or modified: 286913 bytes where .* has 287013"),
        (content[:500] + b"?" + content[501:], "modified: 287013 bytes"),
    ):
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(UserError, match=message):
            prepare(Data(source="amazon2018", path=str(tmp_path / name)), task(8), tmp_path / "out")
    own = gzip.compress(gzip.decompress(content)[: len(gzip.decompress(content)) // 2 * 2])
    (tmp_path / name).write_bytes(own)
    data = Data(source="amazon2018", path=str(tmp_path / name), verify=False)
    assert sum(prepare(data, task(8), tmp_path / "out")["lists"].values()) > 0


def test_an_artefact_is_verified_by_name(shared):
    path = shared / "tokenizer" / "qwen3" / "tokenizer.json"
    assert manifest.verify(path) is None, "many artefacts have a tokenizer.json"
    assert manifest.verify(path, "qwen3-tokenizer") == "qwen3-tokenizer"
    with pytest.raises(UserError, match="not in third_party/manifest.toml"):
        manifest.verify(path, "qwen9")


def test_the_manifest_is_complete_and_right(shared):
    entries = tomllib.loads((ROOT / "third_party" / "manifest.toml").read_text())["artefact"]
    assert len({e["name"] for e in entries}) == len(entries)
    for entry in entries:
        assert all(entry[field] for field in ("name", "kind", "source", "revision", "licence"))
        assert entry["kind"] in ("model", "tokenizer", "dataset")
        for file in entry["files"]:
            assert file["bytes"] > 0 and len(file["sha256"]) == 64 and int(file["sha256"], 16) >= 0
            local = next((shared / "data").rglob(pathlib.PurePosixPath(file["path"]).name), None)
            if local is not None:
                assert hashlib.sha256(local.read_bytes()).hexdigest() == file["sha256"]
    sizes = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
    assert {f"Qwen/Qwen3-{size}" for size in sizes} <= {e["name"] for e in entries}


def test_a_missing_manifest_is_one_line(monkeypatch, tmp_path):
    manifest.artefacts.cache_clear()
    monkeypatch.setattr(manifest, "MANIFEST", tmp_path / "manifest.toml")
    with pytest.raises(UserError, match="data.verify=False"):
        manifest.verify(tmp_path / "x")
    manifest.artefacts.cache_clear()


def test_2023_without_a_path_and_offline_is_one_line(tmp_path):
    code = "import sys; from tests.test_data_prepare import *\n"
    code += "try: prepare(Data(source='amazon2023'), task(), sys.argv[1])\nexcept UserError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "raw/review_categories/Amazon_Fashion.jsonl cannot be downloaded" in out.stdout, out.stderr
    assert out.stdout.count("\n") == 1 and "set data.path" in out.stdout


def test_a_download_is_used_and_verified(tmp_path, shared, monkeypatch):
    """With an empty path both files come from the hub at the pinned revision; a wrong size stops the job."""
    source = amazon2023(tmp_path, shared)
    asked = []

    def fake(repo, file, *, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        place = tmp_path / pathlib.PurePosixPath(file).name
        shutil.copy(source.meta_path if "meta" in file else source.path, place)
        return str(place)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    with pytest.raises(UserError, match="Amazon_Fashion.jsonl: truncated or modified"):
        prepare(Data(source="amazon2023"), task(8), tmp_path / "out")
    report = prepare(Data(source="amazon2023", verify=False), task(8), tmp_path / "out")
    assert report["read"]["products_without_title"] == 0
    assert {repo for repo, *_ in asked} == {"McAuley-Lab/Amazon-Reviews-2023"} and len(asked[0][3]) == 40


def test_what_is_installed_holds_the_manifest_and_the_pages(tmp_path):
    """What `pip install .` copies: the code looks for these next to itself, with a checkout or without."""
    pytest.importorskip("setuptools")
    copied = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path], cwd=ROOT, capture_output=True
    )
    assert copied.returncode == 0, copied.stderr
    package = tmp_path / manifest.MANIFEST.relative_to(ROOT)
    assert package.read_bytes() == manifest.MANIFEST.read_bytes()
    for file in ("configs/fashion.py", "launch/local.py", "listopd_jax/report/report.html.jinja"):
        assert (tmp_path / file).is_file()


def test_the_citation_says_what_the_package_says(monkeypatch):
    pytest.importorskip("setuptools")
    package = {}
    monkeypatch.setattr("setuptools.setup", lambda **fields: package.update(fields))
    runpy.run_path(str(ROOT / "setup.py"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert [citation[name] for name in ("version", "license")] == [package["version"], package["license"]]
    assert citation["title"].lower() == f"{package['name']}: {package['description']}".lower()
    assert ", ".join(citation["keywords"]) == package["keywords"]
