"""Benchmarks on a finished run: peers get its models, prompts and ends, and drafts change no greedy answer."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import greedy, peers
from benchmarks.shape import Prompts, Shape
from benchmarks.trained import answered, chosen_policy, open_run
from listopd_jax.errors import exit_code
from listopd_jax.models.build import graph_of
from listopd_jax.models.hf import load_hf
from listopd_jax.records import RESULTS, Result, read_results
from listopd_jax.stages.job import DRAFT_TOKENS

N, LISTS = 2, 6
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the test extra's torch"
)


@pytest.fixture(scope="module")
def workdir(finished_job, tmp_path_factory):
    return shutil.copytree(finished_job, tmp_path_factory.mktemp("trained") / "job")


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(workdir)


@pytest.fixture(scope="module")
def work(workdir, tmp_path_factory):
    """The folder of a run's models and prompts, their shape with N completions, and what judges answers."""
    folder = tmp_path_factory.mktemp("work")
    shape, judge, name = peers.prepared(workdir, "opd_lambda2.0_seed0", folder)
    assert name == f"opd_lambda2.0_seed0, {LISTS} held-out prompts"
    return folder, Shape(**vars(shape) | {"completions": N}), judge


def test_peers_get_the_runs_models_and_its_held_out_prompts(work, run):
    folder, shape, _ = work
    asked = Prompts.read(folder)
    assert [row.tolist() for row in asked.rows()] == [p.tolist() for p in run.validation.prompts]
    assert (shape.prompts, shape.prompt_tokens) == asked.ids.shape
    assert (shape.new_tokens, shape.eos, shape.drafts) == (64, run.codec.ends, 0)
    export = {"student": "opd_lambda2.0_seed0", "base": "sft_student", "teacher": "sft_teacher"}
    for role, name in export.items():
        mine, theirs = (load_hf(path)[1] for path in (folder / role, run.workdir / "export" / name))
        assert all(map(jnp.array_equal, jax.tree.leaves(mine), jax.tree.leaves(theirs)))


def test_the_student_is_the_most_useful_distilled_policy(workdir):
    results = read_results(workdir / RESULTS)
    sft = [record for record in results if record.stage.startswith("sft")]
    best = Result.of(results[-1].to_json() | {"run": "best", "stage": "opd", "useful": 1.0})
    assert chosen_policy([best, *results]).run == "best"
    assert chosen_policy(sft).run == "sft_student"


def test_a_completion_is_as_long_as_its_first_end():
    shape = Shape(eos=(1, 7))
    tokens = np.array([[[5, 1, 7, 0], [7, 5, 5, 1]], [[5, 5, 5, 5], [5, 5, 5, 1]]])
    assert shape.lengths(tokens).tolist() == [[2, 1], [4, 4]]
    assert Shape().lengths(tokens).tolist() == [[4, 4], [4, 4]]


def test_right_answers_parse_and_cut_ones_do_not(work, run):
    _, shape, judge = work
    tokens = np.full((LISTS, N, shape.new_tokens), shape.pad, np.int32)
    for i, answer in enumerate(run.validation.answers):
        tokens[i, 0, : len(answer)] = answer
        tokens[i, 1, :4] = [*answer[:3], shape.eos[0]]
    right, cut = judge(tokens[:, :1]), judge(tokens[:, 1:])
    assert right == {"tokens": np.mean([len(a) for a in run.validation.answers]), "parsed": 1.0}
    assert cut == {"tokens": 4.0, "parsed": 0.0}
    assert answered(run, shape, tokens)["parsed"] == 0.5


@needs_torch
def test_torch_and_we_find_the_same_loss_of_answers_of_any_length(work):
    """Prompts of several lengths, and completions that end at any place or not at all."""
    from benchmarks import peer_ours, peer_torch

    folder, shape, _ = work
    ours, torch = peer_ours.Peer(shape, folder), peer_torch.Peer(shape, folder)
    assert len(set(Prompts.read(folder).lengths.tolist())) > 1
    for prompt, real, row in zip(torch.prompts, torch.real, Prompts.read(folder).rows(), strict=True):
        assert prompt[real > 0].tolist() == row.tolist()
    assert torch.tokens(torch.rollout()).shape[:2] == (LISTS, N)
    tokens = ours.tokens(ours.rollout())
    rng = np.random.default_rng(0)
    tokens = np.array(tokens)
    for (i, j), length in np.ndenumerate(rng.integers(1, tokens.shape[-1] + 1, tokens.shape[:2])):
        tokens[i, j, length - 1 :] = [*shape.eos[:1], *[shape.pad] * (tokens.shape[-1] - length)]
    tokens[0, 0] = np.where(np.isin(tokens[0, 0], shape.eos), 5, tokens[0, 0])
    losses = [peer.update(peer.of_tokens(tokens))[0] for peer in (ours, torch)]
    assert losses[1] == pytest.approx(losses[0], rel=peers.TOLERANCE) and abs(losses[0]) > 0.01


