"""The configuration: presets, overrides, and one line for whatever cannot be run."""

import json
import math

import pytest

from configs import fashion, natural
from listopd_jax import config as config_module
from listopd_jax import files
from listopd_jax.errors import UserError


@pytest.mark.parametrize("preset", ["tiny", "paper", "paper_8b"])
def test_presets_are_valid_and_are_json(preset):
    config = config_module.validate(fashion.get_config(preset))
    assert config.preset == preset
    assert json.loads(json.dumps(config_module.to_json(config)))["opd"]["clip"] == 5.0


@pytest.mark.parametrize("preset", fashion.PRESETS)
@pytest.mark.parametrize("task", [name for name in config_module.TASKS if name != "reviews"])
def test_any_preset_serves_any_task(preset, task, capsys):
    """What only lists of reviews have is dropped with one line; a mask, which would train otherwise, is refused."""
    config = fashion.get_config(preset)
    config.task.name, config.data.path = task, "FILE"
    given = config_module.for_its_task(config)
    checked, said = config_module.validate(given), capsys.readouterr().err
    assert not (checked.evaluation.expected or checked.evaluation.margins)
    assert checked.opd.guard.margin == config.opd.guard.margin and checked.opd.guard.scope == "all"
    if given is config:
        assert said == ""
    else:
        assert said.startswith(f"task {task}: ignoring ") and said.endswith(
            ", which only lists of reviews have\n"
        )
        changed = {k for (k, a), (_, b) in zip(*map(flat, (config, given)), strict=True) if a != b}
        assert changed and all(field in said for field in changed) and said.count("\n") == 1
    config.opd.guard.update(margin=1.25, mask=True)
    with pytest.raises(UserError, match="guards that know the contract"):
        config_module.validate(config_module.for_its_task(config))


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--config.opd.guard.scope=structure", "opd.guard.scope"),
        ("--config.evaluation.expected", "evaluation.expected"),
        ("-config.evaluation.margins=True", "evaluation.margins"),
    ],
)
def test_what_a_flag_asks_for_is_refused_and_never_dropped(flag, field):
    config = fashion.get_config("demo")
    config.task.name, config.data.path = "json", "FILE"
    config.evaluation.margins = True
    given = dict(flat(config_module.for_its_task(config, ["main", flag])))
    assert given[field] == dict(flat(config))[field]
    with pytest.raises(UserError, match="guards that know the contract"):
        config_module.validate(config_module.for_its_task(config, ["main", flag]))


def test_of_reviews_nothing_is_dropped(capsys):
    config = fashion.get_config("demo")
    assert config_module.for_its_task(config) is config and config.evaluation.expected
    assert capsys.readouterr().err == ""


def flat(config):
    return sorted(config_module.flatten(config.to_dict()))


@pytest.mark.parametrize("ablation", natural.ABLATIONS)
def test_the_ablations_on_a_pretrained_pair_forecast_the_same_grid(ablation):
    config = natural.get_config(ablation)
    config.data.path = "reviews.csv"
    config = config_module.validate(config)
    assert config_module.predicts(config) == (ablation in ("early", "late"))
    assert config.train.export == (ablation == "early")  # the others start from its checkpoints
    guarded = config.opd.guard.margin > 0
    forecast = config.forecast.plain_lambdas if guarded else config.forecast.lambdas
    assert set(forecast) >= set(config.opd.plain_lambdas if guarded else config.opd.lambdas)


def test_on_one_core_every_guarded_point_has_its_plain_one_and_both_their_pair():
    config = natural.get_config("cpu")
    config.data.path = "reviews.csv"
    opd = config_module.validate(config).opd
    assert config.sft.continued and opd.guard.margin > 0 and set(opd.lambdas) < set(opd.plain_lambdas)
    assert config.dtype.compute == config.dtype.frozen == "float32"


