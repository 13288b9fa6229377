"""The OPD stage: sample from the student, score with teacher and base, update; one run for each λ and seed."""

import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.config import eval_budgets, guard_knows_contract, guard_text
from listopd_jax.data.batches import FOR_TEACHERS, as_teachers_read
from listopd_jax.models.build import cast, lora_of
from listopd_jax.models.lora import merge_adapter, with_adapter
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.objective import Hyper, Variant, warmed_up_lambda
from listopd_jax.ops.opd_loss import Frozen, Models
from listopd_jax.parallel import hosts
from listopd_jax.parallel.rules import decoding_copy
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.rollout.scoring import row_width
from listopd_jax.rollout.state import trim
from listopd_jax.stages.job import Job, base_of, saving
from listopd_jax.stages.teacher_server import (
    TeacherServer,
    check_server,
    of_answers,
    of_completions,
    repeated,
)
from listopd_jax.stages.teachers import experts_of, teacher_roles
from listopd_jax.task.codec import Codec
from listopd_jax.train.collapse import Watch
from listopd_jax.train.loop import Run, Saving, train
from listopd_jax.train.opd_step import OpdBatch, make_opd_step
from listopd_jax.train.optimizer import TrainState, average_rate, init_state, linear_lr, with_average
from listopd_jax.train.preflight import answer_logprobs, check_models


class Distillation(NamedTuple):
    """Shared by the runs of every λ and seed: where they start, what is frozen, and how they are updated."""

    start: Callable[[int], Any]  # gives the run of a seed its own copy of what trains, in float32
    frozen: Frozen
    tx: optax.GradientTransformation
    steps: Mapping[str, Callable]  # of `make_step`, by the guard of a run
    server: TeacherServer | None = None  # that serves the teacher


def opd_runs(job: Job, lam: float, seed: int, plain: bool = False) -> list[Run]:
    """The OPD run at λ and seed, once for each budget at which it is evaluated: one training, evaluated on its way.

    `plain`: without the guard that the job has.
    """
    steps, opd = opd_steps(job), job.config.opd
    point = job.sweep and "_" + job.sweep.replace(" ", "_")
    name = f"opd_lambda{float(lam)}{'_plain' if plain else ''}{point}_seed{seed}"
    run = Run(name, "opd", float(lam), seed, steps, "" if plain else guard_text(opd.guard), job.sweep)
    return [run._replace(steps=budget) for budget in eval_budgets(opd, steps)]


def opd_steps(job: Job) -> int:
    """The steps of a whole run."""
    opd = job.config.opd
    return opd.steps or job.steps(opd.epochs, opd.batch_size)


def preflight(job: Job, models: Mapping[str, Any], server: TeacherServer | None = None) -> None:
    """Check the models, parameters by role, on the first batch of answers; UserError if they cannot be distilled."""
    batch, chunk, vocab = first_batch(job), job.config.opd.head_chunk, job.codec.vocab
    seen = {} if server is None else {"teacher": of_answers(server, batch)}
    teachers = teacher_roles(models) or ["teacher"]
    for role, params in models.items():
        read = as_teachers_read(batch) if role in teachers else batch
        seen[role] = answer_logprobs(job.graphs[role], params, read, vocab, chunk)
    for teacher, other in itertools.product(teachers, [role for role in models if role not in teachers]):
        check_models(
            seen[teacher], seen[other], vocab, other, teacher, may_be_same=job.config.opd.self_distillation
        )


def first_batch(job: Job) -> dict[str, np.ndarray]:
    """The first evaluation batch, with what teachers read."""
    _, batches = next(job.by_teacher())
    return next(iter(batches))


def connected(job: Job) -> TeacherServer | None:
    """The server of the teacher, once its tokenizer and its determinism are checked; None if there is none."""
    teacher = job.config.teacher
    if not teacher.server:
        return None
    server, batch = (
        # Paths begin with /v1 already, and people give either form.
        TeacherServer(teacher.server.rstrip("/").removesuffix("/v1"), teacher.served_name),
        first_batch(job),
    )
    asked = job.codec.text(batch["prompt"][0, : batch["prompt_length"][0]])
    check_server(server, job.codec.tokenizer, [asked, job.task.hint(job.records["train"])])
    apart = repeated(server, batch)
    if hosts.is_main():
        print(f"teacher.server: two identical requests differ by at most {apart:.2g} nats", file=sys.stderr)
    return server


