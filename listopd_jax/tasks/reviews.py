"""Rank K reviews of one product by helpfulness: the task of EC (arXiv:2605.08737)."""

import pathlib

from listopd_jax.data.builder import read_split
from listopd_jax.data.prepare import prepare
from listopd_jax.task.prompt import ListExample, render_prompt
from listopd_jax.task.protocol import Splits
from listopd_jax.tasks.listwise import Listwise


class Reviews(Listwise):
    """The lists of the data set that data/prepare.py builds from `data.source`."""

    name = "reviews"

    def splits(self, folder: pathlib.Path) -> Splits:
        """The lists of both splits, built once and read again."""
        report = prepare(self.data, self.options, folder)
        return Splits(read_split(folder, "train"), read_split(folder, "validation"), report)

    def prompt(self, record: ListExample) -> str:
        """Title, one line per review, and the form of the answer."""
        return render_prompt(record.title, record.reviews)