@pytest.mark.parametrize(
    "preset, differs", [("cpu_independent", "sft.teacher.seed"), ("cpu_reference", "reference.weights")]
)
def test_the_other_pairs_of_one_core_have_its_student_and_its_steps(preset, differs):
    own, other = (dict(flat(natural.get_config(name))) for name in ("cpu", preset))
    changed = {name for name in own if own[name] != other[name]}
    assert differs in changed
    assert not any(name.startswith(("student.", "sft.student.", "task.", "evaluation.")) for name in changed)
    assert {name for name in changed if name.startswith("opd.")} == {
        "opd.lambdas", "opd.plain_lambdas", "opd.guard.margin",
    }  # fmt: skip


def test_paper_is_the_recipe_of_the_paper():
    config = fashion.get_config("paper")
    assert (config.student.weights, config.teacher.weights) == ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B")
    opd = config.opd
    assert (opd.lr, opd.batch_size, opd.steps, opd.clip, opd.temperature) == (1e-6, 128, 42, 5.0, 1.0)
    assert (config.task.max_prompt, config.task.max_response) == (2048, 512)
    big = fashion.get_config("paper_8b")
    assert (big.student.weights, big.teacher.weights) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B")


def test_k_follows_the_source():
    config = fashion.get_config("tiny")
    assert config_module.validate(config).task.k == 4
    config = fashion.get_config("tiny")
    config.data.update(source="clothing", path="reviews.csv")
    assert config_module.validate(config).task.k == 8
    assert config.task.k == 0  # what is checked is left as it was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opd.seeds": ()}, "opd.seeds is empty"),
        ({"opd.lambdas": (1.0, 1.0)}, "appears twice"),
        ({"opd.lambdas": (1.0, math.nan)}, "must not be NaN"),
        ({"opd.lambdas": (1.0, math.inf)}, "must be finite"),
        ({"opd.lambdas": (-0.5,)}, "every lambda is a number >= 0"),
        ({"opd.b2": 1.0}, "opd.b2=1.0: must be in [0, 1)"),
        ({"sft.teacher.seed": 2**40}, "must be in [0, 2^32)"),
        ({"opd.seeds": (0.5,)}, "every seed is a whole number"),
        ({"opd.clip": 0.9}, "must be > 1"),
        ({"opd.lr": 0.0}, "opd.lr=0.0: must be > 0"),
        ({"opd.steps": 0, "opd.epochs": 0.0}, "nothing to train"),
        ({"opd.ppo_clip": 1.0}, "opd.ppo_clip=1.0: must be in [0, 1)"),
        ({"opd.estimator": "full_vocab"}, "opd.ratio='none'"),
        ({"opd.estimator": "full_vocab", "opd.ratio": "none", "opd.normalize": True}, "opd.normalize=False"),
        ({"opd.ema": 1.0}, "opd.ema=1.0: must be in [0, 1)"),
        ({"opd.lr_decay": "cosine"}, "opd.lr_decay='cosine' is unknown"),
        ({"opd.steps": 5, "opd.warmup_steps": 6}, "opd.warmup_steps=6: of opd.steps=5"),
        ({"opd.control_variate": "kl", "opd.updates_per_batch": 2}, "set opd.updates_per_batch=1"),
        ({"opd.control_variate": "kl", "opd.temperature": 0.7}, "opd.temperature=1.0"),
        (
            {"opd.control_variate": "optimal", "opd.estimator": "full_vocab", "opd.ratio": "none"},
            "about sampled tokens",
        ),
        ({"opd.contract_reward": 0.5, "opd.rollouts": 1}, "set opd.rollouts to at least 2"),
        ({"opd.contract_reward": -0.5}, "opd.contract_reward=-0.5: must be >= 0"),
        ({"opd.on_collapse": "halt"}, "opd.on_collapse='halt' is unknown"),
        ({"opd.collapse.window": 0}, "opd.collapse.window=0: must be > 0"),
        ({"opd.advantage": "no_bass"}, "did you mean 'no_base'?"),
        ({"opd.microbatch": 5}, "must divide"),
        ({"rollout.draft_tokens": -2}, "must be from 0 to 64, or -1"),
        ({"rollout.draft_tokens": 100_000}, "must be from 0 to 64, or -1"),
        ({"sft.teacher.noise": "truncate:1.5"}, "shares must not sum to more than 1"),
        ({"sft.student.noise": "truncate"}, "sft.student.noise='truncate': write NAME:SHARE"),
        ({"sft.student.noise": "a:0.1,a:0.1"}, "no name may appear twice"),
        ({"data.source": "clothing"}, "data.path is empty"),
        ({"data.category": "Tops"}, "data.category=Tops: data.source='synthetic' has no departments"),
        (
            {
                "data.source": "clothing",
                "data.path": "F",
                "data.category": "A",
                "data.validation_category": "A",
            },
            "data.validation_category=A is data.category too",
        ),
        ({"data.source": "yelp"}, "data.source='yelp' is unknown"),
        ({"data.vote_cap": 0}, "data.vote_cap=0: must be > 0"),
        ({"data.max_broken": 1.5}, "data.max_broken=1.5"),
        ({"data.validation_share": 0.0}, "data.validation_share=0.0"),
        ({"data.max_lists": 1}, "data.max_lists=1"),
        ({"task.k": 1}, "task.k=1"),
        ({"task.chat_date": "26 Jul 2024"}, "task.chat_date='26 Jul 2024': write it as YYYY-MM-DD"),
        ({"task.k": 4, "data.max_reviews_per_product": 3}, "data.max_reviews_per_product=3"),
        ({"data.synthetic.noise": math.nan}, "data.synthetic.noise=nan"),
        ({"student.weights": "folder"}, "tokenizer.path is empty"),
        ({"student.head_dim": 15}, "student: model config: head_dim=15 must be even"),
        (
            {"teacher.num_kv_heads": 3},
            "teacher: model config: num_heads=4 must be a multiple of num_kv_heads=3",
        ),
        ({"predict.only": True}, "without predict.anchors there is none"),
        ({"predict.anchors": (1.2,)}, "three runs are needed, of two λ"),
        ({"predict.anchors": (1.2, 1.4), "predict.seeds": (1,)}, "three runs are needed, of two λ"),
        ({"predict.anchors": (1.2, 1.4), "opd.recommend": True}, "and opd.recommend trains at one"),
        ({"predict.anchors": (1.2, 1.4), "opd.on_collapse": "stop"}, "which opd.on_collapse='stop' changes"),
        ({"remat": "some"}, "remat='some' is unknown"),
        ({"attention": "flash"}, "attention='flash' is unknown"),
    ],
)
def test_what_cannot_be_run_is_one_line_that_names_the_field(changes, message):
    config = fashion.get_config("tiny")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        config_module.validate(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_clip_is_infinity_and_survives_json():
    config = fashion.get_config("tiny")
    config.opd.clip = math.inf
    assert config_module.to_json(config_module.validate(config))["opd"]["clip"] == "inf"


def test_the_digest_changes_with_any_field(tmp_path):
    a, b = fashion.get_config("tiny"), fashion.get_config("tiny")
    assert config_module.digest(a, tmp_path) == config_module.digest(b, tmp_path)
    b.attention = "xla"  # may change: a run may resume on other devices
    assert config_module.digest(a, tmp_path) == config_module.digest(b, tmp_path)
    b.opd.lr *= 2
    assert config_module.digest(a, tmp_path) != config_module.digest(b, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr_decay", "linear"),
        ("warmup_steps", 10),
        ("ema", 0.97),
        ("control_variate", "kl"),
        ("contract_reward", 0.5),
        ("on_collapse", "warn"),
    ],
)
def test_an_option_changed_is_another_run(field, value, tmp_path):
    """Of checkpoints by the digest, of a workdir by name."""
    config, first = fashion.get_config("tiny"), fashion.get_config("tiny")
    before, config.opd[field] = config.opd[field], value
    saved, now = (config_module.to_json(config_module.validate(c)) for c in (first, config))
    assert config_module.digest(config, tmp_path) != config_module.digest(first, tmp_path)
    assert config_module.changed_field(saved, now) == ("opd." + field, before, value)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ([], "the saved config is list, not an object"),
        ({"opd": {"lr": 10**400}}, "opd.lr=1000"),
        ({"a\nb": 1}, r"a\\nb: there is no such field"),
        ({"opd": {"clip": {}}}, None),
        ({"task": {"max_response": False}}, "task.max_response=False: must not be True or False"),
        ({"opd": {"seeds": [True]}}, "opd.seeds=.True,.: must not be True or False"),
    ],
)
def test_a_damaged_saved_config_is_one_line(saved, says):
    if says is None:
        assert config_module.from_json(saved) == config_module.validate(config_module.defaults())
        return
    with pytest.raises(UserError, match=says):
        config_module.from_json(saved)