def served_logprobs(
    server: TeacherServer, batch: Mapping[str, np.ndarray], rollout: Rollout
) -> Float[Array, "B n T"]:
    """log π_T of the sampled tokens; each host asks for its own rows, those of `batch`."""
    rows = hosts.local_rows(len(rollout.tokens))
    tokens, lengths = (
        hosts.gather(x)[slice(None) if rows is None else rows] for x in (rollout.tokens, rollout.lengths)
    )
    scores, _ = of_completions(server, batch, tokens, lengths)
    return hosts.global_batch({"teacher": scores}, len(rollout.tokens))["teacher"]


def make_step(
    opd: Any,
    tx: optax.GradientTransformation,
    graphs: Mapping[str, nnx.GraphDef],
    *,
    vocab: int,
    attention: str,
    grammar: Grammar | None = None,
) -> Callable:
    """The update program of config section `opd`, to be shared by every λ and seed: they are data to it.

    `graphs` are the static halves of the models by role and, where it is none of these, of the base; `attention` is
    their backend (never auto), `grammar` that of a guard which knows the contract.
    """
    models = Models(
        student=graphs["student"],
        teacher=graphs.get("teacher"),
        base=graphs["base"] if "base" in graphs else base_of(graphs),
        experts=experts_of(graphs),
    )
    return make_opd_step(
        models,
        tx,
        variant_of(opd),
        vocab=vocab,
        chunk=opd.head_chunk,
        microbatch=opd.microbatch,
        pallas=attention == "splash",  # both are kernels for TPUs
        grammar=grammar,
    )


def variant_of(opd: Any) -> Variant:
    """The static choices of config section `opd`."""
    return Variant(
        ratio=opd.ratio,
        advantage=opd.advantage,
        estimator=opd.estimator,
        aggregate=opd.aggregate,
        ppo=opd.ppo_clip > 0,
        guard=opd.guard.fallback if opd.guard.margin else "",
        scope=opd.guard.scope,
        mask=opd.guard.mask,
        floor=opd.guard.floor,
        structure=opd.guard.structure,
        normalize=opd.normalize,
        jsd=opd.jsd,
        control_variate="" if opd.control_variate == "none" else opd.control_variate,
        flips=opd.on_collapse != "none",
    )


def program_options(opd: Any) -> tuple:
    """The options of section `opd` that shape the update's program: where two agree, one program runs both."""
    return (
        variant_of(opd),
        opd.head_chunk,
        opd.microbatch,
        opd.b2,
        opd.moments,
        guard_knows_contract(opd.guard),
    )


def hyper_at(opd: Any, lam: float, step: int) -> Hyper:
    """The traced scalars of config section `opd` for a run at λ, at 0-based `step`."""
    scalars = Hyper(
        lam=warmed_up_lambda(lam, step, opd.lambda_warmup_steps),
        clip=opd.clip,
        kl_to_base=opd.kl_to_base,
        entropy_bonus=opd.entropy_bonus,
        ppo_clip=opd.ppo_clip,
        guard_margin=opd.guard.margin,
    )
    return jax.tree.map(jnp.float32, scalars)


def learning_rate(opd: Any, step: int, steps: int) -> float:
    """The learning rate of config section `opd` at 0-based `step` of `steps`."""
    # Unlike in cosine_lr the warm-up multiplies: the decay runs over all steps.
    rate = linear_lr(step, steps, opd.lr) if opd.lr_decay == "linear" else opd.lr
    return rate * min(1.0, (step + 1) / max(1, opd.warmup_steps))


def initial_state(job: Job, shared: Distillation, seed: int) -> TrainState:
    """The state that a run of `seed` starts from."""
    return init_state(shared.start(seed), shared.tx, average=job.config.opd.ema > 0)


def merged_student(job: Job, shared: Distillation, trained: Any) -> Any:
    """The student's parameters after a run: `trained` itself, or as an adapter merged into the base."""
    return merge_adapter(shared.frozen.base, trained, lora_of(job.config.student))


