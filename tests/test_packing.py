"""Packed SFT: no list lost or seen by another, loss and gradient those of the lists in rows of their own."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from listopd_jax import config as config_module
from listopd_jax.data import packing
from listopd_jax.data.packing import RowShape, pack
from listopd_jax.errors import UserError
from listopd_jax.models.config import Lora, ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.models.lora import abstract_adapter
from listopd_jax.plan import compile as aot
from listopd_jax.stages.prepare import open_job
from listopd_jax.stages.sft import train_sft
from listopd_jax.train.optimizer import init_state
from listopd_jax.train.sft_step import NONE, make_sft_step

VOCAB, P, T = 61, 7, 5
CONFIG, LORA = ModelConfig(64, 16, 32, 3, 4, 2, 8), Lora(2, 4.0, ("q", "down"))
SHAPE = RowShape(tokens=20, answers=10)
LENGTHS = np.array([[7, 5], [2, 5], [4, 1], [1, 2], [7, 1], [3, 3]], np.int32)  # of prompts and answers


def batch_of(lengths, seed=0):
    """A batch as listopd_jax.data.batches makes it; random ids, other ones in the padding."""
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths, np.int32)
    prompt, answer = (rng.integers(2, VOCAB, (len(lengths), n)).astype(np.int32) for n in (P, T))
    return dict(prompt=prompt, prompt_length=lengths[:, 0], answer=answer, answer_length=lengths[:, 1])


def lists_of(batch):
    """Prompt and answer of each list."""
    parts = zip(*(batch[k] for k in ("prompt", "prompt_length", "answer", "answer_length")), strict=True)
    return [(p[:n].tolist(), a[:m].tolist()) for p, n, a, m in parts]


def unpacked(batch):
    """The lists of each row of a packed batch, read from what the step is given alone."""
    rows = []
    for row, starts, places, answer, count in zip(*batch.values(), strict=True):
        found = {}
        for place, token in zip(places[:count], answer[:count], strict=True):
            assert row[place + 1] == token
            begin, predicts, tokens = found.setdefault(starts[place], (starts[place], place, []))
            assert place == predicts + len(tokens)  # an answer is one run
            tokens.append(int(token))
        rows.append([(row[begin : at + 1].tolist(), tokens) for begin, at, tokens in found.values()])
    return rows


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, P), st.integers(1, T)), min_size=1, max_size=40),
    microbatch=st.integers(0, 5),
)
def test_every_list_is_there_once_in_few_rows(lengths, microbatch):
    batch, shape = batch_of(lengths), SHAPE._replace(microbatch=microbatch)
    packed = pack(batch, shape)
    assert list(packed) == ["row", "starts", "places", "answer", "answer_length"]
    rows, lists = unpacked(packed), lists_of(batch)
    # Rows are in the batch's order, and together they are the batch.
    left = list(range(len(lists)))
    for found in rows:
        at = [left.pop(next(i for i, k in enumerate(left) if lists[k] == one)) for one in found]
        assert at == sorted(at)
    assert left == []
    assert not microbatch or len(rows) % microbatch == 0 or len(rows) < microbatch
    assert packed["row"].shape == (len(rows), 20)
    assert len(rows) <= max(1.125 * len(lists), len(lists) + max(0, microbatch - 1))
    filled = sum(found != [] for found in rows)
    tokens, answers = np.sum(lengths, 0).sum(), np.sum(lengths, 0)[1]
    assert filled <= 1 + 2 * max(
        tokens / shape.tokens, answers / shape.answers
    )  # any two rows do not fit in one


@pytest.mark.parametrize(
    ("needed", "microbatch", "devices", "rows"),
    [
        (1, 0, 1, 1),
        (33, 0, 1, 36),
        (33, 8, 1, 40),
        (33, 64, 4, 36),
        (31, 31, 1, 31),
        (128, 3, 1, 132),
        (5, 0, 4, 8),
    ],
)
def test_numbers_of_rows_are_few_and_divided_by_what_cuts_them(needed, microbatch, devices, rows):
    assert SHAPE._replace(microbatch=microbatch, devices=devices).rows(needed) == rows


RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: (grads, grads),
)
"""Plain gradient descent that keeps the last gradient as its state."""


def random(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


@pytest.mark.parametrize(
    ("lora", "microbatch"), [(None, 0), (None, 2), (LORA, 4)], ids=["all", "parts", "lora"]
)
def test_loss_and_gradient_are_those_of_the_lists(lora, microbatch):
    graph, weights = abstract(CONFIG, lora=lora)[0], random(abstract(CONFIG)[1])
    params, frozen = (random(abstract_adapter(CONFIG, lora)), weights) if lora else (weights, NONE)
    step = make_sft_step(graph, RECORD, VOCAB, 4, microbatch)

    def after(batch):
        state, metrics = step(init_state(jax.tree.map(jnp.copy, params), RECORD), batch, 0.0, frozen)
        return metrics, state.opt_state

    batch = batch_of(LENGTHS)
    packed = pack(batch, SHAPE._replace(microbatch=microbatch, devices=1 if microbatch else 5))
    assert sum(found != [] for found in unpacked(packed)) == 3  # of 6 lists
    (expected, grads), (found, ours) = after(batch), after(packed)
    assert found["tokens"] == expected["tokens"] == LENGTHS[:, 1].sum()
    for name in ("loss", "entropy", "grad_norm"):
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-5), name
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_list_does_not_see_its_neighbours():
    decoder = nnx.merge(abstract(CONFIG)[0], random(abstract(CONFIG)[1]))
    hidden = jax.jit(lambda batch: decoder.states_at(batch["row"], batch["places"], batch["starts"]))
    batch = batch_of([(3, 4), (5, 2), (6, 3)])
    packed = pack(batch, RowShape(24, 16))
    assert len(packed["row"]) == 1
    before = np.asarray(hidden(packed))[0]
    own = packed["starts"][0][packed["places"][0]][
        : packed["answer_length"][0]
    ]  # the list of each answer token
    for start in (0, 7, 14):
        row = np.where(packed["starts"] == start, packed["row"], (packed["row"] + 1) % VOCAB)
        now = np.asarray(hidden(packed | {"row": row}))[0]
        same = (now == before).all(-1)[: len(own)]
        assert same[own == start].all() and not same[own != start].any()


# ---- in a job


def config_of(**fields):
    """A job of a few lists of 8 reviews; packed, three or so share a row."""
    config = config_module.defaults()
    config.data.synthetic.products, config.data.synthetic.reviews_per_product = 12, 8
    config.task.update(k=4, max_prompt=192, max_response=64, max_review_words=8, prompt_buckets=1)
    config.train.checkpoint_every = 2
    for sft in (config.sft.student, config.sft.teacher):
        sft.update(steps=3, batch_size=6, lr=1e-2, seed=1)
    config.update_from_flattened_dict(fields)
    return config_module.validate(config)


PACKED = {"sft.student.packing": 512, "sft.student.microbatch": 2}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a job whose packed SFT of the student is done, and the parameters that it made."""
    folder = tmp_path_factory.mktemp("packed")
    return folder, train_sft(open_job(config_of(**PACKED), folder), "student")