@pytest.mark.parametrize("text", ["[]", "{}", '{"config": 3}', '{"config": {}, "resumed": 1}', "NaN"])
def test_a_digest_beside_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: not "):
        config_module.digest(config_module.validate(config_module.defaults()), tmp_path)


def test_the_digest_is_of_what_may_not_change_in_a_workdir(tmp_path):
    """The grid may grow and the devices may be others."""
    a, b = fashion.get_config("tiny"), fashion.get_config("tiny")
    b.opd.lambdas, b.opd.seeds, b.forecast.lambdas, b.parallel.fsdp = (1.0, 9.0), (3, 4), (7.0,), 4
    b.predict.update(anchors=(1.1, 1.2), only=True)
    assert config_module.digest(a, tmp_path) == config_module.digest(b, tmp_path)
    assert "opd.lambda_warmup_steps" in config_module.fixed_fields(config_module.to_json(a))


@pytest.mark.parametrize("flags", [[], ["--config.opd.budgets=2,"]])
def test_a_renamed_field_is_answered_with_its_new_name(flags):
    config = config_module.defaults()
    with pytest.raises(KeyError) as e:
        config.opd.update(budgets=(2,))
    assert "opd.budgets is opd.eval_steps now" in config_module.unknown_field(flags, e.value)


@pytest.mark.parametrize("flags", [[], ["--config.parallel.grid=1"]])
def test_a_removed_field_is_answered_with_what_holds_without_it(flags):
    config = config_module.defaults()
    with pytest.raises(KeyError) as e:
        config.parallel.update(grid=1)
    answer = config_module.unknown_field(flags, e.value)
    assert "parallel.grid is gone, leave it out: the main job trains one" in answer