def train_opd(
    job: Job, shared: Distillation, run: Run, best: int | None = None, watch: Watch | None = None
) -> Any:
    """Distil from the SFT student, or load the run if it is done; its parameters, or their average, in float32.

    The checkpoint at step `best` is kept. `watch` may change λ on the way, and end the run.
    """
    config, opd = job.config, job.config.opd
    key, steps, step_of = jax.random.key(run.seed), opd_steps(job), shared.steps[run.guard]

    def update(state, batch, step):
        index, prompts, lengths, *for_teachers = read_by_models(job, batch)
        student, own = (
            with_adapter(shared.frozen.base, state.params),
            is_on_policy(run.seed, step, opd.on_policy),
        )
        if own:
            masks = opd.constrained_rollouts
            constrained = job.constraint(masks, "train", hosts.gather(index).tolist(), opd.rollouts)
            # Keys are folded from the step, so a resumed run draws what an uninterrupted one would.
            rollout = sample(job, student, prompts, lengths, jax.random.fold_in(key, step), **constrained)
        else:
            rollout = right_answers(job, batch)
        held = holds_contract(job, rollout, index) if own else None
        reward = contract_reward(held, opd.contract_reward) if opd.contract_reward else None
        served = served_logprobs(shared.server, batch, rollout) if shared.server else None
        width = row_width(job.attention, lengths, rollout.lengths)
        # Right answers have no decode steps. Without this field both kinds of batch run the same program.
        scored = rollout._replace(steps=None)
        sampled = OpdBatch(prompts, lengths, scored, reward, *for_teachers, served, width)
        hyper = hyper_at(opd, watch.lam(run.lam) if watch else run.lam, step)
        lr = jnp.float32(learning_rate(opd, step, steps))
        # The rollout keeps the sampler's log-probabilities, against which PPO's ratio measures the later updates.
        for _ in range(opd.updates_per_batch):
            state, metrics, per_token = step_of(state, shared.frozen, sampled, hyper, lr)
        if opd.ema:
            state = with_average(state, jnp.float32(average_rate(step, opd.ema)))
        count = {"tokens": int(rollout.lengths.sum()) + opd.rollouts * int(lengths.sum())}
        if not own:  # nothing was sampled
            del metrics["sampler_trainer_gap"]
            return state, metrics | count
        count["tokens_per_decode_step"] = tokens_per_decode_step(rollout)
        contract = contract_metrics(job.codec, rollout, per_token, held)
        return state, metrics | count | contract | logged_completions(job, sampled, index, step + 1)

    initial, batches = functools.partial(initial_state, job, shared, run.seed), job.opd_batches(run.seed)
    saving = opd_saving(config, job.workdir, best)
    result = train(job.workdir, run, initial, batches, update, saving, watch=watch, tracking=job.tracking)
    return merged_student(job, shared, result)


def read_by_models(job: Job, batch: Mapping[str, np.ndarray]) -> list[Any]:
    """A training batch on the devices: which records, their prompts, the lengths, and the fields of FOR_TEACHERS."""
    names = ("index", "prompt", "prompt_length", *FOR_TEACHERS)
    rows = hosts.global_batch({k: batch[k] for k in names if k in batch}, job.config.opd.batch_size)
    return [rows.get(name) for name in names]


def opd_saving(config: Any, workdir: pathlib.Path, best: int | None = None) -> Saving:
    """How the runs of section `opd` of `config` are saved in `workdir`; the checkpoint at step `best` is kept."""
    return saving(config, workdir, best, lambda_warmup_steps=config.opd.lambda_warmup_steps)


def sample(job: Job, params: Any, prompts, lengths, key, **constrained: Any) -> Rollout:
    """`opd.rollouts` completions of each prompt by the student, cut to the longest (in quarters of the budget).

    `constrained`: the options of Job.constraint.
    """
    opd, decoding = job.config.opd, job.decoding
    # Cast first: the copy gathered over devices is then half as large.
    params = cast(params, job.config.dtype.compute)
    if job.config.parallel.gather_rollout:
        params = decoding_copy(params)
    rollout = generate(
        (job.trained["student"],), (params,), jnp.ones((1, opd.rollouts)), prompts, lengths, key,
        temperature=opd.temperature, **decoding, **constrained,
    )  # fmt: skip
    return trim(rollout, decoding["max_tokens"])


def is_on_policy(seed: int, step: int, share: float) -> bool:
    """Whether a step is on the student's own completions: one coin flip per step (GKD, arXiv:2306.13649)."""
    return share == 1 or bool(np.random.default_rng((seed, step)).random() < share)


