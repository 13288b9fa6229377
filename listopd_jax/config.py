"""The one configuration object: every field with its default, checked once at the start.

Experiments live in `configs/*.py`; each starts from `defaults()` and sets what differs. A field that is not
here does not exist: ml_collections refuses misspelt names and wrong types, `validate` refuses impossible
combinations.
"""

import contextlib
import datetime
import itertools
import json
import keyword
import math
import pathlib
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags

from listopd_jax.errors import UserError, did_you_mean, one_line, unknown_name
from listopd_jax.files import json_sha256
from listopd_jax.models.config import PROJECTIONS, custom_config, named_config
from listopd_jax.trackers import TRACKERS

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
SMALL_WIDTH = 128
MOST_DRAFT_TOKENS = 64  # more cost more than they can save
TOKENS_PER_OBJECT = 12  # of an answer, by the tokenizer that the embedded task trains (9 to 11)
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
        attention="auto",  # splash (and the Pallas kernel for frozen scores) on TPUs, cudnn on GPUs in 16 bit, else xla
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
        schema="",  # of task json: a file with the JSON Schema of all records that have none of their own
        k=0,  # reviews a list; 0: 8, EC's, but 4 for the synthetic source, which two cores learn in minutes
        max_prompt=2048,  # tokens
        max_response=512,  # tokens; 0: TOKENS_PER_OBJECT for each review; other tasks: the longest right answer
        max_review_words=200,  # 0: uncut
        prompt_buckets=4,  # prompt widths to compile for
        chat_template=False,
        chat_date="2024-07-26",  # what a chat template that asks is told today's date is
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
        category="",  # of source clothing: train on this department's reviews; empty: all
        validation_category="",  # of source clothing: hold out this department's lists; empty: a share of all
        split_field="",  # of task json: the field that says "train" or "validation"; empty: at random, by `seed`
        synthetic_queries=0,  # of task cranfield: training lists besides, with queries of the abstracts' words
        seed=0,
        verify=True,
        synthetic=_section(products=500, reviews_per_product=16, noise=0.5, notes=()),
    )


