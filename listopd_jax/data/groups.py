"""Which reviews form which list, and which lists are held out: planned on hashes, before any text is kept.

A list is K reviews of one product, no review is used twice, and the split is by category where one is held out, else by
cluster of products:
- A review that the same user posted again (identical user and text) counts once, at its first row.
- Products on which such copies occur are variants of one product (in Amazon 2018 eight ASINs share nearly all
  reviews), so they are joined before the copies are dropped, and a whole cluster goes to one side of the
  split.
- A text that different users wrote ("Love it!") may still occur on both sides; the rows of the training
  side whose text is in a validation list are left out, so no text that is evaluated was trained on.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

from listopd_jax.data.table import ReviewTable
from listopd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ListPlan:
    """Rows of the table that form each list, in the order in which they are shown, and counts to report."""

    train: Int[np.ndarray, "n K"]
    validation: Int[np.ndarray, "m K"]
    counts: dict[str, int]


def plan_lists(
    table: ReviewTable,
    k: int,
    *,
    validation_share: float,
    max_lists: int = 0,
    max_per_product: int = 0,
    seed: int = 0,
) -> ListPlan:
    """Plan disjoint lists of `k` reviews within a product, split by category or cluster; a pure function.

    Args:
      validation_share: share of the lists to hold out; met as nearly as whole clusters allow, at least one.
        Where a category is held out, all its lists are, or its share of `max_lists`.
      max_lists: keep at most this many lists, both sides together (at least 2), drawn at random (0: all).
      max_per_product: use at most this many reviews of one product, drawn at random (0: all).

    Raises:
      UserError: fewer than two clusters have a list, or nothing is left to train on.
    """
    rng = np.random.default_rng(seed)
    product = np.unique(table.product, return_inverse=True)[1]
    original = _first_rows(table.copy)
    cluster = _clusters(product, original, table.links)
    rows = np.flatnonzero(original == np.arange(len(original)))
    reviews = np.bincount(product[rows], minlength=len(cluster))
    lists = np.minimum(reviews, max_per_product or len(rows)) // k
    if table.held_out.any():
        held_out = np.isin(product[rows], product[table.held_out])
        # A product may have reviews of other categories, too: neither side takes them.
        evaluated = table.held_out[rows]
    else:
        held_out = evaluated = _held_out(cluster, lists, validation_share, rng, k)[product[rows]]

    # At least one list on each side.
    limit = min(max(1, round(max_lists * validation_share)), max_lists - 1) if max_lists else 0
    # Validation first: its texts decide which rows training may use.
    validation = _lists(rows[evaluated], product, k, max_per_product, limit, rng)
    if not len(validation):
        raise UserError(
            f"data.validation_category: none of its products has {k} distinct reviews; lower task.k"
        )
    candidates = rows[~held_out]
    leaks = np.isin(table.text[candidates], table.text[validation])
    train = _lists(candidates[~leaks], product, k, max_per_product, max_lists - limit, rng)
    if not len(train):
        raise UserError(f"no product is left with {k} reviews to train on; add more reviews or lower task.k")
    counts = {
        "products": len(cluster),
        "clusters": len(np.unique(cluster)),
        "products_with_a_list": int((lists > 0).sum()),
        "duplicates": len(original) - len(rows),
        "lists_possible": int(lists.sum()),
        "train_rows_with_a_validation_text": int(leaks.sum()),
    }
    return ListPlan(train, validation, counts)


def _first_rows(value: np.ndarray) -> Int[np.ndarray, " rows"]:
    """For each row the first row with the same value."""
    _, first, inverse = np.unique(value, return_index=True, return_inverse=True)
    return first[inverse]


def _clusters(
    product: Int[np.ndarray, " rows"], original: Int[np.ndarray, " rows"], links: Bool[np.ndarray, " rows"]
) -> Int[np.ndarray, " products"]:
    """For each product the representative of its cluster: union-find over copies that cross products."""
    crossing = links & (product != product[original])
    pairs = np.unique(np.stack([product[crossing], product[original[crossing]]], -1), axis=0)
    return _union(int(product.max(initial=-1)) + 1, pairs.tolist())


def _union(size: int, pairs: Iterable[tuple[int, int]]) -> Int[np.ndarray, " size"]:
    parent = list(range(size))

    def root(i: int) -> int:
        while parent[i] != i:
            # Path halving keeps the trees flat.
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        parent[root(a)] = root(b)
    return np.array([root(i) for i in range(size)], int)


def _held_out(
    cluster: Int[np.ndarray, " products"], lists: Int[np.ndarray, " products"], share: float, rng, k: int
) -> Bool[np.ndarray, " products"]:
    """Clusters taken at random while they fit into `share` of all lists; the smallest one if none fits."""
    sizes = np.bincount(cluster, weights=lists).astype(int)
    order = rng.permutation(np.flatnonzero(sizes))
    if len(order) < 2:
        raise UserError(
            f"{'only one' if len(order) else 'no'} product has {k} distinct reviews, and two are needed to split by "
            "product; "
            "add more reviews or lower task.k"
        )
    room, taken = min(max(1, round(share * sizes.sum())), sizes.sum() - 1), []
    for c in order:
        if sizes[c] <= room:
            taken.append(c)
            room -= sizes[c]
    return np.isin(cluster, taken or [min(order, key=lambda c: sizes[c])])


def _lists(
    rows: Int[np.ndarray, " rows"], product, k: int, cap: int, limit: int, rng
) -> Int[np.ndarray, "n K"]:
    """Disjoint random lists of k rows of one product, in random order; at most `limit` of them (0: all)."""
    rows = rng.permutation(rows)
    # A stable sort keeps the random order within each product.
    rows = rows[np.argsort(product[rows], kind="stable")]
    _, start, inverse, count = np.unique(
        product[rows], return_index=True, return_inverse=True, return_counts=True
    )
    # The place of each row within its product. Each product keeps its first `usable` rows, a multiple of k,
    # so the reshape never puts two products into one list.
    rank = np.arange(len(rows)) - start[inverse]
    usable = np.minimum(count, cap or len(rows)) // k * k
    lists = rng.permutation(rows[rank < usable[inverse]].reshape(-1, k))
    return lists[:limit] if limit else lists
