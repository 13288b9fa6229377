"""Every field of a run with its default; what is not here cannot be set."""

from collections.abc import Iterator
from typing import Any

import ml_collections

from listopd_jax.models.config import PROJECTIONS

RATIOS = ("teacher_student", "trainer_rollout", "aspo", "none")
ADVANTAGES = ("base_relative", "no_base")
FALLBACKS = ("teacher", "base")
SCOPES = ("all", "structure")
ESTIMATORS = ("sampled", "full_vocab")
AGGREGATES = ("token", "sequence")
TASKS = ("reviews", "json", "bfcl", "cranfield", "passages", "esci")
LR_DECAYS = ("none", "linear")
CONTROL_VARIATES = ("none", "kl", "optimal")
CONSTRAINTS = ("schema", "contract")
ON_COLLAPSE = ("none", "warn", "lower_lambda", "stop")
SOURCES = ("synthetic", "clothing", "amazon2018", "amazon2023")
DTYPES = ("float32", "bfloat16")
REMATS = ("full", "attention", "dots", "none")
ATTENTIONS = ("auto", "xla", "cudnn", "splash")
LORA_TARGETS = tuple(f"{name}_proj" for name in PROJECTIONS)
TEACHER = "teacher"  # in teachers.route: the model of that section

RENAMED = {
    "opd.budgets": "opd.eval_steps",
    **{
        f"sft.{role}.{rate}": f"sft.{role}.noise"
        for role in ("teacher", "student")
        for rate in ("truncation_rate", "duplicate_rate")
    },
}  # fields that had another name before
REMOVED = {
    "parallel.grid": "the main job trains one (lambda, seed) at a time, launch/ runs many side by side",
}  # fields that are gone, and what holds without them


def _section(**fields: Any) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(fields)


def defaults() -> ml_collections.ConfigDict:
    """Every field of a run, with EC's recipe as the default where EC gives one; no other field can be set."""
    config = _section(
        preset="paper",
        seed=0,
        task=_task(),
        tokenizer=_tokenizer(),
        data=_data(),
        teacher=_teacher(),
        student=_model(),
        reference=_reference(),
        teachers=_teachers(),
        dtype=_dtype(),
        remat="none",
        attention="auto",  # splash (and our Pallas kernels) on TPUs, cudnn on GPUs in 16 bit, else xla
        sft=_sft_of_both(),
        optimizer=_optimizer(),
        opd=_opd(),
        rollout=_rollout(),
        forecast=_forecast(),
        predict=_predict(),
        evaluation=_evaluation(),
        parallel=_parallel(),
        train=_train(),
        track=_track(),
    )
    return config.lock()


def _task() -> ml_collections.ConfigDict:
    return _section(
        name="reviews",  # one of TASKS
        file="",  # a Python file that defines a task of your own, in place of `name` (docs/bring_your_own.md)
        schema="",  # task json: a file with the JSON Schema of all records without one of their own
        k=0,  # reviews per list; 0: EC's 8, but 4 for the synthetic source, which two cores learn in minutes
        max_prompt=2048,  # tokens
        max_response=512,  # tokens; 0: TOKENS_PER_OBJECT for each review; other tasks: the longest right answer
        max_review_words=200,  # 0: uncut
        prompt_buckets=4,  # prompt widths to compile for
        chat_template=False,
        chat_date="2024-07-26",  # the date for chat templates that ask for today's
        ndcg_gain="linear",
    )


def _tokenizer() -> ml_collections.ConfigDict:
    return _section(path="", vocab_size=512)  # empty path: train a byte-level BPE on the training prompts


def _data() -> ml_collections.ConfigDict:
    return _section(
        source="synthetic",
        path="",
        meta_path="",
        labels="",  # JSONL of review key -> score 0..10; empty: from votes
        vote_cap=50,  # votes that mean a score of 10
        max_broken=0.05,
        max_reviews_per_product=0,  # 0: all
        max_lists=0,  # 0: all
        validation_share=0.1,
        category="",  # source clothing: train on this department's reviews; empty: all
        validation_category="",  # source clothing: hold out this department's lists; empty: a share of all
        split_field="",  # task json: the field that says "train" or "validation"; empty: at random, by `seed`
        synthetic_queries=0,  # task cranfield: extra training lists, with queries made of the abstracts' words
        seed=0,
        verify=True,
        synthetic=_section(products=500, reviews_per_product=16, noise=0.5, notes=()),
    )