def _model() -> ml_collections.ConfigDict:
    return _section(
        weights="",  # folder with safetensors or hub id; empty: random weights of `architecture`
        adapter="",  # folder of a LoRA adapter by peft, which is merged into `weights`
        lora=_section(  # train an adapter beside the frozen weights, W + alpha/rank · A B, not the weights themselves
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
        field="",  # of a record: what it has there decides whose it is; empty: all are of section `teacher`
        # "VALUE=WEIGHTS,VALUE=WEIGHTS": checkpoints as they are, as of teacher.weights; `teacher` is that section's
        route="",
        max_prompt=0,  # tokens of the prompts that the task gives teachers alone; 0: they read the student's
    )


def _sft() -> ml_collections.ConfigDict:
    return _section(
        steps=0,  # 0: as many as `epochs` give
        epochs=5.0,
        batch_size=128,
        microbatch=0,  # lists per gradient pass; 0: the whole batch
        lr=1e-5,
        warmup_steps=0,
        b2=0.999,  # of AdamW
        moments="float32",  # in which AdamW keeps its moments; bfloat16: half the memory, rounded at random
        # Errors by design, "NAME:SHARE,NAME:SHARE": a corruption of the task, and the share of answers that it breaks.
        # Lists have truncate (EC's SFT teacher cuts ~42 %), duplicate_id and those of task/corruptions.py.
        noise="",
        seed=0,
    )


def _opd() -> ml_collections.ConfigDict:
    return _section(
        lambdas=(1.0, 1.05, 1.1, 1.15, 1.2, 1.25),  # (): stop after the forecast, as launch/ does once a grid
        plain_lambdas=(),  # trained without the guard too: the same run shows what `guard` keeps and what it costs
        recommend=False,  # forecast them, and train at the one λ that the forecasts recommend (docs/forecast.md)
        seeds=(0,),
        steps=0,  # 0: as many as `epochs` give
        epochs=3.0,
        batch_size=128,  # prompts per step
        rollouts=1,  # completions per prompt
        microbatch=0,  # prompts per gradient pass; 0: the whole batch
        updates_per_batch=1,
        lr=1e-6,
        lr_decay="none",  # linear: from `lr` at the first step to 0 after the last
        warmup_steps=0,  # over which the learning rate rises to that: Adam's first steps are as long as any
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
        jsd=1.0,  # of full_vocab: 1 the reverse KL, 0 the forward KL, between them GKD's Jensen–Shannon divergence
        on_policy=1.0,  # share of steps on the student's own completions; the others are on the right answers (GKD)
        control_variate="none",  # kl or optimal: of sampled tokens; the same gradient on average, less noise
        contract_reward=0.0,  # weight of "the list parses", less the prompt's mean, in the advantage; 0: off
        aggregate="token",
        kl_to_base=0.0,
        entropy_bonus=0.0,
        lambda_warmup_steps=0,
        ppo_clip=0.0,  # 0: off
        guard=_section(  # keep the teacher's mode: λ_t = λ where λ·margin ≤ λ_flip, else that of `fallback`
            margin=0.0,  # 0: off
            fallback="teacher",  # teacher: 1; base: 0 where base and teacher have one mode, else 1
            scope="all",  # structure: a flip to another score is none, for the margin and for the floor
            mask=False,  # teacher and base over what the contract allows next
            floor=0.0,  # log-odds that the mode keeps against each rival, if the base has them; 0: off
            structure=-1.0,  # λ of the positions that choose no score; -1: that of the run
        ),
        on_collapse="none",  # warn, lower_lambda or stop, when the samples stop holding the contract
        collapse=_section(  # what that is, of means over `window` steps, against the window with the best parse
            window=5,
            parse_drop=0.2,  # the sampled parse rate is lower by more than this,
            length_change=0.5,  # or completions are longer or shorter by more than this share,
            flips=1.0,  # or more than this share of structural tokens has a target that flips; 1: never
            lower=0.5,  # lower_lambda: λ becomes 1 + lower·(λ − 1)
        ),
        eval_steps=(),  # steps before the last at which each run is evaluated too
        eval_every=0,  # the same at its multiples; 0: none. The most useful checkpoint is kept
        head_chunk=1024,  # completion positions whose logits exist at one time
    )


def _parallel() -> ml_collections.ConfigDict:
    return _section(
        data=-1,  # devices among which rows are split, weights copied; -1: all that are left
        fsdp=1,  # devices among which rows and weights are split
        tensor=1,  # devices among which heads, MLP units and vocabulary are split
        gather_rollout=True,  # gather the student's weights over fsdp once before it writes, not at every token
        coordinator="",  # host:port of process 0, or JAX_COORDINATOR_ADDRESS; empty: one process, or found by jax
        num_processes=0,  # or JAX_NUM_PROCESSES
        process_id=-1,  # or JAX_PROCESS_ID
        timeout_s=60,  # that processes wait for each other at start and end, and for a lost heartbeat
    )


def _reference() -> ml_collections.ConfigDict:
    """The objective's base: weights as they are, with a merged adapter if one is named; empty: the student's SFT."""
    return _section(weights="", adapter="")


def _dtype() -> ml_collections.ConfigDict:
    return _section(
        compute="float32",
        frozen="float32",  # of teacher and base; int8: the weights of their products (models/quantized.py)
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
    return _section(  # lambdas besides those of opd, decoded without training
        lambdas=(),
        plain_lambdas=(),  # the same besides opd.plain_lambdas
        batch_size=8,
    )


def _predict() -> ml_collections.ConfigDict:
    return _section(  # the parse of trained students, before they are trained: predictions.json
        anchors=(),  # lambdas of the runs that say how far training comes; (): no prediction
        seeds=(1, 2),  # of what is trained to predict; none of opd.seeds
        largest_gap=0.15,  # in parse, between neighbours of the grid of λ that is decoded
        fixed_text_lists=0,  # lists on which students of these seeds train without rollouts, a predictor; 0: none
        only=False,  # stop before the sweep, to lock the prediction (python -m listopd_jax.prereg curve)
    )


def _evaluation() -> ml_collections.ConfigDict:
    return _section(
        batch_size=64,
        max_lists=0,
        bootstrap=2000,
        examples=3,
        forgetting=False,  # also how each policy reads unrelated English: perplexity, and KL to the student's SFT
        constrained="",  # "schema,contract" or one of them: each policy is decoded under these masks too
        expected=False,  # also the error of the expected scores, of every list (stages/expected.py)
        margins=False,  # also how firmly each policy holds the contract's tokens (stages/margins.py)
    )


def _train() -> ml_collections.ConfigDict:
    return _section(checkpoint_every=50, keep_checkpoints=2, export=True)


def _track() -> ml_collections.ConfigDict:
    return _section(
        to=(),  # of TRACKERS, beside metrics.jsonl and TensorBoard
        project="listopd_jax",
        log_completions_every=10,  # steps of OPD between samples kept in completions.jsonl; 0: none
        completions=8,  # of each sample, the first of the batch
    )


def auto_preset() -> str:
    """`tiny` on a CPU, `paper` on a GPU or TPU."""
    import jax

    return "tiny" if jax.default_backend() == "cpu" else "paper"


def find_config_file(argv: Sequence[str]) -> list[str]:
    """`argv` with a config file that the working directory lacks taken from beside this package.

    That is the checkout's own folder, or where `pip install .` put configs/. UserError if it is in neither place.
    """
    root = pathlib.Path(__file__).resolve().parents[1]
    found = list(argv)
    for i, arg in enumerate(found):
        flag, _, value = arg.partition("=")
        path, colon, preset = value.partition(":")
        if flag != "--config" or not path or pathlib.Path(path).exists():
            continue
        if not (root / path).exists():
            raise UserError(
                f"--config={path}: no such file, here or beside the package; run in a checkout of listopd_jax"
            )
        found[i] = f"--config={root / path}{colon}{preset}"
    return found


def unknown_field(argv: Sequence[str], e: Exception) -> str:
    """One line for a field that does not exist, by its new name or a near one: ml_collections names the last part."""
    message = str(e)
    names = [a.split("=")[0] for a in argv if a.startswith("--config.")]
    wrong = (re.search(r'(?:Key "|\b)(\w+)', message) or [""])[1]
    where = next((n for n in names if n.rsplit(".", 1)[-1] == wrong), "--config")
    answers = {old: f"{old} is {new} now" for old, new in RENAMED.items()}
    answers |= {old: f"{old} is gone, leave it out: {why}" for old, why in REMOVED.items()}
    for old, answer in answers.items():
        if where == f"--config.{old}" or (where == "--config" and old.endswith(f".{wrong}")):
            return f"{where}: {answer}"
    near = re.search(r'Did you mean \\?"([^"\\]+)', message)
    hint = f"did you mean {near[1]}? " if near else ""
    return f"{where}: there is no such field; {hint}listopd_jax/config.py has them all"


@contextlib.contextmanager
def flag_mistakes(argv: Sequence[str]) -> Iterator[None]:
    """What absl and ml_collections raise inside for a wrong flag, field, type or file is a UserError of one line."""
    if problem := keyword_field(argv) or decimal_comma(argv):
        raise UserError(problem)
    try:
        yield
    except (AttributeError, KeyError) as e:
        raise UserError(unknown_field(argv, e)) from e
    except (flags.Error, TypeError, ValueError, ImportError, OSError, SyntaxError) as e:
        raise UserError(one_line(e)) from e


def keyword_field(argv: Sequence[str]) -> str | None:
    """One line for an override of a field that no config can have, a Python keyword; None if there is none.

    `--config.opd.lambda=1.2` and `--config.opd.lambda.x=1` are no Python, so ml_collections cannot read them.
    """
    for name in (a.split("=")[0] for a in argv if a.startswith("--config.")):
        parts = name.removeprefix("--config.").split(".")
        at = next((i for i, part in enumerate(parts) if keyword.iskeyword(part)), None)
        if at is not None:
            known = [field for field, _ in flatten(defaults().to_dict())]
            near = did_you_mean(".".join(parts[: at + 1]), known).replace("'", "")
            return f"{name}: no such field; {near}listopd_jax/config.py has them all"
    return None


def decimal_comma(argv: Sequence[str]) -> str | None:
    """One line for a λ that is written as 1,5 and may mean 1.5, or 1 and 5; None if there is none."""
    fields = r"(?:opd|forecast)\.(?:plain_)?lambdas|predict\.anchors"
    for arg in argv:
        if found := re.fullmatch(rf"(--config\.(?:{fields}))=([0-9]+),([0-9]+)", arg):
            field, one, two = found.groups()
            return f"{arg}: one λ or two? Write {field}={one}.{two}, or {field}={one}.0,{two}.0"
    return None


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted field names and values of a config as nested dicts, in order."""
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from flatten(tree[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tree[name]


_NAMES = {
    "opd.ratio": RATIOS,
    "opd.advantage": ADVANTAGES,
    "opd.estimator": ESTIMATORS,
    "opd.aggregate": AGGREGATES,
    "opd.control_variate": CONTROL_VARIATES,
    "opd.lr_decay": LR_DECAYS,
    "opd.on_collapse": ON_COLLAPSE,
    "opd.guard.fallback": FALLBACKS,
    "task.name": TASKS,
    "opd.guard.scope": SCOPES,
    "data.source": SOURCES,
    "task.ndcg_gain": ("linear", "exponential"),
    "remat": REMATS,
    "attention": ATTENTIONS,
    "dtype.compute": DTYPES,
    "dtype.frozen": (*DTYPES, "int8"),
    "sft.teacher.moments": DTYPES,
    "sft.student.moments": DTYPES,
    "opd.moments": DTYPES,
}

_POSITIVE = """
task.max_prompt task.prompt_buckets data.vote_cap
data.synthetic.reviews_per_product sft.teacher.batch_size sft.teacher.lr sft.student.batch_size sft.student.lr
opd.batch_size opd.rollouts opd.updates_per_batch opd.lr opd.temperature opd.head_chunk
opd.collapse.window opd.collapse.parse_drop opd.collapse.length_change predict.largest_gap
forecast.batch_size evaluation.batch_size evaluation.bootstrap train.checkpoint_every train.keep_checkpoints
parallel.timeout_s track.completions
""".split()

_NOT_NEGATIVE = """
task.max_review_words data.max_broken data.max_reviews_per_product data.max_lists data.synthetic.noise
data.synthetic_queries
sft.teacher.steps sft.teacher.epochs sft.teacher.warmup_steps sft.teacher.microbatch
sft.student.steps sft.student.epochs sft.student.warmup_steps sft.student.microbatch
opd.steps opd.epochs opd.warmup_steps opd.microbatch opd.kl_to_base opd.entropy_bonus opd.lambda_warmup_steps
opd.guard.margin opd.contract_reward opd.collapse.flips opd.eval_every opd.guard.floor predict.fixed_text_lists
teachers.max_prompt
evaluation.max_lists evaluation.examples optimizer.weight_decay optimizer.max_grad_norm
track.log_completions_every
""".split()

_SEEDS = "seed data.seed sft.teacher.seed sft.student.seed".split()

_SHARES = """
data.validation_share
optimizer.b1 sft.teacher.b2 sft.student.b2 opd.b2 opd.ema opd.ppo_clip
opd.collapse.lower
""".split()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _validate_fields(values: dict[str, Any]) -> None:
    for field, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        for x in numbers:
            _require(not isinstance(x, float) or not math.isnan(x), f"{field}={value}: must not be NaN")
            _require(
                field == "opd.clip" or not isinstance(x, float) or math.isfinite(x),
                f"{field}={value}: must be finite",
            )
    for field, known in _NAMES.items():
        if values[field] not in known:
            raise unknown_name(field, values[field], known)
    for field in _POSITIVE:
        _require(values[field] > 0, f"{field}={values[field]}: must be > 0")
    for field in _NOT_NEGATIVE:
        _require(values[field] >= 0, f"{field}={values[field]}: must be >= 0")
    for field in _SEEDS:
        _require(_is_seed(values[field]), f"{field}={values[field]}: must be in [0, 2^32)")
    for field in _SHARES:
        _require(0 <= values[field] < 1, f"{field}={values[field]}: must be in [0, 1)")
    for field in ("opd.jsd", "opd.on_policy"):
        _require(0 <= values[field] <= 1, f"{field}={values[field]}: must be in [0, 1]")


def _is_lambda(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x >= 0


def _is_seed(x: Any) -> bool:
    return isinstance(x, int) and 0 <= x < 2**32


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    """Whether `text` is that of a server, without user, password or query."""
    form = r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[\w./-]*)?"
    try:
        return re.fullmatch(form, text) is not None and urllib.parse.urlsplit(text).port != 0
    except ValueError:  # no such port or IPv6 address
        return False


def _validate_grid(config: ml_collections.ConfigDict) -> None:
    lambdas, seeds = config.opd.lambdas, config.opd.seeds
    _require(len(seeds) > 0, "opd.seeds is empty: give at least one seed, e.g. (0,)")
    eval_steps = config.opd.eval_steps
    _require(
        all(isinstance(n, int) and n > 0 for n in eval_steps) and sorted(set(eval_steps)) == list(eval_steps),
        f"opd.eval_steps={eval_steps}: give ascending numbers of steps, e.g. (60,)",
    )
    for section, name in itertools.product(("forecast", "opd"), ("lambdas", "plain_lambdas")):
        field, values = f"{section}.{name}", config[section][name]
        for x in values:
            _require(_is_lambda(x), f"{field}={values}: every lambda is a number >= 0, not {x!r}")
        _require(
            len(set(values)) == len(values) or section != "opd", f"{field}={values}: a value stands twice"
        )
        _require(
            name == "lambdas" or not values or guard_text(config.opd.guard) != "",
            f"{field}={values} are without the guard, and opd.guard is off: give them as {section}.lambdas, or set "
            "opd.guard.margin (1.25)",
        )
    for x in seeds:
        _require(_is_seed(x), f"opd.seeds={seeds}: every seed is a whole number in [0, 2^32), not {x!r}")
    _validate_anchors(config)
    _require(
        not config.opd.recommend or 1 in {*lambdas, *config.forecast.lambdas},
        "opd.recommend compares every λ with λ = 1: add 1.0 to forecast.lambdas",
    )
    _require(
        not config.opd.recommend or config.opd.advantage == "base_relative",
        "opd.recommend is about the base-relative target, not opd.advantage='no_base'; set one of the two",
    )
    _require(len(set(seeds)) == len(seeds), f"opd.seeds={seeds}: a value stands twice")


def _validate_anchors(config: ml_collections.ConfigDict) -> None:
    anchors, seeds = config.predict.anchors, config.predict.seeds
    for x in anchors:
        _require(_is_lambda(x), f"predict.anchors={anchors}: every lambda is a number >= 0, not {x!r}")
    for x in seeds:
        _require(_is_seed(x), f"predict.seeds={seeds}: every seed is a whole number in [0, 2^32), not {x!r}")
    for name, values in (("anchors", anchors), ("seeds", seeds)):
        _require(len(set(values)) == len(values), f"predict.{name}={values}: a value stands twice")
    _require(
        predicts(config) or not config.predict.only,
        "predict.only=True stops after the prediction, and without predict.anchors there is none: give some, or "
        "predict.fixed_text_lists=64",
    )
    if not predicts(config):
        return
    _require(
        not anchors or len(anchors) >= 2 and len(anchors) * len(seeds) >= 3,
        f"predict.anchors={anchors}, predict.seeds={seeds}: three runs are needed, of two λ; give more",
    )
    shared = sorted(set(seeds) & set(config.opd.seeds))
    _require(
        not shared,
        f"predict.seeds={seeds}: {shared} are in opd.seeds too; a prediction must not see the runs that judge it",
    )
    _require(
        config.opd.advantage == "base_relative" and config.opd.ratio != "aspo",
        "predict.anchors, predict.fixed_text_lists: the limit of no_base and of ratio aspo is not known; set () and 0",
    )
    _require(
        not config.opd.recommend,
        "section predict is about runs at all opd.lambdas, and opd.recommend trains at one: leave one of them out",
    )
    _require(
        config.opd.on_collapse in ("none", "warn"),
        f"section predict is about runs that keep their λ to the end, which opd.on_collapse={config.opd.on_collapse!r} "
        "changes: leave one of them out",
    )


def noise_shares(sft: Any, field: str = "sft") -> tuple[tuple[str, float], ...]:
    """The corruptions of an SFT section and their shares; UserError, which names `field`, for an entry that is none."""
    shares = []
    for entry in filter(None, sft.noise.split(",")):
        found = re.fullmatch(r" *([A-Za-z_]\w*):([0-9]*\.?[0-9]+) *", entry)
        _require(
            found is not None,
            f"{field}.noise={sft.noise!r}: write NAME:SHARE, e.g. 'truncate:0.2,wrong_digit:0.1'",
        )
        shares.append((found[1], float(found[2])))
    _require(
        sum(share for _, share in shares) <= 1 and len(dict(shares)) == len(shares),
        f"{field}.noise={sft.noise!r}: shares must not sum to more than 1, and no name stand twice",
    )
    return tuple(shares)


def teacher_routes(teachers: Any) -> dict[str, str]:
    """Value of `teachers.field` → weights of its teacher, or TEACHER; UserError for an entry that is none."""
    pairs = [entry.partition("=") for entry in teachers.route.split(",")] if teachers.route else []
    routes = {value.strip(): weights.strip() for value, _, weights in pairs}
    _require(
        all(routes) and all(routes.values()) and len(routes) == len(pairs),
        f"teachers.route={teachers.route!r}: write VALUE=WEIGHTS, no value twice, e.g. 'hats=runs/hats,shoes=teacher'",
    )
    return routes


def _validate_server(config: ml_collections.ConfigDict) -> None:
    """What a teacher that is served asks of the rest: its address is shown and kept, so it must hold no secret."""
    teacher, opd = config.teacher, config.opd
    _require(
        bool(teacher.server) == bool(teacher.served_name),
        "teacher.server and teacher.served_name (the model's name there): set both, or neither",
    )
    if not teacher.server:
        return
    _require(
        _is_address(teacher.server),
        "teacher.server: write http(s)://HOST:PORT, without user, password or query; a key goes into the environment "
        "as LISTOPD_TEACHER_KEY",
    )
    _require(
        not (teacher.weights or config.teachers.route),
        "teacher.server is the only teacher of a run: leave teacher.weights and teachers.route out",
    )
    _require(
        bool(config.tokenizer.path),
        "tokenizer.path is empty: the teacher of teacher.server needs its tokenizer",
    )
    _require(
        not config.sft.continued,
        "sft.continued trains the teacher, which teacher.server only reads: drop one",
    )
    needing = {
        "opd.estimator": opd.estimator == "full_vocab",
        "opd.recommend": opd.recommend,
        "predict.anchors": bool(config.predict.anchors),
        "predict.fixed_text_lists": config.predict.fixed_text_lists > 0,
        "opd.normalize": opd.normalize,
        "opd.control_variate": opd.control_variate != "none",
        "opd.on_collapse": opd.on_collapse != "none",
        "opd.guard": bool(guard_text(opd.guard)),
    }
    for field in (field for field, used in needing.items() if used):
        raise UserError(
            f"{field} needs the teacher's whole distribution, and teacher.server gives one number a token: leave one "
            "of them out"
        )


def _validate_teachers(config: ml_collections.ConfigDict) -> None:
    teachers, routes = config.teachers, teacher_routes(config.teachers)
    _require(
        bool(teachers.field) == bool(routes),
        f"teachers.field={teachers.field!r} and teachers.route={teachers.route!r}: set both, or neither",
    )
    _require(
        not routes or TEACHER in routes.values(),
        f"teachers.route={teachers.route!r}: no record is of section teacher; write VALUE={TEACHER} for its own, with "
        "teacher.weights",
    )
    _require(
        not routes or bool(config.tokenizer.path),
        "tokenizer.path is empty: the checkpoints of teachers.route need their tokenizer",
    )
    _require(
        not (routes and config.evaluation.expected),
        "evaluation.expected reads all lists with one teacher, so not with teachers.route: leave one of them out",
    )
    _require(
        not (teachers.max_prompt and (config.opd.recommend or predicts(config))),
        "opd.recommend and section predict need a forecast, and with teachers.max_prompt there is none",
    )


def _validate_combinations(config: ml_collections.ConfigDict) -> None:
    for role in ("teacher", "student"):
        noise_shares(config.sft[role], f"sft.{role}")
    opd, drafts = config.opd, config.rollout.draft_tokens
    _require(
        -1 <= drafts <= MOST_DRAFT_TOKENS,
        f"rollout.draft_tokens={drafts}: must be from 0 to {MOST_DRAFT_TOKENS}, or -1 for the default",
    )
    _require(
        config.task.max_response != 1,
        "task.max_response=1: must be at least 2 tokens, or 0 to follow the task",
    )
    _require(opd.clip > 1, f"opd.clip={opd.clip}: the clip c must be > 1 (inf for none), EC Eq. 3")
    guard, margin = opd.guard, opd.guard.margin
    _require(
        margin == 0 or margin >= 1,
        f"opd.guard.margin={margin}: must be 0 (off) or at least 1; 1.25 is a start",
    )
    _require(
        guard.structure == -1 or guard.structure >= 0,
        f"opd.guard.structure={guard.structure}: a λ ≥ 0, or -1 for that of the run",
    )
    for name, off in (("margin", 0), ("mask", False), ("floor", 0), ("structure", -1)):
        _require(
            guard[name] == off or opd.advantage == "base_relative",
            f"opd.guard.{name} guards the base-relative target, not opd.advantage='no_base'; set one of the two",
        )
    for name, part in (
        ("opd", opd),
        ("sft.teacher", config.sft.teacher),
        ("sft.student", config.sft.student),
    ):
        _require(
            part.microbatch == 0 or part.batch_size % part.microbatch == 0,
            f"{name}.microbatch={part.microbatch} must divide {name}.batch_size={part.batch_size}",
        )
    _require(
        opd.estimator == "sampled" or (opd.ratio == "none" and opd.ppo_clip == 0),
        "opd.estimator='full_vocab' is exact, without importance ratios: set opd.ratio='none' and opd.ppo_clip=0",
    )
    _require(
        opd.estimator == "sampled" or not opd.normalize,
        "opd.normalize corrects the advantage of sampled tokens, which opd.estimator='full_vocab' does not need: set "
        "opd.normalize=False",
    )
    _require(
        opd.steps > 0 or opd.epochs > 0, "opd.steps=0 and opd.epochs=0: nothing to train; set one of them"
    )
    _require(
        config.tokenizer.path or not any(config[r].weights for r in ("teacher", "student", "reference")),
        "tokenizer.path is empty: models with weights need their tokenizer, e.g. the same folder or hub id",
    )
    _validate_options(config)
    _validate_trackers(config.track)
    _validate_guard(config)
    _validate_parallel(config.parallel)
    size = config.tokenizer.vocab_size
    _require(size >= 258, f"tokenizer.vocab_size={size}: at least 258 are needed (256 bytes, EOS, PAD)")
    for role in ("teacher", "student"):
        _validate_model(role, config[role], size)


def _validate_options(config: ml_collections.ConfigDict) -> None:
    """What the options of docs/training_options.md ask of the rest."""
    opd = config.opd
    _require(
        not opd.steps or opd.warmup_steps <= opd.steps,
        f"opd.warmup_steps={opd.warmup_steps}: of opd.steps={opd.steps}, so opd.lr is never reached; set fewer",
    )
    _require(
        opd.estimator == "sampled" or (opd.control_variate == "none" and opd.contract_reward == 0),
        "opd.control_variate and opd.contract_reward are about sampled tokens, which opd.estimator='full_vocab' does "
        "without: leave both off",
    )
    _require(
        opd.estimator == "full_vocab" or (opd.jsd == 1 and opd.on_policy == 1),
        f"opd.jsd={opd.jsd:g}, opd.on_policy={opd.on_policy:g}: other divergences and other data than the student's "
        "own ask for exact gradients; set opd.estimator='full_vocab' and opd.ratio='none'",
    )
    _require(
        opd.jsd == 1 or not opd.guard.mask,
        f"opd.jsd={opd.jsd:g}: opd.guard.mask is for the reverse KL; set opd.jsd=1.0 or opd.guard.mask=False",
    )
    _require(
        opd.on_policy == 1 or opd.on_collapse == "none",
        f"opd.on_policy={opd.on_policy:g}: opd.on_collapse watches the student's own completions at every step; set "
        "one of the two back to its default",
    )
    on_policy = opd.updates_per_batch == 1 and opd.temperature == 1 and opd.ppo_clip == 0
    _require(
        on_policy or opd.control_variate == "none",
        "opd.control_variate keeps the expected gradient only where the student itself samples: set "
        "opd.updates_per_batch=1, opd.temperature=1.0 and opd.ppo_clip=0.0",
    )
    _require(
        opd.rollouts > 1 or opd.contract_reward == 0,
        "opd.contract_reward compares the completions of a prompt with each other: set opd.rollouts to at least 2",
    )
    _require(
        not config.reference.weights or opd.advantage == "base_relative" or opd.kl_to_base > 0,
        "reference.weights is the base, which opd.advantage='no_base' does not look at; leave one of them out",
    )
    _require(
        bool(config.reference.weights) or not config.reference.adapter,
        f"reference.adapter={config.reference.adapter}: set reference.weights to the model that it was trained on",
    )
    _require(
        not config.reference.weights or config.student.lora.rank == 0,
        "student.lora.rank: an adapter is trained on the base's own arrays; set it to 0, or drop reference.weights",
    )


def _validate_constraints(config: ml_collections.ConfigDict) -> None:
    opd, asked = config.opd, constraints(config)
    for field in ("evaluation.constrained", "opd.constrained_rollouts"):
        for name in asked[field]:
            if name not in CONSTRAINTS:
                raise unknown_name(field, str(name), CONSTRAINTS)
    named = [field for field, names in asked.items() if "contract" in names]
    _require(
        not named or ranks_reviews(config),
        f"{', '.join(named)}: 'contract' is of task.name='reviews', not of {task_name(config)!r}; take 'schema'",
    )
    _require(
        not opd.constrained_rollouts or opd.control_variate == "none",
        "opd.control_variate keeps the expected gradient only where the student itself samples, not under the masks of "
        "opd.constrained_rollouts; leave one of them off",
    )


def constraints(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> dict[str, tuple]:
    """The names of constraints that a config asks for, by field."""
    rollouts = config.opd.constrained_rollouts
    return {
        "evaluation.constrained": tuple(filter(None, config.evaluation.constrained.split(","))),
        "opd.constrained_rollouts": (rollouts,) if rollouts else (),
    }


def _validate_guard(config: ml_collections.ConfigDict) -> None:
    """What sft.continued, the expected scores and the guards ask of the rest."""
    opd = config.opd
    _require(
        not config.sft.continued
        or config.teacher.to_dict() == config.student.to_dict() | {"server": "", "served_name": ""},
        "sft.continued trains the teacher on from the student's end: teacher and student must be the same section",
    )
    _require(
        ranks_reviews(config)
        or not (config.evaluation.expected or config.evaluation.margins or guard_knows_contract(opd.guard)),
        f"task {task_name(config)!r}: evaluation.expected, evaluation.margins and guards that know the contract "
        "(opd.guard.scope, mask, structure) are of task.name='reviews'; leave them off",
    )
    _require(
        opd.guard.scope == "all" or opd.guard.margin > 0 or opd.guard.floor > 0,
        f"opd.guard.scope={opd.guard.scope!r} does nothing alone: set opd.guard.margin (1.25) or opd.guard.floor too",
    )
    _require(
        opd.control_variate == "none" or not (opd.guard.mask or opd.guard.floor),
        "opd.control_variate knows no target of opd.guard.mask or opd.guard.floor: leave one of them off",
    )


def _validate_trackers(track: ml_collections.ConfigDict) -> None:
    for name in track.to:
        if name not in TRACKERS:
            raise unknown_name("track.to", str(name), TRACKERS)
    _require(
        track.project != "" or not track.to,
        "track.project is empty: trackers need the name of a project",
    )


def _validate_parallel(parallel: ml_collections.ConfigDict) -> None:
    axes = {axis: parallel[axis] for axis in ("data", "fsdp", "tensor")}
    for axis, size in axes.items():
        _require(size == -1 or size > 0, f"parallel.{axis}={size}: must be > 0, or -1 for all devices left")
    _require(
        list(axes.values()).count(-1) <= 1,
        f"parallel.{', parallel.'.join(a for a in axes if axes[a] == -1)}: only one of them can be -1",
    )
    _require(parallel.num_processes >= 0, f"parallel.num_processes={parallel.num_processes}: must be >= 0")


def _validate_data(config: ml_collections.ConfigDict) -> None:
    data, k = config.data, config.task.k
    cap = data.max_reviews_per_product
    who = f"data.source={data.source!r}" if ranks_reviews(config) else f"task {task_name(config)!r}"
    _require(
        bool(data.path) or (ranks_reviews(config) and data.source in ("synthetic", "amazon2023")),
        f"data.path is empty: {who} needs a file, e.g. --config.data.path=FILE",
    )
    _require(
        _is_date(config.task.chat_date), f"task.chat_date={config.task.chat_date!r}: write it as YYYY-MM-DD"
    )
    _require(k == 0 or k >= 2, f"task.k={k}: a list to rank has at least 2 reviews")
    _require(
        cap == 0 or cap >= max(k, 2),
        f"data.max_reviews_per_product={cap}: must be 0 (all) or at least task.k",
    )
    _require(data.max_broken <= 1, f"data.max_broken={data.max_broken}: a share from 0 to 1")
    _require(data.validation_share > 0, "data.validation_share=0.0: policies are evaluated on held-out lists")
    _require(data.max_lists != 1, "data.max_lists=1: must be 0 (all) or at least 2")
    _require(
        not data.synthetic_queries or task_name(config) == "cranfield",
        f"data.synthetic_queries is of task.name='cranfield', not of {task_name(config)!r}; set it to 0",
    )
    _validate_categories(config, who)
    _require(data.synthetic.products >= 2, f"data.synthetic.products={data.synthetic.products}: must be >= 2")


def _validate_categories(config: ml_collections.ConfigDict, who: str) -> None:
    data, known = config.data, ranks_reviews(config) and config.data.source == "clothing"
    for name in ("category", "validation_category"):
        _require(
            known or not data[name],
            f"data.{name}={data[name]}: {who} has no departments, data.source=clothing does; leave it empty",
        )
    _require(
        not data.category or data.category != data.validation_category,
        f"data.validation_category={data.validation_category} is data.category too; empty is a random split of it",
    )


def _validate_model(role: str, model: ml_collections.ConfigDict, vocab: int) -> None:
    """UserError if the dimensions of a model without weights are none; `vocab` stands for the tokenizer's size."""
    _validate_lora(role, model.lora)
    _require(
        bool(model.weights) or not model.adapter,
        f"{role}.adapter={model.adapter}: an adapter of what? Set {role}.weights to the model that it was trained on",
    )
    if model.weights:
        return
    try:
        custom_config(model, vocab) if model.architecture == "custom" else named_config(model.architecture)
    except UserError as e:
        raise UserError(f"{role}: {e}") from e


def _validate_lora(role: str, lora: ml_collections.ConfigDict) -> None:
    _require(lora.rank >= 0, f"{role}.lora.rank={lora.rank}: must be >= 0")
    _require(lora.alpha > 0, f"{role}.lora.alpha={lora.alpha}: must be > 0")
    for target in lora.targets.split(","):
        if target not in LORA_TARGETS:
            raise unknown_name(f"{role}.lora.targets", target, LORA_TARGETS)


def validate(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """A checked, frozen copy of `config`; UserError names the first field that is wrong, its value and the fix."""
    _validate_fields(dict(flatten(config.to_dict())))
    _validate_grid(config)
    _validate_data(config)
    _validate_combinations(config)
    _validate_constraints(config)
    _validate_teachers(config)
    _validate_server(config)
    checked = config.copy_and_resolve_references()
    checked.task.k = config.task.k or (4 if is_embedded(config) else 8)
    if ranks_reviews(config):
        checked.task.max_response = config.task.max_response or TOKENS_PER_OBJECT * checked.task.k
    return ml_collections.FrozenConfigDict(checked)


def task_name(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> str:
    """How messages call the task: by its file, if it has one."""
    return config.task.file or config.task.name


def ranks_reviews(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> bool:
    """Whether the task is that of reviews, which alone has `data.source`."""
    return task_name(config) == "reviews"


def is_embedded(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> bool:
    """Whether the records are the embedded synthetic reviews."""
    return ranks_reviews(config) and config.data.source == "synthetic"


def eval_budgets(opd: Any, steps: int) -> list[int]:
    """The steps at which section `opd` evaluates a run of `steps` steps, ascending; the last is its end."""
    every = range(opd.eval_every, steps, opd.eval_every) if opd.eval_every else ()
    return [*sorted({*every, *(n for n in opd.eval_steps if n < steps)}), steps]


def is_small(config: ml_collections.FrozenConfigDict) -> bool:
    """Whether all models are of a size at which compiling takes longer than running: made here, at most 128 wide."""
    models = (config.student, config.teacher)
    others = config.reference.weights or config.teachers.route
    made_here = all(not m.weights and m.architecture == "custom" for m in models) and not others
    return made_here and all(m.hidden_size <= SMALL_WIDTH for m in models)


def guard_text(guard: ml_collections.FrozenConfigDict) -> str:
    """The options of config section `opd.guard` that differ from the defaults, "" where it is off."""
    if not (guard.margin or guard.mask or guard.floor or guard.structure >= 0):
        return ""
    off = defaults().opd.guard
    return " ".join(f"{name}={guard[name]}" for name in off if guard[name] != off[name])


def predicts(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> bool:
    """Whether the parse of the sweep is predicted before it is run."""
    return bool(config.predict.anchors) or config.predict.fixed_text_lists > 0


def unguarded(opd: ml_collections.FrozenConfigDict) -> ml_collections.FrozenConfigDict:
    """Config section `opd` with its guard off, as the runs at `plain_lambdas` have it."""
    return ml_collections.FrozenConfigDict(opd.to_dict() | {"guard": defaults().opd.guard.to_dict()})


def guard_knows_contract(guard: ml_collections.FrozenConfigDict) -> bool:
    """Whether config section `opd.guard` needs the grammar of the answers."""
    return bool(guard_text(guard)) and (guard.scope == "structure" or guard.mask or guard.structure >= 0)


def to_json(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (infinities as the string "inf"), field order fixed."""
    return json.loads(json.dumps(_plain(config.to_dict()), sort_keys=True, allow_nan=False))


def from_json(saved: dict[str, Any]) -> ml_collections.FrozenConfigDict:
    """The checked config whose `to_json` is `saved`; a field that an older one lacks has its default.

    What an older one has of REMOVED is left out. UserError for a field that does not exist, or a value that is none of
    its.
    """
    config, known = defaults(), dict(flatten(defaults().to_dict()))
    for field, value in flatten(saved):
        if field in REMOVED:
            continue
        _require(field not in RENAMED, f"{field} is {RENAMED.get(field)} now; rename it in the saved config")
        _require(field in known, f"{field}: there is no such field in this version")
        _require(value is not None, f"{field}=None: must have a value")
        if isinstance(known[field], float) and value == "inf":
            value = math.inf
        try:
            config.update_from_flattened_dict({field: tuple(value) if isinstance(value, list) else value})
        except (TypeError, ValueError) as e:
            raise UserError(f"{field}={value!r}: {one_line(e)}") from e
    return validate(config)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


MAY_CHANGE = (
    "opd.lambdas",
    "opd.plain_lambdas",
    "opd.seeds",
    "forecast.lambdas",
    "forecast.plain_lambdas",
    "predict.",
    "parallel.",
    "attention",
    "track.",
    "teacher.server",
)
"""Fields and sections that may differ between calls on one workdir: the grid may grow, devices and trackers change.

A server may move; whether there is one, and for which model, `teacher.served_name` says.
"""


def fixed_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """The dotted fields of a config in JSON values, without those that `MAY_CHANGE`."""
    return {field: value for field, value in flatten(saved) if not field.startswith(MAY_CHANGE)}


EVALUATION = ("task.", "data.", "tokenizer.", "evaluation.", "dtype.compute")
"""Fields and sections that decide what a policy's record says, whatever the policy."""


def changed_field(
    before: dict[str, Any], now: dict[str, Any], among: tuple[str, ...] = ("",)
) -> tuple[str, Any, Any] | None:
    """(name, before, now) of the first of `fixed_fields` in which two configs in JSON values differ.

    Only fields whose names begin as one of `among` count.
    """
    old, new = map(fixed_fields, (before, now))
    names = (name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
    return next(((name, old.get(name), new.get(name)) for name in names if name.startswith(among)), None)


def digest(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> str:
    """SHA-256 of the fixed fields of a config."""
    return saved_digest(to_json(config))


def saved_digest(saved: dict[str, Any]) -> str:
    """`digest` of the config whose `to_json` is `saved`, in the version that saved it: fields may have come since."""
    return json_sha256(fixed_fields(saved))


def code_revision() -> str:
    """Git commit of the code that runs, with "+changes" if the tree differs; "unknown" outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(pathlib.Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    status = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
