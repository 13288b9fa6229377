"""Lists and splits: disjoint lists of one product, and nothing of validation on the training side."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listopd_jax.data.groups import plan_lists
from listopd_jax.data.labels import LabelFile, read_labels, score_from_votes, votes_from_score
from listopd_jax.data.readers import read_reviews
from listopd_jax.data.report import length_correlation
from listopd_jax.data.reviews import Review
from listopd_jax.data.table import fetch, scan
from listopd_jax.errors import UserError


def table_of(reviews, max_words=0):
    return scan(reviews, lambda review: review.votes, max_words, Counter())


def reviews_of(products, text=lambda p, i: f"review number {i} of product {p}"):
    """`products`: product → number of reviews."""
    return [Review(f"u{p}{i}", p, "", text(p, i), i % 11) for p, n in products.items() for i in range(n)]


def check_plan(reviews, plan, k):
    """What holds for any plan: disjoint lists of one product, no product or text on both sides."""
    rows = np.concatenate([plan.train.ravel(), plan.validation.ravel()])
    assert len(set(rows.tolist())) == len(rows)
    for lists in (plan.train, plan.validation):
        assert lists.shape[1] == k and all(
            len({reviews[i].product for i in members}) == 1 for members in lists
        )
    train, validation = ([reviews[i] for i in lists.ravel()] for lists in (plan.train, plan.validation))
    assert not {r.product for r in train} & {r.product for r in validation}
    assert not {r.text for r in train} & {r.text for r in validation}
    assert len({(r.user, r.text) for r in train}) == len(train)
    return train, validation


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 12)), min_size=1, max_size=120
    ),
    k=st.integers(2, 4),
    max_lists=st.sampled_from([0, 2, 5]),
    cap=st.sampled_from([0, 5]),
    share=st.sampled_from([0.01, 0.3, 0.99]),
    seed=st.integers(0, 3),
)
def test_any_plan_is_disjoint_and_leaks_nothing(rows, k, max_lists, cap, share, seed):
    """Few users, products and texts, so that copies, shared texts and variants abound."""
    texts = ["Love it!", *(f"a longer text that says {i} things about it" for i in range(12))]
    reviews = [Review(f"u{u}", f"p{p}", "", texts[t], t % 11) for p, u, t in rows]
    try:
        plan = plan_lists(
            table_of(reviews), k, validation_share=share, max_lists=max_lists, max_per_product=cap, seed=seed
        )
    except UserError:
        return
    train, validation = check_plan(reviews, plan, k)
    assert len(plan.train) and len(plan.validation)
    assert not max_lists or len(plan.train) + len(plan.validation) <= max_lists
    if cap:
        assert max(Counter(r.product for r in train + validation).values()) <= cap


def test_variants_that_share_reviews_stay_on_one_side():
    """Eight ASINs with the same reviews, each with a few of its own, among other products."""
    reviews = reviews_of({f"other{i}": 16 for i in range(10)})
    for variant in range(8):
        reviews += [
            Review(f"s{i}", f"v{variant}", "", f"a shared review that is number {i}", 1) for i in range(20)
        ]
        reviews += [
            Review(f"o{variant}{i}", f"v{variant}", "", f"own words {variant} {i}", 1) for i in range(8)
        ]
    sides = set()
    for seed in range(20):
        plan = plan_lists(table_of(reviews), 4, validation_share=0.4, seed=seed)
        train, validation = check_plan(reviews, plan, 4)
        variants = [{r.product for r in side if r.product.startswith("v")} for side in (train, validation)]
        assert not (variants[0] and variants[1])
        sides.add(bool(variants[1]))
    assert sides == {True, False}, "the cluster can be on either side"


def test_a_short_text_of_one_user_does_not_join_products():
    reviews = reviews_of({f"p{i}": 8 for i in range(30)})
    reviews += [Review("fan", f"p{i}", "", "Love it!", 1) for i in range(30)]
    assert plan_lists(table_of(reviews), 4, validation_share=0.2).counts["clusters"] == 30
    reviews += [Review("fan", f"p{i}", "", "I love everything this seller makes", 1) for i in range(30)]
    assert (
        plan_lists(table_of(reviews + reviews_of({"q": 8})), 4, validation_share=0.2).counts["clusters"] == 2
    )


def test_a_text_of_different_users_is_not_on_both_sides():
    reviews = reviews_of({f"p{i}": 12 for i in range(20)}, lambda p, i: "Love it!" if i < 6 else f"{p} {i}")
    plan = plan_lists(table_of(reviews), 4, validation_share=0.2)
    _, validation = check_plan(reviews, plan, 4)
    assert "Love it!" in {r.text for r in validation}
    assert plan.counts["train_rows_with_a_validation_text"] == 6 * 16


def test_texts_are_compared_as_they_are_shown():
    reviews = reviews_of({f"p{i}": 8 for i in range(9)}, lambda p, i: f"same start of text {i} then {p}")
    assert (
        plan_lists(table_of(reviews), 4, validation_share=0.2).counts["train_rows_with_a_validation_text"]
        == 0
    )
    with pytest.raises(UserError, match="left with 4 reviews"):
        plan_lists(table_of(reviews, max_words=5), 4, validation_share=0.2)


def test_share_and_limits_are_met():
    table = table_of(reviews_of({f"p{i}": 16 for i in range(100)}))
    plan = plan_lists(table, 4, validation_share=0.1)
    assert (len(plan.train), len(plan.validation)) == (360, 40)
    plan = plan_lists(table, 4, validation_share=0.1, max_lists=50)
    assert (len(plan.train), len(plan.validation)) == (45, 5)
    plan = plan_lists(table, 4, validation_share=0.1, max_per_product=9)
    assert (len(plan.train), len(plan.validation)) == (180, 20)


def test_the_seed_decides():
    table = table_of(reviews_of({f"p{i}": 16 for i in range(20)}))
    plans = [plan_lists(table, 4, validation_share=0.2, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(plans[0].train, plans[1].train) and not np.array_equal(
        plans[0].train, plans[2].train
    )


@pytest.mark.parametrize(
    ("products", "says"), [({}, "no"), ({"a": 7, "b": 7}, "no"), ({"a": 100, "b": 7}, "only one")]
)
def test_too_few_products_is_one_clear_line(products, says):
    with pytest.raises(UserError, match=f"^{says} product has .* two are needed to split by product"):
        plan_lists(table_of(reviews_of(products)), 8, validation_share=0.1)


def plan_of_file(source, path, k=8):
    reviews = list(read_reviews(source, path, 0.05, Counter()))
    plan = plan_lists(table_of(reviews), k, validation_share=0.1)
    check_plan(reviews, plan, k)
    return reviews, plan


def test_the_clothing_file_gives_its_2483_lists_less_one_for_copies(shared):
    """README of the data: 2,483 disjoint lists; leaving out its seven exact copies costs one of them."""
    reviews, plan = plan_of_file("clothing", shared / "data" / "womens_clothing_reviews.csv.zip")
    by_product = Counter(r.product for r in reviews)
    assert sum(n // 8 for n in by_product.values()) == 2483
    assert plan.counts["lists_possible"] in (2482, 2483)
    assert len(plan.train) + len(plan.validation) >= 2480
    assert len(plan.validation) == pytest.approx(248, abs=2)


def test_the_amazon_2018_variants_stay_together(shared):
    reviews, plan = plan_of_file("amazon2018", shared / "data" / "AMAZON_FASHION_5.json.gz")
    assert 40 <= len(plan.train) + len(plan.validation) <= 50
    users = defaultdict(set)
    for review in reviews:
        users[review.user, review.text].add(review.product)
    side = {reviews[i].product: 0 for i in plan.train.ravel()} | {
        reviews[i].product: 1 for i in plan.validation.ravel()
    }
    for (_, text), products in users.items():
        if len(text.split()) >= 5:
            assert len({side[p] for p in products if p in side}) <= 1


def test_fetch_returns_the_rows_and_notices_a_changed_file():
    reviews = reviews_of({"a": 5, "b": 5})
    score = lambda review: None if review.votes == 2 else review.votes  # noqa: E731
    tally = Counter()
    table = scan(reviews, score, 0, tally)
    assert tally == {"unlabelled": 2} and len(table.product) == 8
    labelled = [r for r in reviews if r.votes != 2]
    assert fetch(reviews, score, table, [0, 6]) == {0: labelled[0], 6: labelled[6]}
    for changed in (reviews[:-1], [*reviews, reviews[0]], reviews[::-1]):
        with pytest.raises(UserError, match="changed while it was read"):
            fetch(changed, score, table, [0])


def test_vote_mapping_is_monotone_and_inverts():
    scores = [score_from_votes(v, 50) for v in (0, 1, 2, 3, 5, 10, 20, 50, 10**9)]
    assert scores == [0, 2, 3, 4, 5, 6, 8, 10, 10]
    for cap in (1, 10, 50, 1000):
        values = [score_from_votes(v, cap) for v in range(cap + 1)]
        assert values == sorted(values) and values[0] == 0 and values[-1] == 10
        assert all(score_from_votes(votes_from_score(s, cap), cap) == s for s in set(values))


def test_labels_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    reviews = reviews_of({"a": 3})
    path.write_text(
        "".join(
            json.dumps({"key": r.key, "score": s, "why": "x"}) + "\n"
            for r, s in zip(reviews, (0, 6.6), strict=False)
        )
    )
    labels = LabelFile(path)
    assert [labels(r) for r in reviews] == [0, 7, None]
    labels.check(0.0)
    stranger = LabelFile(path)
    stranger(reviews[0])
    stranger.check(0.5)
    with pytest.raises(UserError, match=r"labels\.jsonl: 1 of 2 keys"):
        stranger.check(0.4)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"key": "a"}',
        '{"key": 3, "score": 1}',
        '{"key": "a", "score": 11}',
        '{"key": "a", "score": -0.1}',
    ]
    + [
        '{"key": "a", "score": "7"}',
        '{"key": "a", "score": true}',
        '{"key": "a", "score": NaN}',
        '{"key": "ok", "score": 4}',
    ],
)
def test_a_bad_label_is_named_by_file_and_line(tmp_path, line):
    (tmp_path / "labels.jsonl").write_text('{"key": "ok", "score": 3}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"labels\.jsonl:3: "):
        read_labels(tmp_path / "labels.jsonl")


def write_scores(path, scores):
    path.write_text("".join(json.dumps({"key": f"k{i}", "score": s}) + "\n" for i, s in enumerate(scores)))
    return path


def test_a_rubric_on_another_scale_is_refused_or_said(tmp_path):
    """Rounded, fractions of 1 would all be 0 or 1."""
    path = tmp_path / "labels.jsonl"
    unit = [i * 0.37 % 1 for i in range(200)]
    with pytest.raises(
        UserError, match=r"labels\.jsonl: every score is between 0 and 1.*multiply them by 10"
    ):
        read_labels(write_scores(path, unit))
    assert set(read_labels(write_scores(path, [10 * s for s in unit])).values()) == {*range(11)}
    assert LabelFile(path).notes() == []
    for scores, said in (([0, 1, 1, 0], "only from 0 to 1 "), ([1, 2.5, 5], "only from 1 to 5 ")):
        assert said in LabelFile(write_scores(path, scores)).notes()[0]


def test_an_empty_labels_file_is_refused(tmp_path):
    (tmp_path / "labels.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no labels"):
        read_labels(tmp_path / "labels.jsonl")


def test_length_correlation():
    assert length_correlation([(["a", "a b", "a b c"], [1, 2, 3])]) == pytest.approx(1.0)
    assert length_correlation([(["a", "a b", "a b c"], [1, 2, 3]), (["a", "a b"], [5, 1])]) == pytest.approx(
        0.0
    )
    assert length_correlation([(["a", "b"], [1, 2]), (["a", "a b"], [1, 1])]) == 0.0
