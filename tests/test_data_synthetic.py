"""The synthetic generator: seeded, distinct, and helpful by a rule that can be learnt from a few words."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge

from listopd_jax.data.labels import score_from_votes
from listopd_jax.data.report import length_correlation
from listopd_jax.data.synthetic import DETAILS, helpfulness, synthetic_reviews


def make(seed=0, products=60, per_product=32, noise=0.5):
    return list(
        synthetic_reviews(
            products=products, reviews_per_product=per_product, noise=noise, vote_cap=50, seed=seed
        )
    )


@pytest.fixture(scope="module")
def reviews():
    return make()


def test_the_seed_decides(reviews):
    assert make() == reviews
    assert make(seed=1) != reviews


def test_texts_users_and_titles_are_distinct(reviews):
    assert len({r.text for r in reviews}) == len({r.user for r in reviews}) == len(reviews) == 60 * 32
    assert len({r.title for r in make(products=1200, per_product=1)}) == 1200
    assert len({(r.product, r.title) for r in reviews}) == 60


def test_the_lexicon_is_small_and_reviews_are_short(reviews):
    words = {word.strip(",.") for r in reviews for word in (r.text + " " + r.title).split()}
    assert len(words) <= 120
    lengths = [len(r.text.split()) for r in reviews]
    assert min(lengths) >= 6 and max(lengths) <= 11


def test_without_noise_the_label_is_the_rule(reviews):
    for review in make(noise=0.0):
        assert score_from_votes(review.votes, 50) == helpfulness(review.text)


def test_noise_is_mild(reviews):
    error = [score_from_votes(r.votes, 50) - helpfulness(r.text) for r in reviews]
    assert 0.1 < np.mean(np.abs(error)) < 0.6
    assert abs(np.mean(error)) < 0.15


def test_labels_are_spread_and_length_tells_little(reviews):
    scores = np.array([score_from_votes(r.votes, 50) for r in reviews])
    assert np.bincount(scores, minlength=11).max() < 0.3 * len(scores)
    assert {0, 2, 5, 8, 10} <= set(scores.tolist())
    lists = [
        ([r.text for r in reviews[i : i + 8]], scores[i : i + 8].tolist()) for i in range(0, len(reviews), 8)
    ]
    assert abs(length_correlation(lists)) < 0.2


def test_a_linear_model_on_words_learns_it(reviews):
    """An independent learner: ridge regression on word counts of other products explains most of it."""
    texts, scores = [r.text for r in reviews], [score_from_votes(r.votes, 50) for r in reviews]
    counts = CountVectorizer().fit_transform(texts)
    half = len(texts) // 2
    model = Ridge(alpha=1.0).fit(counts[:half], scores[:half])
    assert model.score(counts[half:], scores[half:]) > 0.9


def test_every_detail_occurs_and_has_points_two_to_five(reviews):
    everything = " ".join(r.text for r in reviews)
    assert all(detail in everything for detail in DETAILS)
    assert set(DETAILS.values()) == {2, 3, 4, 5}
