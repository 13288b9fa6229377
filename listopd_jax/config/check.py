"""The checks that a configuration passes once, before anything is read: each field alone, then fields together."""

import itertools
import sys
from collections.abc import Sequence

import ml_collections

from listopd_jax.config.derived import (
    constraints,
    guard_knows_contract,
    guard_text,
    is_embedded,
    noise_shares,
    predicts,
    ranks_reviews,
    task_name,
    teacher_routes,
)
from listopd_jax.config.fields import CONSTRAINTS, LORA_TARGETS, TEACHER, flatten
from listopd_jax.config.sweep import at_point, sweep_labels
from listopd_jax.config.values import is_address, is_date, is_lambda, is_seed, validate_fields
from listopd_jax.errors import UserError, require, unknown_name
from listopd_jax.models.config import custom_config, named_config
from listopd_jax.trackers import TRACKERS

MOST_DRAFT_TOKENS = 64  # more cost more than they can save
TOKENS_PER_OBJECT = 12  # of an answer, by the tokenizer that the embedded task trains (9 to 11)


def validate(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """A checked, frozen copy of `config`; UserError names the first field that is wrong, its value and the fix."""
    validate_fields(dict(flatten(config.to_dict())))
    _validate_grid(config)
    _validate_data(config)
    _validate_combinations(config)
    _validate_constraints(config)
    _validate_teachers(config)
    _validate_server(config)
    _validate_sweep(config)
    checked = config.copy_and_resolve_references()
    checked.task.k = config.task.k or (4 if is_embedded(config) else 8)
    if ranks_reviews(config):
        checked.task.max_response = config.task.max_response or TOKENS_PER_OBJECT * checked.task.k
    _validate_packing(checked)  # of the lengths that a run has
    return ml_collections.FrozenConfigDict(checked)


def for_its_task(config: ml_collections.ConfigDict, argv: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config without the options of a preset that only lists of reviews have, and one line on stderr about them.

    So any preset serves any task. Options that the flags `argv` set stay, as do those that train against the contract's
    grammar: `validate` refuses them.
    """
    typed = {arg.lstrip("-").split("=")[0].removeprefix("config.") for arg in argv}
    own = {"evaluation.expected": False, "evaluation.margins": False, "opd.guard.scope": "all"}
    given = dict(flatten(config.to_dict()))
    dropped = {field: value for field, value in own.items() if given[field] != value and field not in typed}
    if ranks_reviews(config) or not dropped:
        return config
    named = ", ".join(f"{field}={given[field]!r}" for field in dropped)
    print(f"task {task_name(config)}: ignoring {named}, which only lists of reviews have", file=sys.stderr)
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dropped)
    return config


def _validate_grid(config: ml_collections.ConfigDict) -> None:
    lambdas, seeds = config.opd.lambdas, config.opd.seeds
    require(len(seeds) > 0, "opd.seeds is empty: give at least one seed, e.g. (0,)")
    eval_steps = config.opd.eval_steps
    require(
        all(isinstance(n, int) and n > 0 for n in eval_steps) and sorted(set(eval_steps)) == list(eval_steps),
        f"opd.eval_steps={eval_steps}: give ascending numbers of steps, e.g. (60,)",
    )
    for section, name in itertools.product(("forecast", "opd"), ("lambdas", "plain_lambdas")):
        field, values = f"{section}.{name}", config[section][name]
        for x in values:
            require(is_lambda(x), f"{field}={values}: every lambda is a number >= 0, not {x!r}")
        require(
            len(set(values)) == len(values) or section != "opd", f"{field}={values}: a value appears twice"
        )
        require(
            name == "lambdas" or not values or guard_text(config.opd.guard) != "",
            f"{field}={values} are without the guard, and opd.guard is off: give them as {section}.lambdas, or set "
            "opd.guard.margin (1.25)",
        )
    for x in seeds:
        require(is_seed(x), f"opd.seeds={seeds}: every seed is a whole number in [0, 2^32), not {x!r}")
    _validate_anchors(config)
    require(
        not config.opd.recommend or 1 in {*lambdas, *config.forecast.lambdas},
        "opd.recommend compares every λ with λ = 1: add 1.0 to forecast.lambdas",
    )
    require(
        not config.opd.recommend or config.opd.advantage == "base_relative",
        "opd.recommend is about the base-relative target, not opd.advantage='no_base'; set one of the two",
    )
    require(len(set(seeds)) == len(seeds), f"opd.seeds={seeds}: a value appears twice")


def _validate_sweep(config: ml_collections.ConfigDict) -> None:
    """Validate each point as its own run."""
    labels = sweep_labels(config.opd)
    if labels == [""]:
        return
    for field, used in (("opd.recommend", config.opd.recommend), ("section predict", predicts(config))):
        require(
            not used,
            f"{field} is about one curve over λ, and opd.sweep trains several: leave one of them out",
        )
    for label in labels:
        try:
            validate(ml_collections.ConfigDict(at_point(config, label)))
        except UserError as e:
            raise UserError(f"opd.sweep, {label}: {e}") from e


def _validate_anchors(config: ml_collections.ConfigDict) -> None:
    anchors, seeds = config.predict.anchors, config.predict.seeds
    for x in anchors:
        require(is_lambda(x), f"predict.anchors={anchors}: every lambda is a number >= 0, not {x!r}")
    for x in seeds:
        require(is_seed(x), f"predict.seeds={seeds}: every seed is a whole number in [0, 2^32), not {x!r}")
    for name, values in (("anchors", anchors), ("seeds", seeds)):
        require(len(set(values)) == len(values), f"predict.{name}={values}: a value appears twice")
    require(
        predicts(config) or not config.predict.only,
        "predict.only=True stops after the prediction, and without predict.anchors there is none: give some, or "
        "predict.fixed_text_lists=64",
    )
    if not predicts(config):
        return
    require(
        not anchors or len(anchors) >= 2 and len(anchors) * len(seeds) >= 3,
        f"predict.anchors={anchors}, predict.seeds={seeds}: three runs are needed, of two λ; give more",
    )
    shared = sorted(set(seeds) & set(config.opd.seeds))
    require(
        not shared,
        f"predict.seeds={seeds}: {shared} are in opd.seeds too; a prediction must not see the runs that judge it",
    )
    require(
        config.opd.advantage == "base_relative" and config.opd.ratio != "aspo",
        "predict.anchors, predict.fixed_text_lists: the limit of no_base and of ratio aspo is not known; set () and 0",
    )
    require(
        not config.opd.recommend,
        "section predict is about runs at all opd.lambdas, and opd.recommend trains at one: leave one of them out",
    )
    require(
        config.opd.on_collapse in ("none", "warn"),
        f"section predict is about runs that keep their λ to the end, which opd.on_collapse={config.opd.on_collapse!r} "
        "changes: leave one of them out",
    )


def _validate_server(config: ml_collections.ConfigDict) -> None:
    """What a served teacher requires of other fields; its address is shown and saved, so it must hold no secret."""
    teacher, opd = config.teacher, config.opd
    require(
        bool(teacher.server) == bool(teacher.served_name),
        "teacher.server and teacher.served_name (the model's name there): set both, or neither",
    )
    if not teacher.server:
        return
    require(
        is_address(teacher.server),
        "teacher.server: write http(s)://HOST:PORT, without user, password or query; a key goes into the environment "
        "as LISTOPD_TEACHER_KEY",
    )
    require(
        not (teacher.weights or config.teachers.route),
        "teacher.server is the only teacher of a run: leave teacher.weights and teachers.route out",
    )
    require(
        bool(config.tokenizer.path),
        "tokenizer.path is empty: the teacher of teacher.server needs its tokenizer",
    )
    require(
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
            f"{field} needs the teacher's full distribution, and teacher.server gives one number per token: leave one "
            "of them out"
        )


def _validate_teachers(config: ml_collections.ConfigDict) -> None:
    teachers, routes = config.teachers, teacher_routes(config.teachers)
    require(
        bool(teachers.field) == bool(routes),
        f"teachers.field={teachers.field!r} and teachers.route={teachers.route!r}: set both, or neither",
    )
    require(
        not routes or TEACHER in routes.values(),
        f"teachers.route={teachers.route!r}: no record goes to section teacher; write VALUE={TEACHER} for its "
        "own, with teacher.weights",
    )
    require(
        not routes or bool(config.tokenizer.path),
        "tokenizer.path is empty: the checkpoints of teachers.route need their tokenizer",
    )
    require(
        not (routes and config.evaluation.expected),
        "evaluation.expected reads all lists with one teacher, so not with teachers.route: leave one of them out",
    )
    require(
        not (teachers.max_prompt and (config.opd.recommend or predicts(config))),
        "opd.recommend and section predict need a forecast, and with teachers.max_prompt there is none",
    )


def _validate_combinations(config: ml_collections.ConfigDict) -> None:
    for role in ("teacher", "student"):
        noise_shares(config.sft[role], f"sft.{role}")
    opd, drafts = config.opd, config.rollout.draft_tokens
    require(
        -1 <= drafts <= MOST_DRAFT_TOKENS,
        f"rollout.draft_tokens={drafts}: must be from 0 to {MOST_DRAFT_TOKENS}, or -1 for the default",
    )
    require(
        config.task.max_response != 1,
        "task.max_response=1: must be at least 2 tokens, or 0 to follow the task",
    )
    require(opd.clip > 1, f"opd.clip={opd.clip}: the clip c must be > 1 (inf for none), EC Eq. 3")
    guard, margin = opd.guard, opd.guard.margin
    require(
        margin == 0 or margin >= 1,
        f"opd.guard.margin={margin}: must be 0 (off) or at least 1; 1.25 is a start",
    )
    require(
        guard.structure == -1 or guard.structure >= 0,
        f"opd.guard.structure={guard.structure}: a λ ≥ 0, or -1 for that of the run",
    )
    for name, off in (("margin", 0), ("mask", False), ("floor", 0), ("structure", -1)):
        require(
            guard[name] == off or opd.advantage == "base_relative",
            f"opd.guard.{name} guards the base-relative target, not opd.advantage='no_base'; set one of the two",
        )
    for name, part in (
        ("opd", opd),
        ("sft.teacher", config.sft.teacher),
        ("sft.student", config.sft.student),
    ):
        require(
            part.microbatch == 0 or part.batch_size % part.microbatch == 0,
            f"{name}.microbatch={part.microbatch} must divide {name}.batch_size={part.batch_size}",
        )
    require(
        opd.estimator == "sampled" or (opd.ratio == "none" and opd.ppo_clip == 0),
        "opd.estimator='full_vocab' is exact, without importance ratios: set opd.ratio='none' and opd.ppo_clip=0",
    )
    require(
        opd.estimator == "sampled" or not opd.normalize,
        "opd.normalize corrects the advantage of sampled tokens, which opd.estimator='full_vocab' does not need: set "
        "opd.normalize=False",
    )
    require(
        opd.steps > 0 or opd.epochs > 0, "opd.steps=0 and opd.epochs=0: nothing to train; set one of them"
    )
    require(
        config.tokenizer.path or not any(config[r].weights for r in ("teacher", "student", "reference")),
        "tokenizer.path is empty: models with weights need their tokenizer, e.g. the same folder or hub id",
    )
    _validate_options(config)
    _validate_trackers(config.track)
    _validate_guard(config)
    _validate_parallel(config.parallel)
    size = config.tokenizer.vocab_size
    require(size >= 258, f"tokenizer.vocab_size={size}: at least 258 are needed (256 bytes, EOS, PAD)")
    for role in ("teacher", "student"):
        _validate_model(role, config[role], size)


def _validate_packing(config: ml_collections.ConfigDict) -> None:
    widest = config.task.max_prompt + config.task.max_response
    for name in ("teacher", "student"):
        tokens = config.sft[name].packing
        require(
            tokens == 0 or tokens >= widest,
            f"sft.{name}.packing={tokens}: a row must hold any list, of task.max_prompt + task.max_response = {widest} "
            "tokens; set that or more",
        )


def _validate_options(config: ml_collections.ConfigDict) -> None:
    """What the options of docs/training_options.md require of other fields."""
    opd = config.opd
    require(
        not opd.steps or opd.warmup_steps <= opd.steps,
        f"opd.warmup_steps={opd.warmup_steps}: of opd.steps={opd.steps}, so opd.lr is never reached; set fewer",
    )
    require(
        opd.estimator == "sampled" or (opd.control_variate == "none" and opd.contract_reward == 0),
        "opd.control_variate and opd.contract_reward are about sampled tokens, which opd.estimator='full_vocab' does "
        "without: leave both off",
    )
    require(
        opd.estimator == "full_vocab" or (opd.jsd == 1 and opd.on_policy == 1),
        f"opd.jsd={opd.jsd:g}, opd.on_policy={opd.on_policy:g}: other divergences and other data than the student's "
        "own need exact gradients; set opd.estimator='full_vocab' and opd.ratio='none'",
    )
    require(
        opd.jsd == 1 or not opd.guard.mask,
        f"opd.jsd={opd.jsd:g}: opd.guard.mask is for the reverse KL; set opd.jsd=1.0 or opd.guard.mask=False",
    )
    require(
        opd.on_policy == 1 or opd.on_collapse == "none",
        f"opd.on_policy={opd.on_policy:g}: opd.on_collapse watches the student's own completions at every step; set "
        "one of the two back to its default",
    )
    on_policy = opd.updates_per_batch == 1 and opd.temperature == 1 and opd.ppo_clip == 0
    require(
        on_policy or opd.control_variate == "none",
        "opd.control_variate keeps the expected gradient only where the student itself samples: set "
        "opd.updates_per_batch=1, opd.temperature=1.0 and opd.ppo_clip=0.0",
    )
    require(
        opd.rollouts > 1 or opd.contract_reward == 0,
        "opd.contract_reward compares the completions of a prompt with each other: set opd.rollouts to at least 2",
    )
    require(
        not config.reference.weights or opd.advantage == "base_relative" or opd.kl_to_base > 0,
        "reference.weights is the base, which opd.advantage='no_base' does not use; leave one of them out",
    )
    require(
        bool(config.reference.weights) or not config.reference.adapter,
        f"reference.adapter={config.reference.adapter}: set reference.weights to the model that it was trained on",
    )
    require(
        not config.reference.weights or config.student.lora.rank == 0,
        "student.lora.rank: an adapter is trained on the base's own arrays; set it to 0, or drop reference.weights",
    )


def _validate_constraints(config: ml_collections.ConfigDict) -> None:
    opd, names_by_field = config.opd, constraints(config)
    for field in ("evaluation.constrained", "opd.constrained_rollouts"):
        for name in names_by_field[field]:
            if name not in CONSTRAINTS:
                raise unknown_name(field, str(name), CONSTRAINTS)
    named = [field for field, names in names_by_field.items() if "contract" in names]
    require(
        not named or ranks_reviews(config),
        f"{', '.join(named)}: 'contract' is of task.name='reviews', not of {task_name(config)!r}; use 'schema'",
    )
    require(
        not opd.constrained_rollouts or opd.control_variate == "none",
        "opd.control_variate keeps the expected gradient only where the student itself samples, not under the masks of "
        "opd.constrained_rollouts; leave one of them off",
    )


def _validate_guard(config: ml_collections.ConfigDict) -> None:
    """What sft.continued, the expected scores and the guards require of other fields."""
    opd = config.opd
    require(
        not config.sft.continued
        or config.teacher.to_dict() == config.student.to_dict() | {"server": "", "served_name": ""},
        "sft.continued starts the teacher's SFT from the trained student: teacher and student must be the same section",
    )
    require(
        ranks_reviews(config)
        or not (config.evaluation.expected or config.evaluation.margins or guard_knows_contract(opd.guard)),
        f"task {task_name(config)!r}: evaluation.expected, evaluation.margins and guards that know the contract "
        "(opd.guard.scope, mask, structure) are of task.name='reviews'; leave them off",
    )
    require(
        opd.guard.scope == "all" or opd.guard.margin > 0 or opd.guard.floor > 0,
        f"opd.guard.scope={opd.guard.scope!r} does nothing alone: set opd.guard.margin (1.25) or opd.guard.floor too",
    )
    require(
        opd.control_variate == "none" or not (opd.guard.mask or opd.guard.floor),
        "opd.control_variate does not support the target of opd.guard.mask or opd.guard.floor: leave one of them off",
    )


def _validate_trackers(track: ml_collections.ConfigDict) -> None:
    for name in track.to:
        if name not in TRACKERS:
            raise unknown_name("track.to", str(name), TRACKERS)
    require(
        track.project != "" or not track.to,
        "track.project is empty: trackers need the name of a project",
    )


def _validate_parallel(parallel: ml_collections.ConfigDict) -> None:
    axes = {axis: parallel[axis] for axis in ("data", "fsdp", "tensor")}
    for axis, size in axes.items():
        require(size == -1 or size > 0, f"parallel.{axis}={size}: must be > 0, or -1 for all devices left")
    require(
        list(axes.values()).count(-1) <= 1,
        f"parallel.{', parallel.'.join(a for a in axes if axes[a] == -1)}: only one of them can be -1",
    )
    require(parallel.num_processes >= 0, f"parallel.num_processes={parallel.num_processes}: must be >= 0")


def _validate_data(config: ml_collections.ConfigDict) -> None:
    data, k = config.data, config.task.k
    cap = data.max_reviews_per_product
    who = f"data.source={data.source!r}" if ranks_reviews(config) else f"task {task_name(config)!r}"
    # A task of the user's own says what it reads (FileTask: data.path).
    own = bool(config.task.file)
    require(
        bool(data.path) or own or (ranks_reviews(config) and data.source in ("synthetic", "amazon2023")),
        f"data.path is empty: {who} needs a file, e.g. --config.data.path=FILE",
    )
    require(
        is_date(config.task.chat_date), f"task.chat_date={config.task.chat_date!r}: write it as YYYY-MM-DD"
    )
    require(k == 0 or k >= 2, f"task.k={k}: a list to rank has at least 2 reviews")
    require(
        cap == 0 or cap >= max(k, 2),
        f"data.max_reviews_per_product={cap}: must be 0 (all) or at least task.k",
    )
    require(data.max_broken <= 1, f"data.max_broken={data.max_broken}: a share from 0 to 1")
    require(data.validation_share > 0, "data.validation_share=0.0: policies are evaluated on held-out lists")
    require(data.max_lists != 1, "data.max_lists=1: must be 0 (all) or at least 2")
    require(
        not data.synthetic_queries or task_name(config) == "cranfield",
        f"data.synthetic_queries is of task.name='cranfield', not of {task_name(config)!r}; set it to 0",
    )
    _validate_categories(config, who)
    require(data.synthetic.products >= 2, f"data.synthetic.products={data.synthetic.products}: must be >= 2")


def _validate_categories(config: ml_collections.ConfigDict, who: str) -> None:
    data, known = config.data, ranks_reviews(config) and config.data.source == "clothing"
    for name in ("category", "validation_category"):
        require(
            known or not data[name],
            f"data.{name}={data[name]}: {who} has no departments, data.source=clothing does; leave it empty",
        )
    require(
        not data.category or data.category != data.validation_category,
        f"data.validation_category={data.validation_category} is data.category too; leave it empty for a random split",
    )


def _validate_model(role: str, model: ml_collections.ConfigDict, vocab: int) -> None:
    """UserError if a model without weights has impossible dimensions; `vocab` stands for the tokenizer's size."""
    _validate_lora(role, model.lora)
    require(
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
    require(lora.rank >= 0, f"{role}.lora.rank={lora.rank}: must be >= 0")
    require(lora.alpha > 0, f"{role}.lora.alpha={lora.alpha}: must be > 0")
    for target in lora.targets.split(","):
        if target not in LORA_TARGETS:
            raise unknown_name(f"{role}.lora.targets", target, LORA_TARGETS)