def _model() -> ml_collections.ConfigDict:
    return _section(
        weights="",  # folder with safetensors or hub id; empty: random weights of `architecture`
        adapter="",  # folder of a LoRA adapter by peft, which is merged into `weights`
        lora=_section(  # train an adapter on top of the frozen weights, W + alpha/rank · A B
            rank=0,  # 0: off
            alpha=32.0,
            targets=",".join(LORA_TARGETS),
        ),
        architecture="custom",  # a name of listopd_jax.models.config, or custom = the dimensions below
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e4,
        qk_norm=True,
        tied=True,
    )


def _teacher() -> ml_collections.ConfigDict:
    section = _model()
    # http(s)://HOST:PORT of a server that has the model in place of `weights`, as vLLM serves it, and its name there
    section.server = section.served_name = ""
    return section


def _teachers() -> ml_collections.ConfigDict:
    return _section(
        field="",  # of a record: `route` gives its value's teacher; empty: section `teacher` for all
        # "VALUE=WEIGHTS,VALUE=WEIGHTS": as teacher.weights, never trained; `teacher`: that section's
        route="",
        max_prompt=0,  # tokens of the prompts that only teachers read; 0: they read the student's
    )


def _sft() -> ml_collections.ConfigDict:
    return _section(
        steps=0,  # 0: as many as `epochs` give
        epochs=5.0,
        batch_size=128,
        microbatch=0,  # lists (if packed, rows) per gradient pass; 0: the whole batch
        packing=0,  # tokens per row, which several lists share; 0: one list per row
        lr=1e-5,
        warmup_steps=0,
        b2=0.999,  # of AdamW
        moments="float32",  # in which AdamW keeps its moments; bfloat16: half the memory, rounded at random
        # Deliberate errors, "NAME:SHARE,NAME:SHARE": a corruption of the task, and the share of answers that it breaks.
        # Lists have truncate (EC's SFT teacher cuts ~42 %), duplicate_id and those of task/corruptions.py.
        noise="",
        seed=0,
    )


def _opd() -> ml_collections.ConfigDict:
    return _section(
        lambdas=(
            1.0,
            1.05,
            1.1,
            1.15,
            1.2,
            1.25,
        ),  # (): stop after the forecast, as launch/ does once per grid
        plain_lambdas=(),  # trained without the guard too: the same run shows what `guard` keeps and what it costs
        recommend=False,  # forecast them, and train at the one λ that the forecasts recommend (docs/forecast.md)
        seeds=(0,),
        sweep="",  # options of this section at several values: "clip=1.5|5, ratio=none|aspo" (config/sweep.py)
        steps=0,  # 0: as many as `epochs` give
        epochs=3.0,
        batch_size=128,  # prompts per step
        rollouts=1,  # completions per prompt
        microbatch=0,  # prompts per gradient pass; 0: the whole batch
        updates_per_batch=1,
        lr=1e-6,
        lr_decay="none",  # linear: from `lr` at the first step to 0 after the last
        warmup_steps=0,  # over which the learning rate rises to `lr`: Adam's first steps are as large as any
        ema=0.0,  # decay of the average of the weights, which is evaluated and exported; 0: off, the last weights are
        b2=0.999,  # of AdamW
        moments="float32",  # in which AdamW keeps its moments; bfloat16: half the memory, rounded at random
        temperature=1.0,
        constrained_rollouts="",  # schema or contract: sample under its masks, renormalised; empty: off
        clip=5.0,  # c of EC Eq. 3; inf: no clip
        ratio="teacher_student",
        advantage="base_relative",
        normalize=False,  # subtract log Z of the target from the advantage: every ratio then ends at the target
        estimator="sampled",
        jsd=1.0,  # full_vocab: 1 is the reverse KL, 0 the forward KL, between them GKD's Jensen–Shannon divergence
        on_policy=1.0,  # share of steps on the student's own completions; the others are on the right answers (GKD)
        control_variate="none",  # kl or optimal, for sampled tokens: the same expected gradient, less noise
        contract_reward=0.0,  # weight of "the list parses", less the prompt's mean, in the advantage; 0: off
        aggregate="token",
        self_distillation=False,  # teacher and student may be one model: a control, in which λ does nothing
        kl_to_base=0.0,
        entropy_bonus=0.0,
        lambda_warmup_steps=0,
        ppo_clip=0.0,  # 0: off
        guard=_guard(),
        on_collapse="none",  # warn, lower_lambda or stop, when samples start to break the contract
        collapse=_collapse(),
        eval_steps=(),  # steps before the last at which each run is evaluated too
        eval_every=0,  # the same at its multiples; 0: none. The most useful checkpoint is kept
        head_chunk=1024,  # completion positions whose logits exist at one time
    )