def test_a_run_learns_what_it_learns_unpacked(workdir, tmp_path):
    job = open_job(config_of(), shutil.copytree(workdir[0] / "data", tmp_path / "data").parent)
    for ours, theirs in zip(*map(jax.tree.leaves, (workdir[1], train_sft(job, "student"))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_a_run_resumes_exactly(workdir, tmp_path):
    again = shutil.copytree(workdir[0], tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "sft_student" / "3")
    resumed = train_sft(open_job(config_of(**PACKED), again), "student")
    jax.tree.map(np.testing.assert_array_equal, resumed, workdir[1])


def test_batches_hold_the_lists_that_they_hold_unpacked(workdir, tmp_path):
    packed, plain = (
        open_job(config_of(**fields), workdir[0]).sft_batches("student") for fields in (PACKED, {})
    )
    in_buckets = open_job(config_of(**PACKED, **{"task.prompt_buckets": 4}), workdir[0]).sft_batches(
        "student"
    )
    for _ in range(7):
        ours, theirs = next(packed), next(plain)
        assert sorted(sum(unpacked(ours), [])) == sorted(lists_of(theirs))
        assert len(ours["row"]) < len(theirs["prompt"])
        jax.tree.map(np.testing.assert_array_equal, ours, next(in_buckets))


def test_rows_too_short_for_a_list_are_refused(workdir):
    with pytest.raises(UserError, match=r"sft\.teacher\.packing=200.*= 256 tokens"):
        config_of(**{"sft.teacher.packing": 200})
    with pytest.raises(
        UserError, match=r"sft\.student\.packing=200.*= 240 tokens"
    ):  # 12 for each of 4 answers
        config_of(**{"sft.student.packing": 200, "task.max_response": 0})
    split = open_job(config_of(), workdir[0]).train
    longest = max(len(p) + len(a) for p, a in zip(split.prompts, split.answers, strict=True))
    with pytest.raises(UserError, match=f"sft.student.packing=50: the longest list .* {longest} tokens"):
        packing.row_shape(split, 50, "sft.student.packing")
    assert packing.row_shape(split, longest, "").tokens == longest


def test_a_plan_compiles_packed_rows():
    """Of lists at the widest, two fit in a row of 2 x 256 tokens."""
    config = config_of(
        **{"sft.student.packing": 512, "sft.student.batch_size": 24, "sft.student.microbatch": 4}
    )
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
    tree = aot._answers(config, config.sft.student, mesh)
    assert {name: x.shape for name, x in tree.items()} == {
        "row": (12, 512), "starts": (12, 512), "places": (12, 128), "answer": (12, 128), "answer_length": (12,)
    }  # fmt: skip
    assert aot._answers(config, config.sft.teacher, mesh)["prompt"].shape == (6, 192)