def test_we_draft_as_the_run_does_and_write_the_same(work):
    from benchmarks import peer_ours

    folder, shape, _ = work
    plain, drafted = (peer_ours.Peer(Shape(**vars(shape) | {"drafts": n}), folder) for n in (0, 3))
    assert (plain.tokens(plain.rollout()) == drafted.tokens(drafted.rollout())).all()
    assert plain.work.tokens_per_step == 1.0 < drafted.work.tokens_per_step


@needs_torch
def test_looked_up_answers_end_where_they_end(work):
    from benchmarks import peer_torch_lookup

    folder, shape, _ = work
    torch = peer_torch_lookup.Peer(shape, folder)
    tokens = torch.tokens(torch.rollout())
    lengths = shape.lengths(tokens)
    assert tokens.shape[:2] == (LISTS, N) and tokens.shape[2] == lengths.max() <= shape.new_tokens
    after = np.arange(tokens.shape[2]) >= lengths[..., None]
    assert (tokens[after] == shape.pad).all()
    assert (torch.tokens(torch.of_tokens(tokens)) == tokens).all()


def test_the_table_has_the_answers_of_every_peer():
    turns = [
        {"rollout": 1.0, "update": 1.0, "step": 2.0, "completions": np.full((1, 1, t), 5)} for t in (2, 4)
    ]
    measured = {
        "turns": {"ours": turns},
        "memory": {"ours": {"start_up_bytes": 2**20, "peak_bytes": 2**20}},
    }
    rows = peers.summary(measured, 1, lambda tokens: {"tokens": float(tokens.shape[-1]), "parsed": 0.25})
    assert {(row["tokens"], row["parsed"]) for row in rows} == {(3.0, 0.25)}
    head, _, first, *_ = peers.markdown(rows).splitlines()
    assert head.endswith("| tokens | parsed |") and first.endswith("| 3.0 | 0.250 |")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--workdir=absent"], "absent"),
        (["--policy=sft_student"], "--policy=sft_student: is of a run; give its --workdir"),
        (["--workdir=absent", "--peers=ours,tunix"], "tunix is compared at forced lengths only"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(flags, says, capsys):
    assert exit_code(peers.main, flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_greedy_answers_are_counted_with_and_without_drafts(run):
    policy = run.workdir / "export" / "sft_teacher"
    row = greedy.compare(run, policy, "float32", DRAFT_TOKENS)
    assert (row["different_lists"], row["first_different"], row["largest_gap"]) == (0, [], None)
    assert row["lists"] == LISTS and LISTS < row["tokens"] <= LISTS * run.max_response
    assert row["tokens_per_step"] >= 1
    json.dumps(row, allow_nan=False)


def test_lists_that_differ_are_counted_with_how_near_the_two_best_tokens_are(run, monkeypatch):
    """A third of the drafted answers is changed at its fifth token, the rest not at all."""
    policy, honest = run.workdir / "export" / "sft_teacher", greedy.answers

    def changed(*arguments):
        written = honest(*arguments)
        tokens = np.array(written.tokens)
        tokens[::3, 0, 4] += arguments[-1] > 0
        return written._replace(tokens=tokens)

    monkeypatch.setattr(greedy, "answers", changed)
    row = greedy.compare(run, policy, "float32", DRAFT_TOKENS)
    assert row["different_lists"] == LISTS // 3 and row["first_different"] == [4] * (LISTS // 3)
    config, params = load_hf(policy)
    batch, decoder = (
        next(run.evaluation_batches(greedy.ROWS)),
        nnx.merge(graph_of(config, "float32", "none", "xla"), params),
    )
    written = honest(run, config, params, "float32", batch, 0)
    gaps = [second_best_behind(decoder, batch, written, row, 4) for row in (0, 3)]
    assert row["largest_gap"] == pytest.approx(max(gaps), abs=1e-5)


def second_best_behind(decoder, batch, written, row, place):
    """By how many nats, after the prompt of `row` and the `place` tokens that it has written, read as one text."""
    text = [*batch["prompt"][row, : batch["prompt_length"][row]], *written.tokens[row, 0, :place]]
    hidden = decoder(np.array([text]), np.array([len(text)]))[0, -1]
    second, best = np.sort(jax.nn.log_softmax(hidden @ decoder.head_weight().T))[-2:]
    return best - second