def _guard() -> ml_collections.ConfigDict:
    return _section(  # keep the teacher's mode: λ_t = λ where λ·margin ≤ λ_flip, else `fallback`'s
        margin=0.0,  # 0: off
        fallback="teacher",  # teacher: 1; base: 0 where base and teacher have one mode, else 1
        scope="all",  # structure: a flip to another score does not count, for the margin and for the floor
        mask=False,  # teacher and base over what the contract allows next
        floor=0.0,  # log-odds that the mode keeps against each rival, if the base has them; 0: off
        structure=-1.0,  # λ of the positions that choose no score; -1: the run's
    )


def _collapse() -> ml_collections.ConfigDict:
    return _section(  # the criteria, on means over `window` steps against the window with the best parse
        window=5,
        parse_drop=0.2,  # the sampled parse rate is lower by more than this,
        length_change=0.5,  # or completions are longer or shorter by more than this share,
        flips=1.0,  # or more than this share of structural tokens has a target that flips; 1: never
        lower=0.5,  # lower_lambda: λ becomes 1 + lower·(λ − 1)
    )


def _parallel() -> ml_collections.ConfigDict:
    return _section(
        data=-1,  # devices that split the rows and copy the weights; -1: all that are left
        fsdp=1,  # devices that split rows and weights
        tensor=1,  # devices that split heads, MLP units and vocabulary
        gather_rollout=True,  # gather the student's weights over fsdp once per rollout, not at every token
        coordinator="",  # host:port of process 0, or JAX_COORDINATOR_ADDRESS; empty: one process, or found by jax
        num_processes=0,  # or JAX_NUM_PROCESSES
        process_id=-1,  # or JAX_PROCESS_ID
        timeout_s=60,  # how long processes wait for each other at start and end, and for a lost heartbeat
    )


def _reference() -> ml_collections.ConfigDict:
    """The objective's base: weights as they are, with a merged adapter if one is named; empty: the student's SFT."""
    return _section(weights="", adapter="")


def _dtype() -> ml_collections.ConfigDict:
    return _section(
        compute="float32",
        frozen="float32",  # of teacher and base; int8, int4: the weights of their products (models/quantized.py)
    )


def _sft_of_both() -> ml_collections.ConfigDict:
    return _section(
        teacher=_sft(),
        student=_sft(),
        continued=False,  # the teacher starts where the student's SFT ends: one run, read at two points
    )


def _optimizer() -> ml_collections.ConfigDict:
    return _section(b1=0.9, weight_decay=0.0, max_grad_norm=1.0)


def _rollout() -> ml_collections.ConfigDict:
    return _section(draft_tokens=-1)  # most per decode step; 0: none, -1: 8, none if is_small


def _forecast() -> ml_collections.ConfigDict:
    return _section(  # lambdas to decode without training, in addition to opd's
        lambdas=(),
        plain_lambdas=(),  # likewise, in addition to opd.plain_lambdas
        batch_size=8,
    )


def _predict() -> ml_collections.ConfigDict:
    return _section(  # the parse of trained students, before they are trained: predictions.json
        anchors=(),  # lambdas of the runs that show how far training gets; (): no prediction
        seeds=(1, 2),  # of those runs; none of opd.seeds
        largest_gap=0.15,  # in parse, between neighbours on the decoded grid of λ
        fixed_text_lists=0,  # lists on which students of these seeds train without rollouts, a predictor; 0: none
        only=False,  # stop before the sweep, to lock the prediction (python -m listopd_jax.prereg curve)
    )


def _evaluation() -> ml_collections.ConfigDict:
    return _section(
        batch_size=64,
        max_lists=0,
        bootstrap=2000,
        examples=3,
        forgetting=False,  # also score unrelated English by each policy: perplexity, and KL to the student's SFT
        constrained="",  # "schema,contract" or one of them: each policy is decoded under these masks too
        expected=False,  # also the error of the expected scores, of every list (stages/expected.py)
        margins=False,  # also how firmly each policy holds the contract's tokens (stages/margins.py)
    )


def _train() -> ml_collections.ConfigDict:
    return _section(checkpoint_every=50, keep_checkpoints=2, export=True)


def _track() -> ml_collections.ConfigDict:
    return _section(
        to=(),  # some of TRACKERS, in addition to metrics.jsonl and TensorBoard
        project="listopd_jax",
        log_completions_every=10,  # steps of OPD between samples kept in completions.jsonl; 0: none
        completions=8,  # of each sample, the first of the batch
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted field names and values of a config as nested dicts, in order."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from flatten(tree[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tree[name]