@pytest.fixture
def older():
    """A config, and the same in JSON values as a version saved it that had parallel.grid, and fewer fields."""
    config = config_module.validate(fashion.get_config("tiny"))
    saved = config_module.to_json(config)
    saved["parallel"]["grid"] = 1
    del saved["data"]["category"], saved["opd"]["guard"]
    return config, saved


def test_a_saved_config_may_have_a_removed_field_and_lack_new_ones(older):
    config, saved = older
    assert config_module.from_json(saved) == config


def test_a_field_that_an_older_workdir_lacks_had_its_default(older, tmp_path):
    """Its checkpoints name the digest of then, and so does what later versions keep there."""
    config, saved = older
    now = config_module.to_json(config)
    assert config_module.changed_field(saved, now) is None
    (tmp_path / "config.json").write_text(json.dumps({"config": saved}))
    digest = config_module.digest(config, tmp_path)
    assert digest == files.json_sha256(config_module.fixed_fields(saved))
    kept = config_module.as_first_saved(now, saved)
    assert "category" not in kept["data"] and "guard" not in kept["opd"]
    assert kept | {"parallel": saved["parallel"]} == saved
    (tmp_path / "config.json").write_text(json.dumps({"config": kept}))
    assert config_module.digest(config, tmp_path) == digest


