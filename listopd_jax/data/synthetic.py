"""A seeded generator of review-like English whose helpfulness can be learnt: the demo's data, no download.

The rule. A review is two phrases. A phrase is either praise ("really lovely gift for summer"), which helps
nobody, or a detail ("hem shrank after washing"), which is worth a fixed number of points given by what it
tells, not by which part of the garment it is about:

    5  a fault after washing or wear      4  a measurement or a photograph
    3  a comparison or a fault of cut     2  a general remark on fabric or colour

The latent helpfulness is the sum of the points of the details, so at most 10: additive over a few salient
words, so a small transformer learns it from a few hundred lists. Praise is on average as long as a detail, so
length tells next to nothing. Observed votes are what the vote mapping (`labels.score_from_votes`) inverts
to, after Gaussian noise on the 0-10 scale.

The lexicon has about ninety words, so that each is one token of a tokenizer trained on it. No two reviews
are equal.
"""

import itertools
import random
from collections.abc import Iterator

from listopd_jax.data.labels import MAX_SCORE, votes_from_score
from listopd_jax.data.reviews import Review

PARTS = ("hem", "collar", "waist", "sleeve", "lining", "pocket")
DETAILS = {
    "shrank after washing": 5,
    "ripped within days": 5,
    "faded in sun": 5,
    "measures thirty inches": 4,
    "fits five feet": 4,
    "shown on photo": 4,
    "sits tighter than usual": 3,
    "scratches bare skin": 3,
    "runs longer than pictured": 3,
    "feels like cotton": 2,
    "looks darker indoors": 2,
    "thin but soft": 2,
}
ADVERBS = ("so", "very", "really", "quite", "such", "truly")
ADJECTIVES = ("pretty", "lovely", "nice", "great", "cute", "perfect", "happy", "good")
NOUNS = ("purchase", "gift", "look", "style", "item", "buy", "colour", "thing")
OCCASIONS = ("for me", "for work", "for summer", "for parties", "for everyone", "for winter")
COLOURS = ("red", "blue", "green", "black", "white", "grey", "pink", "brown")
FABRICS = ("cotton", "linen", "wool", "silk", "denim", "velvet", "knit", "lace")
GARMENTS = ("dress", "skirt", "blouse", "jacket", "sweater", "coat", "shirt", "jeans")


def synthetic_reviews(
    *, products: int, reviews_per_product: int, noise: float, vote_cap: int, seed: int
) -> Iterator[Review]:
    """Yield `products` × `reviews_per_product` reviews, product by product; the same for the same arguments.

    `noise` is the standard deviation, in points of the 0–10 scale, between latent and observed helpfulness.
    """
    rng, seen = random.Random(seed), set()
    for number, title in enumerate(_titles(products, rng)):
        for i in range(reviews_per_product):
            text, helpfulness = _new_review(rng, seen)
            votes = votes_from_score(min(MAX_SCORE, max(0.0, rng.gauss(helpfulness, noise))), vote_cap)
            yield Review(f"u{number * reviews_per_product + i}", f"p{number}", title, text, votes)


def helpfulness(text: str) -> int:
    """The latent helpfulness 0–10 of a generated text: the rule itself."""
    return sum(points * text.count(detail) for detail, points in DETAILS.items())


def _new_review(rng: random.Random, seen: set[str]) -> tuple[str, int]:
    """A review that is not in `seen`, which it joins, and its latent helpfulness."""
    while True:
        details = rng.choices((0, 1, 2), (20, 40, 40))[0]
        phrases = [_detail(rng) for _ in range(details)] + [_praise(rng) for _ in range(2 - details)]
        rng.shuffle(phrases)
        text = ", ".join(phrases) + "."
        if text not in seen:
            seen.add(text)
            return text, helpfulness(text)


def _detail(rng: random.Random) -> str:
    return f"{rng.choice(PARTS)} {rng.choice(tuple(DETAILS))}"


def _praise(rng: random.Random) -> str:
    words = [rng.choice(ADVERBS), rng.choice(ADJECTIVES), rng.choice(NOUNS)]
    return " ".join(words + [rng.choice(OCCASIONS)] * rng.randint(0, 1))


def _titles(count: int, rng: random.Random) -> list[str]:
    """Distinct titles such as "red linen coat", numbered once all combinations are used up."""
    names = [" ".join(words) for words in itertools.product(COLOURS, FABRICS, GARMENTS)]
    rng.shuffle(names)
    return [
        names[i % len(names)] + (f" {i // len(names) + 1}" if i >= len(names) else "") for i in range(count)
    ]