def right_answers(job: Job, batch: Mapping[str, np.ndarray]) -> Rollout:
    """The right answers of this host's rows in place of completions: the first of each prompt, the others are empty."""
    opd, size = job.config.opd, job.decoding["max_tokens"]
    shape = (len(batch["answer"]), opd.rollouts)
    tokens = np.full((*shape, size), job.codec.pad, np.int32)
    lengths = np.zeros(shape, np.int32)
    width = min(size, batch["answer"].shape[1])
    tokens[:, 0, :width], lengths[:, 0] = batch["answer"][:, :width], batch["answer_length"]
    rows = {"tokens": tokens, "lengths": lengths, "logprobs": np.zeros((*shape, size), np.float32)}
    return trim(Rollout(**hosts.global_batch(rows, opd.batch_size)), size)


def tokens_per_decode_step(rollout: Rollout) -> float:
    """Tokens that a row wrote in each pass after the prefill: 1, and more where drafts were confirmed."""
    steps = int(rollout.steps.sum())
    # The first token of each row came from the prefill.
    return (int(rollout.lengths.sum()) - int((rollout.lengths > 0).sum())) / steps if steps else 1.0


def contract_reward(held: Bool[np.ndarray, "B n"], weight: float) -> Float[Array, "B n"]:
    """`weight` times: 1 if a completion holds the contract, else 0, less the mean over its prompt's."""
    # The mean of the prompt's own completions is the baseline: where all hold, or none, there is no gradient.
    reward = weight * (held - held.mean(-1, keepdims=True))
    rows = hosts.local_rows(len(reward))
    # Every host judged all completions; each puts only its own rows on its devices.
    own = reward if rows is None else reward[rows]
    return hosts.global_batch({"reward": own.astype(np.float32)}, len(reward))["reward"]


def holds_contract(job: Job, rollout: Rollout, index) -> Bool[np.ndarray, "B n"]:
    """Whether each of the sampled completions parses; `index` [B] is the training record of each prompt."""
    tokens, lengths = flat(rollout)
    records = np.repeat(hosts.gather(index), rollout.lengths.shape[1]).tolist()
    judge = job.judge("train")
    pairs = zip(job.codec.texts(tokens, lengths), records, strict=True)
    return np.array([judge(*pair).ok for pair in pairs]).reshape(rollout.lengths.shape)


def flat(rollout: Rollout) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, " N"]]:
    """Tokens and lengths of all completions, on every host."""
    tokens, lengths = hosts.gather(rollout.tokens), hosts.gather(rollout.lengths)
    return tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)


def contract_metrics(
    codec: Codec, rollout: Rollout, per_token: Mapping[str, Any], held: Bool[np.ndarray, "B n"]
) -> dict[str, float]:
    """How the sampled completions meet the contract: how many hold it and end, advantage by kind of token.

    With `flip` in `per_token`, the share of positions at which the target flips, by kind of token, too.
    """
    tokens, lengths = flat(rollout)
    structural = codec.structural(tokens, lengths)
    content = (np.arange(tokens.shape[1]) < lengths[:, None]) & ~structural
    by_kind = {}
    for name in (name for name in ("advantage", "flip") if name in per_token):
        values = hosts.gather(per_token[name]).reshape(tokens.shape)
        by_kind |= {
            f"{name}_structural": _mean(values[structural]),
            f"{name}_content": _mean(values[content]),
        }
    return {"parse": np.mean(held), "ended": np.mean(codec.ended(tokens, lengths)), **by_kind}


def logged_completions(job: Job, sampled: OpdBatch, index, step: int) -> dict[str, list[dict[str, str]]]:
    """The first completions of the batch as text, judged, under "completions" where 1-based `step` is to be logged.

    `index` [B] is the training record of each prompt.
    """
    track = job.config.track
    if not track.log_completions_every or step % track.log_completions_every:
        return {}
    prompts, prompt_lengths = hosts.gather(sampled.prompts), hosts.gather(sampled.prompt_lengths)
    tokens, lengths = hosts.gather(sampled.rollout.tokens), hosts.gather(sampled.rollout.lengths)
    each, records, judge = lengths.shape[1], hosts.gather(index).tolist(), job.judge("train")
    texts = job.codec.texts(tokens[: track.completions], lengths[: track.completions])[: track.completions]
    asked = job.codec.texts(prompts[: len(texts)], prompt_lengths[: len(texts)])
    return {
        "completions": [
            {"failure": judge(text, records[i // each]).failure, "output": text, "prompt": asked[i // each]}
            for i, text in enumerate(texts)
        ]
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