def test_a_field_that_an_older_workdir_lacks_is_refused_by_name_away_from_its_default(older):
    config, saved = older
    now = config_module.to_json(config)
    now["opd"]["guard"]["margin"] = 1.25
    assert config_module.changed_field(saved, now) == ("opd.guard.margin", 0.0, 1.25)
    saved["opd"]["budgets"] = saved["opd"].pop("eval_steps")
    assert (
        config_module.changed_field(saved, now)[0] == "opd.budgets"
    )  # the name that is no more, to be renamed


def test_no_field_can_be_added():
    with pytest.raises(AttributeError) as e:
        config_module.defaults().opd.lamdas = (1.0,)
    assert "did you mean lambdas?" in config_module.unknown_field([], e.value)


def test_a_config_file_is_found_beside_the_package_from_any_folder(tmp_path, monkeypatch):
    here = config_module.find_config_file(["main", "--config=configs/fashion.py:tiny", "--workdir=x"])
    assert here[1] == "--config=configs/fashion.py:tiny"
    monkeypatch.chdir(tmp_path)
    there = config_module.find_config_file(["main", "--config=configs/fashion.py:tiny", "--config.seed=1"])
    path, _, preset = there[1].removeprefix("--config=").partition(":")
    assert path == fashion.__file__ and preset == "tiny" and there[2] == "--config.seed=1"
    with pytest.raises(UserError, match="configs/fashoin.py: no such file, .* in a checkout"):
        config_module.find_config_file(["main", "--config=configs/fashoin.py"])


@pytest.mark.parametrize(("k", "tokens"), [(0, 48), (8, 96)])
def test_an_answers_budget_of_zero_follows_the_number_of_reviews(k, tokens):
    config = fashion.tiny()
    config.task.k = k
    assert config_module.validate(config).task.max_response == tokens
    config.task.max_response = 1
    with pytest.raises(UserError, match="task.max_response=1"):
        config_module.validate(config)


def test_only_models_made_here_and_narrow_are_small():
    assert config_module.is_small(config_module.validate(fashion.tiny()))
    assert not config_module.is_small(config_module.validate(fashion.paper()))
    wide = fashion.tiny()
    wide.teacher.hidden_size = 256
    assert not config_module.is_small(config_module.validate(wide))


@pytest.mark.parametrize("preset", ["tiny", "paper", "paper_8b"])
def test_a_config_comes_back_from_json(preset):
    config = fashion.get_config(preset)
    config.opd.update(clip=float("inf"), eval_steps=(2, 3))
    config = config_module.validate(config)
    saved = json.loads(json.dumps(config_module.to_json(config)))
    assert config_module.from_json(saved).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"opd": {"lamdas": [1.0]}}, "opd.lamdas: there is no such field"),
        ({"opd": {"budgets": [60]}}, "opd.budgets is opd.eval_steps now"),
        ({"opd": {"lr": "fast"}}, "opd.lr='fast': "),
        ({"opd": {"lambdas": [[1.0]]}}, "opd.lambdas=([1.0],): every lambda is a number"),
        ({"opd": 3}, "opd: there is no such field"),
        ({"seed": {"a": 1}}, "seed.a: there is no such field"),
        ({"task": {"k": 1}}, "task.k=1: "),
        ({"opd": {"clip": None}}, "opd.clip=None: "),
        ({"data": {"path": None}}, "data.path=None: "),
    ],
)
def test_what_is_no_config_is_one_line(saved, says):
    with pytest.raises(UserError) as error:
        config_module.from_json(saved)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("eval_steps", "eval_every", "steps", "budgets"),
    [
        ((), 0, 50, [50]),
        ((20, 40), 0, 50, [20, 40, 50]),
        ((), 20, 50, [20, 40, 50]),
        ((), 25, 50, [25, 50]),
        ((10, 20, 60), 20, 50, [10, 20, 40, 50]),
        ((), 60, 50, [50]),
    ],
)
def test_budgets_are_those_asked_for_before_the_last_and_the_last(eval_steps, eval_every, steps, budgets):
    opd = config_module.defaults().opd
    opd.update(eval_steps=eval_steps, eval_every=eval_every)
    assert config_module.eval_budgets(opd, steps) == budgets
